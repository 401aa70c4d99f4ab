"""Rows of a plain 3x3 convolution of a map that is upsampled by two (nearest), computed one strip at a time."""

from __future__ import annotations

from torch import Tensor, nn

from .. import profiling
from ..ops.onednn import Convolution
from ..ops.thread_pool import run_in_threads
from ..ops.upsampling import fold_window_row
from ..ops.winograd_upsampling import WinogradUpsampling, winograd_upsampling_is_faster
from .feature_maps import FeatureMap
from .map_rows import StoredRows
from .strip_buffer import StripBuffer
from .strip_rows import TYPICAL_ROWS, RowSource, cast_parameters, haloed_rows


def upsampled_rows(conv: nn.Conv2d, x: FeatureMap, buffer: StripBuffer, threads: int = 1) -> RowSource:
    """Return the rows of a plain 3x3 convolution of x, upsampled.

    Rows first to last - 1 of x make rows 2 * first to 2 * last - 1 of the large map, ``(1, C, 2 * (last - first), 2 * W)``:
    ``write_rows(first, last, out)`` writes these.

    Args:
        conv: the convolution.
        x: the small map.
        buffer: holds a strip of it, and the limit for a Winograd convolution.
        threads: how many compute strips.
    """
    if winograd_upsampling_is_faster(conv.weight, x.height * x.width, buffer.winograd_bytes):
        return WinogradRows(conv, x, buffer, threads)
    return WindowRows(conv, x, buffer, threads)


class WinogradRows:
    """`upsampled_rows` by `WinogradUpsampling`."""

    def __init__(self, conv: nn.Conv2d, x: FeatureMap, buffer: StripBuffer, threads: int = 1) -> None:
        self.conv, self.x = conv, x
        self.convolution = WinogradUpsampling(conv.weight, conv.bias, buffer.winograd_bytes, threads)

    def write_rows(self, first: int, last: int, out: Tensor) -> None:
        above, below = self.x.halo(first, last)
        with profiling.layer_range(self.conv):
            self.convolution.write_to(out, self.x.read(first - above, last + below), (above, below))


class WindowRows:
    """`upsampled_rows` by convolutions of windows with folded weights, see `fold_window_row`.

    From each window of 2x2 pixels, the large map's four pixels around the window's centre are computed: the upper two by one
    convolution, the lower two by another.

    Args:
        conv: the convolution.
        x: the small map.
        buffer: holds a strip of it.
        threads: how many fold and pack the weights of both convolutions.
    """

    def __init__(self, conv: nn.Conv2d, x: FeatureMap, buffer: StripBuffer, threads: int = 1) -> None:
        self.conv, self.x, self.buffer = conv, x, buffer
        self.packed = run_in_threads(self._pack_row, (0, 1), threads)

    def write_rows(self, first: int, last: int, out: Tensor) -> None:
        height, width, channels = last - first, self.x.width, self.conv.out_channels
        strip = haloed_rows(StoredRows(self.x), first, last, self.buffer)
        windows = strip.new_empty(height, width + 1, 2, channels)
        pixels = out.permute(0, 2, 3, 1).view(height, 2, 2 * width, channels)
        for row, convolution in enumerate(self.packed):
            with profiling.layer_range(self.conv):
                convolution.write_to(windows.flatten(2).permute(2, 0, 1)[None], strip[:, :, 1 - row : 2 - row + height])
            # A window is centred on the corner of four pixels, so the first and the last pixel of a row lie outside the map.
            # Its upper pixels are the lower ones of the rows above its centre.
            pixels[:, 1 - row] = windows.flatten(1, 2)[:, 1:-1]

    def _pack_row(self, row: int) -> Convolution:
        """Return the convolution of the upper (0) or lower (1) pixels of each window."""
        bias = None if self.conv.bias is None else self.conv.bias.repeat(2)
        weight, bias = cast_parameters(fold_window_row(self.conv.weight, row), bias, self.x.dtype)
        typical_input = (1, self.x.channels, min(self.x.height, TYPICAL_ROWS) + 1, self.x.width)
        return Convolution(weight, bias, (0, 1), typical_input, keep_weight=weight.dtype != self.x.dtype)
