"""Recognise formats of weight files; read and write safetensors. Memory follows a file's real size, not its header's claims."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .files import MAX_SHOWN_CHARACTERS, printable

MAX_SHOWN_NAMES = 8  # in an error message
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHER_FORMATS = {  # by their first bytes, in lower case
    b"version https://git-lfs": "a Git LFS pointer instead of the weights: fetch them with `git lfs pull`",
    b"<!doctype html": "an HTML page instead of weights: download the file itself, not the page about it",
    b"<html": "an HTML page instead of weights: download the file itself, not the page about it",
    b"<?xml": "an XML document instead of weights, often the error message of a failed download",
    b"{": "a JSON document instead of weights",
    b"gguf": "a GGUF file: expected safetensors or torch.save",
    b"\x89hdf": "an HDF5 file: expected safetensors or torch.save",
    b"\x93numpy": "a NumPy array: expected safetensors or torch.save",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"rar!": "a RAR archive: unpack it first",
}


class CheckpointError(ValueError):
    """The file is damaged, truncated or not a checkpoint of a MoVQ model."""


def is_safetensors(path: Path) -> bool:
    """Return True for safetensors and False for ``torch.save``, by the file's first bytes rather than its name.

    Raises OSError if the file cannot be read, and CheckpointError if it is empty or has another format.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is damaged: the file is empty")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:  # the header's length, then the header in JSON
        return True
    for magic, description in OTHER_FORMATS.items():
        if head.lstrip().lower().startswith(magic):
            raise CheckpointError(f"{path} is {description}")
    return path.suffix == ".safetensors" and not head.startswith((b"PK\3\4", b"\x80"))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors by name, metadata). The tensors have memory of their own: the file may change afterwards."""
    with safe_open(path, framework="pt", backend="pread") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write contiguous tensors and metadata to path. Raises OSError if that fails."""
    # save_file would write to a temporary file of its own beside path, which a killed process leaves behind.
    path.write_bytes(save(dict(tensors), metadata))


def check_claimed_bytes(path: Path, claimed: int) -> None:
    """Raise CheckpointError if a file claims to hold more bytes than it has."""
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
