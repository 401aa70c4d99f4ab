"""Rows that are computed from a stored map pixel by pixel, with those above and below a strip: a convolution's input."""

from __future__ import annotations

from torch import Tensor

from .feature_maps import FeatureMap


class MapRows:
    """Rows of a map, or of a function of its pixels."""

    x: FeatureMap

    def write_rows(self, first: int, last: int, out: Tensor) -> None:
        """Write rows first to last - 1 to out, ``(1, C, last - first, W)``."""
        raise NotImplementedError

    def write_haloed_rows(self, first: int, last: int, out: Tensor) -> None:
        """Write rows first - 1 to last to out, without those that lie outside the map."""
        above, below = self.x.halo(first, last)
        self.write_rows(first - above, last + below, out)


class StoredRows(MapRows):
    """Rows of a stored map."""

    def __init__(self, x: FeatureMap) -> None:
        self.x = x

    def write_rows(self, first: int, last: int, out: Tensor) -> None:
        rows = self.x.read(first, last)
        if rows.data_ptr() != out.data_ptr():  # a map that reuses the storage of x: its rows are there already
            out.copy_(rows)
