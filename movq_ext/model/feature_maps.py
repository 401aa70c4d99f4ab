"""Feature maps that are written and read by rows, each with the moments of its channels; in memory, or in temporary files beyond
a budget."""

from __future__ import annotations

import tempfile
from types import TracebackType
from typing import IO

import torch
from torch import Tensor


class Moments:
    """Mean and sum of squared distances of every channel, gathered strip by strip (Chan et al.) in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None

    def add(self, strip: Tensor) -> None:
        """strip: ``(1, C, rows, W)``."""
        tokens = widened(strip.permute(0, 2, 3, 1).reshape(-1, strip.shape[1]))
        count, mean = tokens.shape[0], tokens.mean(0)
        m2 = (tokens - mean).square_().sum(0).double()
        mean = mean.double()
        if self.mean is None:
            self.count, self.mean, self.m2 = count, mean, m2
            return
        total, delta = self.count + count, mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count = total

    def of_groups(self, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal standard deviation of every channel's group, ``(C,)`` float64 each."""
        assert self.mean is not None, "moments of a map that was not written"
        means = self.mean.unflatten(0, (groups, -1))
        mean = means.mean(1, keepdim=True)
        variance = ((self.m2 / self.count).unflatten(0, (groups, -1)) + (means - mean).square()).mean(1, keepdim=True)
        return mean.expand_as(means).flatten(), (variance + eps).rsqrt().expand_as(means).flatten()


class FeatureMap:
    """``(1, C, H, W)``, in channels_last wherever it is kept."""

    def __init__(self, channels: int, height: int, width: int, kept: Kept) -> None:
        self.channels, self.height, self.width, self._kept = channels, height, width, kept
        self.moments = Moments()

    def read(self, first: int, last: int) -> Tensor:
        """Rows first to last - 1, ``(1, C, rows, W)``. To be left as they are: they may be the map itself."""
        return self._rows(self._kept.read(first * self._row, (last - first) * self._row))

    def write(self, first: int, strip: Tensor) -> None:
        """Rows from first on."""
        self.keep(first, self.place(first, first + strip.shape[2]).copy_(strip))

    def place(self, first: int, last: int) -> Tensor:
        """Where to make rows first to last - 1, ``(1, C, rows, W)``, before `keep`."""
        return self._rows(self._kept.place(first * self._row, (last - first) * self._row))

    def keep(self, first: int, rows: Tensor) -> None:
        """What was made in its place; its part of the moments is added."""
        self.moments.add(rows)
        self._kept.keep(first * self._row, rows.permute(0, 2, 3, 1).flatten())

    def successor(self, channels: int) -> FeatureMap:
        """A map of as many pixels and at most as many channels that takes this one's place row by row: row r of this map can be
        read until row r of that one is written."""
        assert channels <= self.channels
        return FeatureMap(channels, self.height, self.width, self._kept)

    @property
    def _row(self) -> int:
        return self.width * self.channels

    def _rows(self, values: Tensor) -> Tensor:
        return values.view(1, -1, self.width, self.channels).permute(0, 3, 1, 2)


class Kept:
    """A row of values in memory."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def read(self, first: int, count: int) -> Tensor:
        return self.values[first : first + count]

    def place(self, first: int, count: int) -> Tensor:
        """Where to put values that are to be kept from first on."""
        return self.values[first : first + count]

    def keep(self, first: int, place: Tensor) -> None:
        pass


class Filed(Kept):
    """A row of values in a file."""

    def __init__(self, file: IO[bytes], like: Tensor) -> None:
        self.file, self.like = file, like

    def read(self, first: int, count: int) -> Tensor:
        values = torch.empty(count, dtype=self.like.dtype)
        self.file.seek(first * values.itemsize)
        if self.file.readinto(values.view(torch.uint8).numpy().data) != values.nbytes:  # type: ignore[attr-defined]
            raise OSError("a temporary file of decode_tiled is shorter than what was written to it")
        return values.to(self.like.device)

    def place(self, first: int, count: int) -> Tensor:
        return self.like.new_empty(count)

    def keep(self, first: int, place: Tensor) -> None:
        self.file.seek(first * place.itemsize)
        self.file.write(place.cpu().view(torch.uint8).numpy().data)


class MapStore:
    """Makes maps: at most ``budget`` bytes of them in memory (None: all), the others in temporary files in ``folder``."""

    def __init__(self, like: Tensor, budget: int | None = None, folder: str | None = None) -> None:
        self.like, self.budget, self.folder = like.new_empty(0), budget, folder
        self._used = 0
        self._files: list[IO[bytes]] = []
        self._spare: Tensor | None = None  # of the last map that was dropped: memory that the system need not give again

    def new(self, channels: int, height: int, width: int) -> FeatureMap:
        return FeatureMap(channels, height, width, self._keep(channels * height * width))

    def drop(self, map_: FeatureMap) -> None:
        """The map, and every successor of it, is not needed any more."""
        kept = map_._kept
        if isinstance(kept, Filed):
            self._files.remove(kept.file)
            kept.file.close()
        else:
            self._used -= kept.values.nbytes
            self._spare = kept.values

    def _keep(self, count: int) -> Kept:
        size = count * self.like.itemsize
        if self.budget is not None and self._used + size > self.budget:
            self._files.append(tempfile.TemporaryFile(dir=self.folder))
            return Filed(self._files[-1], self.like)
        values, self._spare = self._spare, None
        if values is None or size > values.nbytes or (self.budget is not None and self._used + values.nbytes > self.budget):
            values = None  # given back before more is asked for
            values = self.like.new_empty(count)
        self._used += values.nbytes
        return Kept(values)

    def __enter__(self) -> MapStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            file.close()


def widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
