"""How much memory a decode or an encode in strips takes, and how strips and threads share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.thread_pool import num_workers, run_in_worker
from ..ops.winograd import WINOGRAD_BYTES
from .feature_maps import FeatureMap
from .strip_checks import LayeredNetwork, has_thread_safe_layers
from .strip_spans import HALO, MIN_ROWS, Span, divide_rows

# Of the strips that threads compute at once, without a memory limit. A larger map allows as much as it takes itself.
MAX_STRIPS_BYTES = 512 << 20
MIN_THREADED_VALUES = 1 << 18  # in all tensors of a map: for less work, threads would take longer to meet than they save
# Number of values in all tensors of a strip, per pixel and channel of its map.
ATTENTION_VALUES = 8
UPSAMPLE_VALUES = 10
DOWNSAMPLE_VALUES = 12  # of the smaller map
INPUT_VALUES = 3  # a copy, and its moments in float32


class WorkingMemory(NamedTuple):
    """Bytes for the tensors of a decode or an encode, besides weights, latents and images.

    Attributes:
        strip: approximate size of all tensors of the strips that are computed at once. If ``maps`` is None, strips of wide maps
            take more: each thread computes at least four rows, and all of them take up to MAX_STRIPS_BYTES or the map's size.
        winograd: for a Winograd convolution, see `winograd_is_faster`.
        maps: for the maps between layers, see `MapStore`; None for no limit.
        workers: threads that share it, each with strips of its own.
    """

    strip: int
    winograd: int = 0
    maps: int | None = None
    workers: int = 1

    def for_network(self, network: LayeredNetwork) -> WorkingMemory:
        """Return this memory for one thread if the network has layers that are not known to be thread-safe."""
        return self if has_thread_safe_layers(network) else self._replace(workers=1)

    def run(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``compute()``. If threads share this memory, only strips are divided between them: every operator has one."""
        return run_in_worker(compute) if self.workers > 1 else compute()

    def spans(self, x: FeatureMap, values_per_pixel: int) -> list[Span]:
        """Divide x into strips: return (first, last) for each, which has rows first to last - 1.

        Args:
            x: the map.
            values_per_pixel: number of values in all tensors of a strip, per pixel of x.
        """
        workers = self.strip_workers(x, values_per_pixel)
        min_rows = MIN_ROWS if workers > 1 or self.maps is None else 1
        rows = self.strip // _row_bytes(x, values_per_pixel)
        return divide_rows(x.height, max(min_rows, rows // workers - HALO), workers)

    def strip_workers(self, x: FeatureMap, values_per_pixel: int) -> int:
        """Return how many threads compute strips of x: as many as there is memory for the smallest strips."""
        if x.height * x.width * values_per_pixel < MIN_THREADED_VALUES:
            return 1
        limit = self.strip
        if self.maps is None:  # whole maps are in memory
            limit = max(limit, MAX_STRIPS_BYTES, x.height * x.row_size * x.dtype.itemsize)
        return max(1, min(self.workers, limit // ((MIN_ROWS + HALO) * _row_bytes(x, values_per_pixel))))


def _row_bytes(x: FeatureMap, values_per_pixel: int) -> int:
    return values_per_pixel * x.width * x.dtype.itemsize


# A strip of 128 channels in float32 has 64 rows of 256 pixels.
CPU_MEMORY = WorkingMemory(strip=64 << 20, winograd=WINOGRAD_BYTES)


def cpu_memory(dtype: torch.dtype) -> WorkingMemory:
    """Return CPU_MEMORY for maps in this dtype, shared by as many threads as PyTorch has now. 16-bit strips have as many rows."""
    strip = CPU_MEMORY.strip * min(dtype.itemsize, 4) // 4
    return CPU_MEMORY._replace(strip=strip, workers=num_workers())


def convolution_values(channels: int, out_channels: int) -> int:
    """Return the number of values in all tensors of a convolution, per pixel of a strip.

    Input channels: the strip, its normalised copy, float32 copies of both, and scales. Output channels: the result and the
    residual.
    """
    return 5 * channels + 2 * out_channels
