"""Feature maps that are read and written by rows: in memory, or beyond a budget in temporary files. Each gathers its moments."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from ..ops.moments import Moments


@dataclass(frozen=True)
class Runs:
    """``count`` runs of ``size`` values, in a flat array from index ``first`` on. A run starts every ``pitch`` values."""

    first: int
    size: int
    count: int = 1
    pitch: int | None = None  # None for one run


class MemoryStorage:
    """A flat array of values in memory."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.dtype = values, values.dtype

    def read(self, runs: Runs) -> Tensor:
        """Return the values of runs, ``(count, size)``. They may be the storage itself: do not modify them."""
        if runs.pitch is None:
            return self.values[runs.first : runs.first + runs.size].unsqueeze(0)
        end = runs.first + (runs.count - 1) * runs.pitch + runs.size
        return self.values[runs.first : end].unfold(0, runs.size, runs.pitch)

    def reserve(self, runs: Runs) -> Tensor:
        """Return a contiguous buffer for the values of runs, ``(count, size)``: fill it, then call `commit`."""
        return self.read(runs) if runs.pitch is None else self.values.new_empty(runs.count, runs.size)

    def commit(self, runs: Runs, buffer: Tensor) -> None:
        """Store a buffer that `reserve` returned. In memory, one run is stored already."""
        if runs.pitch is not None:
            self.read(runs).copy_(buffer)


class FileStorage:
    """A flat array of values in a file, with the methods of `MemoryStorage`."""

    def __init__(self, file: IO[bytes], dtype: torch.dtype, device: torch.device) -> None:
        self.file, self.dtype, self.device = file, dtype, device
        self._lock = threading.Lock()  # of the file's position

    def read(self, runs: Runs) -> Tensor:
        values = torch.empty(runs.count, runs.size, dtype=self.dtype)
        with self._lock:
            for index, run in enumerate(values.view(torch.uint8).numpy()):
                self._seek(runs, index)
                received = self.file.readinto(run.data)  # type: ignore[attr-defined]
                if received != run.nbytes:
                    raise OSError(f"expected {run.nbytes} bytes in a temporary file of feature maps, got {received}")
        return values.to(self.device)

    def reserve(self, runs: Runs) -> Tensor:
        return torch.empty(runs.count, runs.size, dtype=self.dtype, device=self.device)

    def commit(self, runs: Runs, buffer: Tensor) -> None:
        with self._lock:
            for index, run in enumerate(buffer.cpu().view(torch.uint8).numpy()):
                self._seek(runs, index)
                self.file.write(run.data)

    def _seek(self, runs: Runs, index: int) -> None:
        self.file.seek((runs.first + index * (runs.pitch or 0)) * self.dtype.itemsize)


Storage = MemoryStorage | FileStorage


class FeatureMap:
    """A map ``(1, C, H, W)``, stored in channels_last. Its rows may be parts of the rows of a wider storage."""

    def __init__(self, channels: int, height: int, width: int, storage: Storage) -> None:
        self.channels, self.height, self.width, self.storage = channels, height, width, storage
        self.row_size = self.pitch = width * channels  # values of a row, and from one row's start to the next
        self.offset = 0  # of the first row in the storage
        self.moments = Moments()

    @property
    def is_compact(self) -> bool:
        """True if nothing lies between the rows."""
        return self.pitch == self.row_size

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def read(self, first: int, last: int) -> Tensor:
        """Return rows first to last - 1, ``(1, C, rows, W)``. They may be the map itself: do not modify them."""
        return self._rows(self.storage.read(self._runs(first, last)))

    def write(self, first: int, strip: Tensor) -> None:
        """Copy a strip to the rows from ``first`` on."""
        self.moments.merge(self.write_strip(first, strip))

    def write_strip(self, first: int, strip: Tensor) -> Moments:
        """Copy a strip to the rows from ``first`` on, and return its moments, see `commit_strip`."""
        return self.commit_strip(first, self.reserve(first, first + strip.shape[2]).copy_(strip))

    def reserve(self, first: int, last: int) -> Tensor:
        """Return a buffer for rows first to last - 1, ``(1, C, rows, W)`` without gaps: fill it, then call `commit`."""
        return self._rows(self.storage.reserve(self._runs(first, last)))

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
        runs = self._runs(first, first + rows.shape[2])
        self.storage.commit(runs, rows.permute(0, 2, 3, 1).reshape(runs.count, runs.size))

    def halo(self, first: int, last: int) -> tuple[int, int]:
        """Return how many rows of halo, 0 or 1, the map has above and below rows first to last - 1."""
        return int(first > 0), int(last < self.height)

    def reuse_storage(self, channels: int) -> FeatureMap:
        """Return a map of the same height and width, and at most as many channels, whose rows overwrite this map's.

        Each of its rows takes the place of this map's row with the same index, so strips may be written in any order. A row of
        this map stays readable until its successor is reserved, or stored if that has fewer channels.
        """
        assert channels <= self.channels
        return self._in_rows(channels, self.offset)

    def beside(self, channels: int) -> FeatureMap | None:
        """Return a map of the same height and width in the rest of the storage's rows, None if that is too narrow."""
        offset = self.offset + self.row_size
        return self._in_rows(channels, offset) if offset + channels * self.width <= self.pitch else None

    def _in_rows(self, channels: int, offset: int) -> FeatureMap:
        """Return a map in the rows of this map's storage."""
        other = self._with_storage(channels)
        other.pitch, other.offset = self.pitch, offset
        return other

    def _with_storage(self, channels: int) -> FeatureMap:
        return FeatureMap(channels, self.height, self.width, self.storage)

    def _runs(self, first: int, last: int) -> Runs:
        start, rows = self.offset + first * self.pitch, last - first
        return Runs(start, rows * self.row_size) if self.is_compact else Runs(start, self.row_size, rows, self.pitch)

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
        self._last_size = 0  # bytes of the last map
        self._released: Tensor | None = None  # the last released buffer, for the next map: its pages are mapped already

    def allocate(self, channels: int, height: int, width: int) -> FeatureMap:
        """Return a map ``(1, channels, height, width)`` with no rows written yet."""
        return FeatureMap(channels, height, width, self.allocate_storage(channels * height * width))

    def allocate_storage(self, count: int) -> Storage:
        """Return storage for ``count`` values."""
        size = self._last_size = count * self.dtype.itemsize
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
            values, storage.values = storage.values, self.empty(0)  # the caller may hold the map for longer
            self._used -= values.nbytes
            if values.nbytes >= self._last_size:  # a smaller one is rarely enough for the next map
                self._released = values

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
