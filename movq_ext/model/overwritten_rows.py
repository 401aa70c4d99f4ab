"""Normalised rows of a map that a convolution's strips overwrite with their results, in any order.

A strip also reads the rows above and below it, which belong to its neighbours. Each of these border rows is read once and
overwritten once, by two threads. If it is overwritten first, its values are kept until they are read.
"""

from __future__ import annotations

import threading

from torch import Tensor, nn

from .feature_maps import FeatureMap
from .strip_buffer import StripBuffer
from .strip_norms import NormalisedRows

Border = tuple[int, int]  # a strip's first or last row, and the neighbour's row next to it


class OverwrittenRows(NormalisedRows):
    """`NormalisedRows` of a map whose strips are overwritten after `keep_borders`. Each strip is read once."""

    def __init__(self, norm: nn.Module, x: FeatureMap, zq: Tensor | None, activation: str | None, buffer: StripBuffer) -> None:
        super().__init__(norm, x, zq, activation, buffer)
        self._lock = threading.Lock()
        self._were_read: set[Border] = set()
        self._kept: dict[Border, Tensor] = {}

    def write_haloed_rows(self, first: int, last: int, out: Tensor) -> None:
        above, below = self.x.halo(first, last)
        inside_last = out.shape[2] - below
        out[:, :, above:inside_last] = self.x.read(first, last)
        with self._lock:  # no neighbour may overwrite its border row while it is copied
            if above:
                out[:, :, :above] = self._read_border((first - 1, first))
            if below:
                out[:, :, inside_last:] = self._read_border((last, last - 1))
        self.normalise(out, first - above, last + below, out)

    def keep_borders(self, first: int, last: int) -> None:
        """Keep what neighbours will read of rows first to last - 1. Afterwards, the rows may be overwritten."""
        above, below = self.x.halo(first, last)
        borders = [(first, first - 1)] * above + [(last - 1, last)] * below
        with self._lock:
            for border in borders:
                if border in self._were_read:
                    self._were_read.remove(border)
                else:
                    self._kept[border] = self.x.read(border[0], border[0] + 1).clone()

    def _read_border(self, border: Border) -> Tensor:
        if border in self._kept:
            return self._kept.pop(border)
        self._were_read.add(border)
        return self.x.read(border[0], border[0] + 1)
