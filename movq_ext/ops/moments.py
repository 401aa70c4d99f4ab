"""The mean and the variance of each channel of a map, gathered strip by strip, and of the groups of a group norm."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ACCUMULATORS = 8192  # of each moment of a strip, unless its width is odd: they stay in the first-level cache


class Moments:
    """Running mean and sum of squared deviations of each channel, merged strip by strip in float64 (Chan et al.)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None

    def add(self, strip: Tensor) -> None:
        """Merge the values of a strip, ``(1, C, rows, W)``.

        Every channel has an accumulator for each of several columns. More columns mean fewer values in each accumulator, and so
        a smaller rounding error.
        """
        pixels = strip.permute(0, 2, 3, 1)
        rows, columns, channels = pixels.shape[1:]
        while columns % 2 == 0 and columns * channels > MAX_ACCUMULATORS:
            rows, columns = 2 * rows, columns // 2
        means, variances = (t.view(columns, channels) for t in _column_moments(pixels.reshape(rows, columns * channels)))
        deviations = means.double()
        mean = deviations.mean(0)
        squares = deviations.sub_(mean).square_().add_(variances)
        self._merge(rows * columns, mean, squares.sum(0) * rows)

    def merge(self, other: Moments) -> None:
        """Merge the values that other has seen, at least one."""
        assert other.mean is not None, "no rows were written"
        self._merge(other.count, other.mean, other.m2)

    def _merge(self, count: int, mean: Tensor, m2: Tensor) -> None:
        if self.mean is None:
            self.count, self.mean, self.m2 = count, mean, m2
            return
        total, delta = self.count + count, mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count = total

    def group_statistics(self, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """Return the mean and ``1 / sqrt(variance + eps)`` of each channel's group, ``(C,)`` in float64."""
        assert self.mean is not None, "no rows were written"
        means, squares = self.mean.view(groups, -1), self.m2.view(groups, -1)
        between, mean = torch.var_mean(means, 1, correction=0, keepdim=True)
        variance = torch.add(between, squares.mean(1, keepdim=True), alpha=1 / self.count)
        return mean.expand_as(means).flatten(), variance.add_(eps).rsqrt_().expand_as(means).flatten()


def _column_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of each column, in float32 at least. No copy of the values is made."""
    # Without running statistics in float32, the results for 16-bit values would have 16 bits. Nothing reads the running ones.
    dtype = torch.promote_types(values.dtype, torch.float32)
    running = torch.zeros(2, values.shape[1], dtype=dtype, device=values.device)
    mean, variance = torch.batch_norm_update_stats(values, running[0], running[1], momentum=0.0)
    return mean, variance
