"""Causal convolution of a strip of a clip."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..model.strip_rows import TYPICAL_ROWS
from ..model.strip_spans import HALO
from ..ops.onednn import Convolution
from .causal_convolution import fold_repeated_frame

PADDING = 2  # frames before a clip that a causal convolution reads


class Tap(NamedTuple):
    """A 3x3 convolution of frames of the input, added to as many frames of the result."""

    convolution: Convolution
    first_in: int
    first_out: int
    frames: int


class CausalConvolution:
    """The convolution of a padded strip ``(1, C, 2 + T, rows + 2, W)`` in channels_last_3d, ``(1, out, T, rows, W)``.

    On a CPU, in 32 bits or more, it adds up 3x3 convolutions of frames, one for each tap in time: packed once for all strips, and
    up to three times as fast as conv3d on few rows.

    Args:
        conv: 3x3x3, as `is_plain_conv3d` allows.
        frames, width: of its input, without padding.
        repeats_first_frame: the strip's first frames repeat the next. The taps that fall on them are added up.
    """

    def __init__(self, conv: Any, frames: int, width: int, repeats_first_frame: bool) -> None:
        self.conv, self.frames, self.width = conv, frames, width
        self.taps: list[Tap] = []
        if conv.weight.device.type != "cpu" or conv.weight.itemsize < 4:
            return
        start = min(PADDING, frames) if repeats_first_frame else 0  # frames of the result before it have folded taps
        for frame in range(start):
            self._add_taps(fold_repeated_frame(conv.weight, frame), PADDING, frame, 1)
        if start < frames:
            self._add_taps(conv.weight, start, start, frames - start)

    def _add_taps(self, weight: Tensor, first_in: int, first_out: int, count: int) -> None:
        """Add the taps of ``(out, C, taps, 3, 3)``; the first convolves frames from first_in on."""
        shape = (count, weight.shape[1], TYPICAL_ROWS + HALO, self.width)
        for tap, weight_2d in enumerate(weight.unbind(2)):
            convolution = Convolution(weight_2d.contiguous(), None, (0, 1), shape, keep_weight=False)
            self.taps.append(Tap(convolution, first_in + tap, first_out, count))

    def __call__(self, padded: Tensor) -> Tensor:
        if not self.taps:
            return F.conv3d(padded, self.conv.weight, self.conv.bias, padding=(0, 0, 1))
        frames = padded[0].transpose(0, 1)
        shape = (self.frames, padded.shape[3] - HALO, padded.shape[4], self.conv.out_channels)
        out = frames.new_zeros(shape).permute(0, 3, 1, 2)
        if self.conv.bias is not None:
            out += self.conv.bias[:, None, None]
        for tap in self.taps:
            tap.convolution.add_to(out[tap.first_out :][: tap.frames], frames[tap.first_in :][: tap.frames])
        return out.transpose(0, 1)[None]
