"""Tensors of a ``torch.save`` file, described by its pickle and read from the file on request."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import printable
from .tensor_files import CheckpointError, check_claimed_bytes, format_names

MAX_DIMENSIONS = 64  # of a tensor: PyTorch's operators take no more


@dataclass(eq=False, slots=True)
class Storage:
    """Bytes in a file that tensors view.

    Attributes:
        path: the file.
        version: what `file_version` returned when the file was opened.
        dtype: of the elements that a tensor's offset and strides count.
        nbytes: must lie within the file.
        position: of the first byte.
        byteorder: ``"little"`` or ``"big"``.
    """

    path: Path
    version: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    position: int = 0
    byteorder: str = "little"

    def read(self) -> Tensor:
        """Return the bytes, in memory of their own. Raises CheckpointError if the file has changed since it was opened."""
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        with open(self.path, "rb") as file:
            file.seek(self.position)
            count = file.readinto(data.numpy().data)
            if count != self.nbytes or file_version(file.fileno()) != self.version:
                raise CheckpointError(f"{self.path} changed while it was read")
        if self.byteorder != sys.byteorder:
            data.untyped_storage().byteswap(self.dtype)
        return data


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A tensor in a file. Without a storage it stands for one that is not dense: sparse, quantised, meta or of a subclass.

    Raises ValueError if the tensor does not lie within its storage.
    """

    storage: Storage | None
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = (self.offset, *self.shape, *self.stride)
        counts = all(type(size) is int and size >= 0 for size in sizes)
        if not counts or len(self.shape) != len(self.stride) or len(self.shape) > MAX_DIMENSIONS:
            raise ValueError(f"expected at most {MAX_DIMENSIONS} sizes and as many strides, got {printable(repr(sizes), 200)}")
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if self.storage is not None and 0 not in self.shape and last >= self.storage.nbytes // self.dtype.itemsize:
            raise ValueError(f"a tensor of shape {printable(repr(self.shape), 200)} does not lie within its storage")

    @property
    def nbytes(self) -> int:
        """Size of a dense copy. A stride of 0 gives a tensor any size."""
        return 0 if self.storage is None else math.prod(self.shape) * self.dtype.itemsize

    def without_data(self) -> StoredTensor:
        return StoredTensor(None, self.dtype, 0, self.shape, (0,) * len(self.shape))

    def read(self) -> Tensor:
        """Return the tensor, or a meta tensor if it has no storage."""
        if self.storage is None:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self.view(self.storage.read())

    def view(self, data: Tensor) -> Tensor:
        """Return the tensor as a view of its storage's bytes."""
        return (
            data[: len(data) // self.dtype.itemsize * self.dtype.itemsize]
            .view(self.dtype)
            .as_strided(self.shape, self.stride, self.offset)
        )


def file_version(file: Path | int) -> tuple[int, ...]:
    """Return numbers that differ once the file of this path or descriptor is written to or replaced."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def load_entries(entries: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the entries as tensors, each in memory of its own.

    Raises CheckpointError if some are not tensors, are larger than the file or cannot be read.
    """
    others = [name for name, entry in entries.items() if not isinstance(entry, (Tensor, StoredTensor))]
    if others:
        raise CheckpointError(f"{path}: expected only tensors, got other entries: {format_names(others)}")
    stored = {name: entry for name, entry in entries.items() if isinstance(entry, StoredTensor)}
    check_claimed_bytes(path, sum(entry.nbytes for entry in stored.values()))
    sharing: dict[Storage | None, list[str]] = {}
    for name, entry in stored.items():
        sharing.setdefault(entry.storage, []).append(name)
    loaded: dict[str, Tensor] = {}
    for storage, names in sharing.items():
        if storage is None or (len(names) == 1 and stored[names[0]].nbytes == storage.nbytes):
            loaded |= {name: stored[name].read() for name in names}
        else:  # a view of a larger storage, or of one that others view
            data = storage.read()
            loaded |= {name: stored[name].view(data).clone() for name in names}
    return {name: loaded.get(name, entry) for name, entry in entries.items()}
