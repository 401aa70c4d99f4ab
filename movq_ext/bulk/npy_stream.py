"""Read arrays from untrusted ``.npz`` files: no pickles, and memory that follows the file's real size."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from ..io.files import MAX_SHOWN_CHARACTERS, max_expanded_bytes, printable, wrap_errors
from .shards import ShardError

MAX_ARRAY_BYTES = 256 << 20  # read at once
COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what NumPy writes
NPY_VERSION = (1, 0)  # later ones are for structured types; their headers may claim any size


@dataclass(frozen=True)
class NpyStream:
    """An array that is read whole, or item by item along its first axis."""

    name: str  # shortened, for errors
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    column_major: bool
    file: IO[bytes]

    def read(self) -> np.ndarray:
        """Return the whole array. Raises ShardError if it has more than MAX_ARRAY_BYTES."""
        return self._read(self.shape, "F" if self.column_major else "C")

    def items(self) -> Iterator[np.ndarray]:
        """Yield the items along the first axis. Only one is in memory, unless the array is in column-major order."""
        if self.column_major:
            yield from self.read()
        else:
            for _ in range(self.shape[0]):
                yield self._read(self.shape[1:], "C")

    def _read(self, shape: tuple[int, ...], order: Any) -> np.ndarray:
        size = math.prod(shape) * self.dtype.itemsize
        if size > MAX_ARRAY_BYTES:
            raise ShardError(f"{self.name}: expected at most {MAX_ARRAY_BYTES} bytes at once, got shape {shape} of {self.dtype}")
        with wrap_errors(ShardError, f"{self.name} is damaged"):
            return np.frombuffer(self.file.read(size), self.dtype).reshape(shape, order=order)


@contextmanager
def open_npy(archive: zipfile.ZipFile, key: str) -> Iterator[NpyStream]:
    """Open an array of an ``.npz`` file. Raises ShardError if it is damaged, an object array or expands too much."""
    name = printable(key, MAX_SHOWN_CHARACTERS)
    with wrap_errors(ShardError, f"{name} is damaged"):
        info = archive.getinfo(f"{key}.npy")
        if info.compress_type not in COMPRESSION or info.file_size > max_expanded_bytes(info.compress_size):
            found = f"{info.compress_size} bytes that expand to {info.file_size} with method {info.compress_type}"
            raise ShardError(f"{name}: expected at most {max_expanded_bytes(info.compress_size)} bytes of DEFLATE, got {found}")
        file = archive.open(info)
    with file:
        with wrap_errors(ShardError, f"{name} is damaged"):
            if (version := np.lib.format.read_magic(file)) != NPY_VERSION:
                raise ShardError(f"{name}: expected .npy version {NPY_VERSION}, got {version}")
            shape, column_major, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject or min(shape, default=1) < 1 or not dtype.itemsize:
                raise ShardError(f"{name}: expected an array of numbers or text that is not empty, got {dtype} of shape {shape}")
            size = math.prod(shape) * dtype.itemsize
            if size != info.file_size - file.tell():
                raise ShardError(f"{name} is damaged: expected {size} bytes for {dtype} of shape {shape}")
        yield NpyStream(name, shape, dtype, column_major, file)
