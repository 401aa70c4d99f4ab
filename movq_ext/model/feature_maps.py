"""Feature maps that are read and written by rows: in memory, or beyond a budget in temporary files. Each gathers its moments."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from ..ops.moments import Moments


class MemoryStorage:
    """A flat array of values in memory."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.dtype = values, values.dtype

    def read(self, first: int, count: int) -> Tensor:
        """Return ``count`` values from index ``first`` on. They may be the storage itself: do not modify them."""
        return self.values[first : first + count]

    def reserve(self, first: int, count: int) -> Tensor:
        """Return a buffer for ``count`` values from index ``first`` on: fill it, then call `commit`."""
        return self.values[first : first + count]

    def commit(self, first: int, buffer: Tensor) -> None:
        """Store a buffer that `reserve` returned. In memory, it is stored already."""


class FileStorage:
    """A flat array of values in a file, with the methods of `MemoryStorage`."""

    def __init__(self, file: IO[bytes], dtype: torch.dtype, device: torch.device) -> None:
        self.file, self.dtype, self.device = file, dtype, device
        self._lock = threading.Lock()  # of the file's position

    def read(self, first: int, count: int) -> Tensor:
        values = torch.empty(count, dtype=self.dtype)
        with self._lock:
            self.file.seek(first * values.itemsize)
            received = self.file.readinto(values.view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        if received != values.nbytes:
            raise OSError(f"expected {values.nbytes} bytes in a temporary file of feature maps, got {received}")
        return values.to(self.device)

    def reserve(self, first: int, count: int) -> Tensor:
        return torch.empty(count, dtype=self.dtype, device=self.device)

    def commit(self, first: int, buffer: Tensor) -> None:
        data = buffer.cpu().view(torch.uint8).numpy().data
        with self._lock:
            self.file.seek(first * buffer.itemsize)
            self.file.write(data)


Storage = MemoryStorage | FileStorage


class FeatureMap:
    """A map ``(1, C, H, W)``, stored in channels_last."""

    first_stored = 0  # the row with which the storage starts

    def __init__(self, channels: int, height: int, width: int, storage: Storage) -> None:
        self.channels, self.height, self.width, self.storage = channels, height, width, storage
        self.row_size = width * channels  # values
        self.moments = Moments()
        self.reused_channels: int | None = None  # of the map whose storage this one reuses

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def read(self, first: int, last: int) -> Tensor:
        """Return rows first to last - 1, ``(1, C, rows, W)``. They may be the map itself: do not modify them."""
        return self._rows(self.storage.read(first * self.row_size, (last - first) * self.row_size))

    def write(self, first: int, strip: Tensor) -> None:
        """Copy a strip to the rows from ``first`` on."""
        self.moments.merge(self.write_strip(first, strip))

    def write_strip(self, first: int, strip: Tensor) -> Moments:
        """Copy a strip to the rows from ``first`` on, and return its moments, see `commit_strip`."""
        return self.commit_strip(first, self.reserve(first, first + strip.shape[2]).copy_(strip))

    def reserve(self, first: int, last: int) -> Tensor:
        """Return a buffer for rows first to last - 1, ``(1, C, rows, W)``: fill it, then call `commit`."""
        return self._rows(self.storage.reserve(first * self.row_size, (last - first) * self.row_size))

    def commit(self, first: int, rows: Tensor) -> None:
        """Store rows that `reserve` returned, and add them to the moments."""
        self.moments.merge(self.commit_strip(first, rows))

    def commit_strip(self, first: int, rows: Tensor) -> Moments:
        """Store rows that `reserve` returned, and return their moments, for `complete`. Threads may store rows at once."""
        moments = Moments()
        moments.add(rows)
        self.commit_unmeasured(first, rows)
        return moments

    def complete(self, moments: Sequence[Moments]) -> None:
        """Merge the moments of all strips, in this order. All rows must be stored."""
        for strip in moments:
            self.moments.merge(strip)

    def commit_unmeasured(self, first: int, rows: Tensor) -> None:
        """Store rows that `reserve` returned, of a map that no norm reads."""
        self.storage.commit(first * self.row_size, rows.permute(0, 2, 3, 1).flatten())

    def halo(self, first: int, last: int) -> tuple[int, int]:
        """Return how many rows of halo, 0 or 1, the map has above and below rows first to last - 1."""
        return int(first > 0), int(last < self.height)

    def reuse_storage(self, channels: int) -> FeatureMap:
        """Return a map of the same height and width, and at most as many channels, that reuses this map's storage row by row.

        A row of this map stays readable until the new map reserves its row with the same index.
        """
        assert channels <= self.channels
        successor = self._with_storage(channels)
        successor.reused_channels = self.channels
        return successor

    def _with_storage(self, channels: int) -> FeatureMap:
        return FeatureMap(channels, self.height, self.width, self.storage)

    def _rows(self, values: Tensor) -> Tensor:
        return values.view(1, -1, self.width, self.channels).permute(0, 3, 1, 2)


class MapStore:
    """Allocates feature maps in memory up to a budget, and beyond it in temporary files. Closes the files as a context manager.

    Args:
        dtype, device: of the maps.
        budget: bytes of maps in memory; None for no limit.
        folder: where to create the temporary files; the system's default if None.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, budget: int | None = None, folder: str | None = None) -> None:
        self.dtype, self.device, self.budget, self.folder = dtype, device, budget, folder
        self._used = 0  # bytes
        self._files: list[IO[bytes]] = []
        self._released: Tensor | None = None  # the last released buffer, for the next map: its pages are mapped already

    def allocate(self, channels: int, height: int, width: int) -> FeatureMap:
        """Return a map ``(1, channels, height, width)`` with no rows written yet."""
        return FeatureMap(channels, height, width, self.allocate_storage(channels * height * width))

    def allocate_storage(self, count: int) -> Storage:
        """Return storage for ``count`` values."""
        size = count * self.dtype.itemsize
        if self.budget is not None and self._used + size > self.budget:
            self._files.append(tempfile.TemporaryFile(dir=self.folder))
            return FileStorage(self._files[-1], self.dtype, self.device)
        values, self._released = self._released, None
        if values is None or size > values.nbytes:
            values = None  # free the buffer before allocating more
            values = self.empty(count)
        self._used += values.nbytes
        return MemoryStorage(values)

    def release(self, map_: FeatureMap) -> None:
        """Free the storage of a map, which its successors share."""
        storage = map_.storage
        if isinstance(storage, FileStorage):
            self._files.remove(storage.file)
            storage.file.close()
        else:
            self._used -= storage.values.nbytes
            self._released = storage.values

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor with the maps' dtype and device."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def __enter__(self) -> MapStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            file.close()


def upcast(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
