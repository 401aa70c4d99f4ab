"""Read named tensors from untrusted checkpoint files. Memory follows a file's real size, not its header's claims."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .files import MAX_REASON_CHARACTERS, MAX_SHOWN_CHARACTERS, printable, require_file, wrap_errors

MAX_SHOWN_NAMES = 8  # in an error message
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointError(ValueError):
    """The file is damaged, truncated or not a checkpoint of a MoVQ model."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors by name, metadata) of a safetensors or torch.save file. Only safetensors files have metadata.

    Raises OSError if the file cannot be read, and CheckpointError if it is damaged or contains anything but tensors.
    """
    require_file(path)
    with wrap_errors(CheckpointError, f"{path} is damaged or not a checkpoint"):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        return _read_torch_file(path), {}


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    _check_archive_size(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = printable(str(error), MAX_REASON_CHARACTERS)
        message = f"{path} is damaged or contains objects other than tensors, which could run code"
        raise CheckpointError(f"{message}: {reason}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path}: expected a dictionary of named tensors, got {type(state).__name__}")
    others = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    if others:
        raise CheckpointError(f"{path}: expected only tensors, got other entries: {format_names(others)}")
    tensor_bytes = sum(tensor.nbytes for tensor in state.values() if is_plain_float(tensor))
    _check_claimed_bytes(path, tensor_bytes)  # a tensor with a stride of 0 can have any size
    return state


def _check_archive_size(path: Path) -> None:
    """Refuse a compressed archive before reading it: torch.save never compresses, and a zip bomb would fill the memory."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # the format before torch 1.6
            return
        with zipfile.ZipFile(file) as archive:
            _check_claimed_bytes(path, sum(entry.file_size for entry in archive.infolist()))


def _check_claimed_bytes(path: Path, claimed: int) -> None:
    if claimed > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: a file of {path.stat().st_size} bytes claims to hold {claimed}")


def is_plain_float(tensor: Tensor) -> bool:
    """Return True for a dense floating-point tensor on the CPU, without a subclass or quantisation."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and tensor.dtype in FLOAT_DTYPES and not tensor.is_quantized


def format_names(names: Iterable[str]) -> str:
    """List names for an error message: sorted, printable, and at most MAX_SHOWN_NAMES."""
    shown = [printable(name, MAX_SHOWN_CHARACTERS) for name in sorted(names)]
    more = f" and {len(shown) - MAX_SHOWN_NAMES} more" if len(shown) > MAX_SHOWN_NAMES else ""
    return ", ".join(shown[:MAX_SHOWN_NAMES]) + more
