"""Memory of each thread that its strips overwrite one after another."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .feature_maps import FeatureMap, MapStore, upcast


class StripBuffer(threading.local):
    """Memory for a strip and a copy of it in float32, in each thread. Each strip overwrites the previous one.

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
        """Return rows ``(1, C, count, W)`` of the store's dtype in float32. Wider ones are unchanged.

        The next call overwrites them, unless the store has a budget: it does not count memory that is kept.
        """
        if rows.dtype == self._upcast.dtype or self._store.budget is not None or rows.is_cuda:
            return upcast(rows)
        pixels = rows.permute(0, 2, 3, 1)
        if self._upcast.numel() < pixels.numel():
            self._upcast = self._upcast.new_empty(pixels.numel())
        return self._upcast[: pixels.numel()].view(pixels.shape).copy_(pixels).permute(0, 3, 1, 2)
