"""Sources of rows: stored, pointwise or convolved, computed one strip at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .. import profiling
from ..ops.onednn import Convolution
from ..ops.winograd import WinogradConvolution, winograd_is_faster
from .feature_maps import FeatureMap
from .fusion import is_plain_conv, is_plain_conv1x1
from .map_rows import MapRows
from .strip_buffer import StripBuffer
from .strip_spans import HALO, Span

TYPICAL_ROWS = 32  # of a strip, used to pack weights


class RowSource(Protocol):
    """Computes rows of a map on demand."""

    def write_rows(self, first: int, last: int, out: Tensor) -> None:
        """Write rows first to last - 1 to out, ``(1, C, last - first, W)``."""
        ...


class Pointwise:
    """A 1x1 convolution of strips. On a CPU, a plain one is a matrix product: faster than PyTorch's convolution in one thread.

    Args:
        layer: any other layer is called.
        dtype: of the strips.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self.layer = layer
        self.weight: Tensor | None = None  # (in, out)
        if is_plain_conv1x1(layer) and layer.weight.device.type == "cpu":
            weight, self.bias = cast_parameters(layer.weight, layer.bias, dtype)
            self.weight = weight.flatten(1).t()

    def __call__(self, strip: Tensor) -> Tensor:
        """Return the layer's result for ``(1, C, rows, W)``."""
        if self.weight is None:
            return cast(Tensor, self.layer(strip))
        out = strip.new_empty(1, *strip.shape[2:], self.weight.shape[1]).permute(0, 3, 1, 2)
        self.write_to(out, strip)
        return out

    def write_to(self, out: Tensor, strip: Tensor) -> None:
        """Write the layer's result to out, in channels_last without gaps."""
        if self.weight is None:
            out.copy_(self(strip))
            return
        pixels = strip.permute(0, 2, 3, 1).flatten(0, 2)
        results = out.permute(0, 2, 3, 1).view(-1, out.shape[1])
        with profiling.layer_range(self.layer):
            if self.bias is None:
                torch.mm(pixels, self.weight, out=results)
            else:
                torch.addmm(self.bias, pixels, self.weight, out=results)


class PointwiseRows:
    """Rows of a 1x1 convolution of a map."""

    def __init__(self, conv: nn.Module, x: FeatureMap) -> None:
        self.convolution, self.x = Pointwise(conv, x.dtype), x

    def write_rows(self, first: int, last: int, out: Tensor) -> None:
        self.convolution.write_to(out, self.x.read(first, last))


class ConvolvedRows:
    """Rows of a 3x3 convolution of a source's rows.

    Args:
        conv: the convolution.
        source: its input.
        buffer: holds a strip of the input.
        spans: the strips that will be computed, which decide whether a Winograd convolution is faster; if empty, it is direct.
        packed: what `pack_direct` returned for the convolution.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        source: MapRows,
        buffer: StripBuffer,
        spans: Sequence[Span] = (),
        packed: Convolution | None = None,
    ) -> None:
        self.conv, self.source, self.buffer = conv, source, buffer
        self.packed: Convolution | WinogradConvolution | None = packed
        if packed is not None or not is_plain_conv(conv):
            return
        x = source.x
        if winograd_is_faster(conv.weight, _sizes(spans, x), buffer.winograd_bytes):
            self.packed = WinogradConvolution(conv.weight, conv.bias, buffer.winograd_bytes, buffer.threads)
        else:
            self.packed = _pack(conv, x)

    def write_rows(self, first: int, last: int, out: Tensor) -> None:
        if self.packed is None:
            self.add_rows(first, last, out.zero_())
            return
        strip = haloed_rows(self.source, first, last, self.buffer)
        with profiling.layer_range(self.conv):
            self.packed.write_to(out, strip)

    def add_rows(self, first: int, last: int, out: Tensor) -> None:
        """Add rows first to last - 1 to out."""
        strip = haloed_rows(self.source, first, last, self.buffer)
        if self.packed is not None:
            with profiling.layer_range(self.conv):
                self.packed.add_to(out, strip)
            return
        # The module pads its input: pass only rows of the map, and drop output rows that saw padding instead of neighbours.
        above, below = self.source.x.halo(first, last)
        inside = strip[:, :, 1 - above : strip.shape[2] - 1 + below]
        convolved = self.conv(inside.clone())  # a hook may keep its input, and the buffer is reused
        out.add_(convolved[:, :, above : convolved.shape[2] - below])


def pack_direct(conv: nn.Conv2d, x: FeatureMap, spans: Sequence[Span], winograd_bytes: int) -> Convolution | None:
    """Return the direct convolution of maps as high and wide as x, None if it is modified or Winograd's method is faster.

    Args:
        conv: the convolution.
        x: the map.
        spans, winograd_bytes: see `ConvolvedRows`.
    """
    if not is_plain_conv(conv) or winograd_is_faster(conv.weight, _sizes(spans, x), winograd_bytes):
        return None
    return _pack(conv, x)


def _sizes(spans: Sequence[Span], x: FeatureMap) -> list[tuple[int, int]]:
    """Return the rows and columns of each strip."""
    return [(last - first, x.width) for first, last in spans]


def _pack(conv: nn.Conv2d, x: FeatureMap) -> Convolution:
    typical_input = (1, conv.in_channels, min(x.height, TYPICAL_ROWS) + HALO, x.width)
    return Convolution(*cast_parameters(conv.weight, conv.bias, x.dtype), (0, 1), typical_input)


def cast_parameters(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return a convolution's parameters. Under autocast, cast them to the dtype of its maps once, not for every strip."""
    if not torch.is_autocast_enabled(weight.device.type):
        return weight, bias
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def haloed_rows(source: MapRows, first: int, last: int, buffer: StripBuffer) -> Tensor:
    """Return rows first - 1 to last of a source, written to the buffer. Rows outside the map are zero."""
    above, below = source.x.halo(first, last)
    strip = buffer.rows(source.x, last - first + HALO)
    source.write_haloed_rows(first, last, strip[:, :, 1 - above : strip.shape[2] - 1 + below])
    if not above:
        strip[:, :, 0] = 0
    if not below:
        strip[:, :, -1] = 0
    return strip
