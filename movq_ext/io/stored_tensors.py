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

from .files import wrap_errors
from .tensor_files import CheckpointError, check_claimed_bytes, format_names

MAX_DIMENSIONS = 64  # of a tensor: PyTorch's operators take no more
MAX_SIZE_BITS = 63  # PyTorch's sizes are int64


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
class StorageView:
    """Elements of a storage from number ``first`` on. A tensor's offset counts from there."""

    storage: Storage
    first: int

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A tensor in a file. Without a storage it stands for one that is not dense: sparse, quantised, meta or of a subclass.

    Raises ValueError if a field has the wrong type or the tensor does not lie within its storage.

    Attributes:
        stride: in elements, like the offset. Not used without a storage.
        conj, neg: the elements are the complex conjugate, or the negative, of the stored ones.
    """

    storage: Storage | None
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    conj: bool = False
    neg: bool = False

    def __post_init__(self) -> None:
        if not (self.storage is None or isinstance(self.storage, Storage)):
            raise ValueError(f"expected a tensor of a storage, got {type(self.storage).__name__}")
        for sizes in (self.shape, self.stride):  # a pickle can change a list after this check
            if type(sizes) is not tuple or len(sizes) > MAX_DIMENSIONS:
                raise ValueError(f"expected a tuple of at most {MAX_DIMENSIONS} sizes or strides, got {_describe(sizes)}")
        counts = (self.offset, *self.shape, *self.stride)
        if not all(type(count) is int and 0 <= count < 1 << MAX_SIZE_BITS for count in counts):
            raise ValueError(f"expected sizes, strides and an offset from 0 on, got {', '.join(map(_describe, counts))}")
        if self.storage is None:
            return
        if len(self.shape) != len(self.stride):
            raise ValueError(f"expected {len(self.shape)} strides for as many sizes, got {len(self.stride)}")
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if 0 not in self.shape and last >= self.storage.nbytes // self.dtype.itemsize:
            raise ValueError(f"a tensor of shape {self.shape} does not lie within its storage")

    @property
    def layout(self) -> str:
        """What the tensor's elements are. A string, because a file can choose tuples of integers with equal hashes."""
        return f"{id(self.storage)} {self.dtype} {self.offset} {self.shape} {self.stride} {self.conj} {self.neg}"

    @property
    def nbytes(self) -> int:
        """Size of a dense copy. A stride of 0 gives a tensor any size."""
        return 0 if self.storage is None else math.prod(self.shape) * self.dtype.itemsize

    def without_data(self) -> StoredTensor:
        return StoredTensor(None, self.dtype, 0, self.shape)

    def read(self) -> Tensor:
        """Return the tensor, or a meta tensor if it has no storage."""
        if self.storage is None:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self.view(self.storage.read())

    def view(self, data: Tensor) -> Tensor:
        """Return the tensor as a view of its storage's bytes, or a copy if they are to be conjugated or negated."""
        elements = data[: len(data) // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        tensor = elements.as_strided(self.shape, self.stride, self.offset)
        tensor = tensor.conj_physical() if self.conj else tensor
        return tensor.neg() if self.neg else tensor


def file_version(file: Path | int) -> tuple[int, ...]:
    """Return numbers that differ once the file of this path or descriptor is written to or replaced."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def load_entries(entries: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the entries as tensors, each in memory of its own. Tied entries (the same elements of a storage) stay one tensor.

    Raises CheckpointError if some are not tensors, are larger than the file or cannot be read.
    """
    others = [name for name, entry in entries.items() if not isinstance(entry, (Tensor, StoredTensor))]
    if others:
        raise CheckpointError(f"{path}: expected only tensors, got other entries: {format_names(others)}")
    distinct: dict[str, StoredTensor] = {}
    tied = {name: distinct.setdefault(entry.layout, entry) for name, entry in entries.items() if isinstance(entry, StoredTensor)}
    check_claimed_bytes(path, sum(entry.nbytes for entry in distinct.values()))
    views: dict[Storage | None, list[StoredTensor]] = {}
    for entry in distinct.values():
        views.setdefault(entry.storage, []).append(entry)
    loaded: dict[StoredTensor, Tensor] = {}
    with wrap_errors(CheckpointError, f"cannot load the tensors of {path}"):
        for storage, sharing in views.items():
            if storage is None or (len(sharing) == 1 and sharing[0].nbytes == storage.nbytes):
                loaded |= {entry: entry.read() for entry in sharing}
            else:  # a view of a larger storage, or of one that others view
                data = storage.read()
                loaded |= {entry: entry.view(data).clone() for entry in sharing}
    return {name: loaded[tied[name]] if name in tied else entry for name, entry in entries.items()}


def _describe(value: object) -> str:
    """Return an integer's digits, and the type's name for others: a pickle's value may be a list that holds itself many times."""
    return str(value) if type(value) is int and value.bit_length() <= MAX_SIZE_BITS else type(value).__name__
