"""Memory of each thread that its strips overwrite one after another."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .feature_maps import FeatureMap, MapStore


class StripBuffer(threading.local):
    """Memory for one strip in each thread. Each strip overwrites the previous one, so the memory stays in the cache.

    Args:
        store: allocates the memory.
        winograd_bytes: for a Winograd convolution of all threads, besides the strips.
        threads: how many compute strips.
    """

    def __init__(self, store: MapStore, winograd_bytes: int, threads: int = 1) -> None:
        self.winograd_bytes, self.threads = winograd_bytes, threads
        self._store, self._values = store, store.empty(0)
        self._upcast = self._values.to(torch.promote_types(store.dtype, torch.float32))

    def rows(self, x: FeatureMap, count: int) -> Tensor:
        """Return uninitialised memory for ``count`` rows of a map like x, ``(1, C, count, W)``."""
        size = count * x.row_size
        if self._values.numel() < size:
            self._values = self._store.empty(size)
        return self._values[:size].view(1, count, x.width, x.channels).permute(0, 3, 1, 2)

    def upcast(self, rows: Tensor) -> Tensor:
        """Return rows ``(1, C, count, W)`` in float32, in memory that the next call overwrites. Wider ones are unchanged."""
        if rows.dtype == self._upcast.dtype:
            return rows
        pixels = rows.permute(0, 2, 3, 1)
        if self._upcast.numel() < pixels.numel():
            self._upcast = self._upcast.new_empty(pixels.numel())
        return self._upcast[: pixels.numel()].view(pixels.shape).copy_(pixels).permute(0, 3, 1, 2)
