"""Read checkpoints of either format, safetensors or ``torch.save``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .files import require_file, wrap_errors
from .stored_tensors import load_entries
from .tensor_files import CheckpointError, is_safetensors, read_safetensors
from .torch_files import read_torch_file


def read_dictionaries(path: Path) -> tuple[dict[tuple[str, ...], dict[str, Any]], dict[str, str]]:
    """Return (every dictionary of tensors by the keys that lead to it, metadata). Only safetensors files have metadata.

    Raises OSError if the file cannot be read, and CheckpointError if it is damaged or has another format.
    """
    require_file(path)
    with wrap_errors(CheckpointError, f"{path} is damaged or not a checkpoint"):
        if is_safetensors(path):
            tensors, metadata = read_safetensors(path)
            return {(): tensors}, metadata
        return read_torch_file(path), {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the entries of the file's only dictionary of tensors, or of its ``state_dict``.

    Raises what `read_dictionaries` raises, and CheckpointError if the dictionary is missing or an entry is not a tensor.
    """
    dictionaries, _ = read_dictionaries(path)
    keys = ("state_dict",) if ("state_dict",) in dictionaries else next(iter(dictionaries), ())
    if keys not in dictionaries or (len(dictionaries) > 1 and keys not in ((), ("state_dict",))):
        raise CheckpointError(f"{path}: expected one dictionary of tensors or a state_dict, got {len(dictionaries)}")
    return load_entries(dictionaries[keys], path)
