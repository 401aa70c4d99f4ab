"""The decoder's layers, strip by strip: the working memory is that of a strip, and nothing is computed otherwise than for the
whole map.

A convolution's strip takes one more row of its input on either side; group norm's mean and variance come from the moments that
every map gathers while it is written; attention keeps the keys and values of all positions and walks over queries. So, unlike
tiles that are decoded apart and blended, strips leave no seams: the result is that of decoding whole, up to rounding.

On a CPU this is also the fast way: a strip is normalised, convolved, added to and measured while it is in the cache, and no map
is written but the layers' results.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import profiling
from ..ops.functional import attention
from ..ops.native import is_power_of_two_ratio, scale_by_cells
from ..ops.onednn import Convolution
from .feature_maps import FeatureMap, MapStore, widened
from .fusion import fold_windows, is_plain_conv, is_plain_conv3x3, is_unmodified
from .layers import AttnBlock, ResnetBlock, SpatialNorm, Upsample, is_plain_network

STRIP_BYTES = 32 << 20  # of a strip's tensors together at the most: 32 rows of 256 pixels with 128 channels in float32
HALO = 2  # rows that a strip has beyond those it makes
Rows = Callable[[int, int, Tensor], object]  # makes rows first to last - 1 of something, in or on top of a tensor
# Of rows first to last - 1 in parts: each with its scale and shift.
Modulated = Callable[[int, int], Iterable[tuple[int, int, Tensor, Tensor]]]


def decode_in_strips(
    decoder: Any, z: Tensor, zq: Tensor, working: int, budget: int | None = None, folder: str | None = None
) -> Tensor:
    """What a MOVQDecoder makes of z and zq, image by image and without gradients; see Strips and MapStore for the bytes."""
    if computes_in_float32(decoder, z):
        return decode_in_strips(*in_float32(decoder, z, zq), working, budget, folder).half()
    check_decoder(decoder)
    images = []
    for image, image_zq in zip(z.split(1), zq.contiguous(memory_format=torch.channels_last).split(1), strict=True):
        with MapStore(z, budget, folder) as store:
            images.append(Strips(store, image_zq, working).decode(decoder, image))
    return torch.cat(images)


def computes_in_float32(decoder: Any, z: Tensor) -> bool:
    """Of float16 on a CPU: more exact and, as oneDNN has it, some fifty times as fast."""
    return z.dtype == torch.float16 and z.device.type == "cpu" and is_plain_network(decoder)


def in_float32(decoder: Any, z: Tensor, zq: Tensor) -> tuple[Any, Tensor, Tensor]:
    return copy.deepcopy(decoder).float(), z.float(), zq.float()


class Strips:
    """Runs layers on the maps of one image, in strips whose tensors take about ``working`` bytes together.

    Args:
        store: makes the maps.
        zq: ``(1, zq_ch, h, w)``, what the norms are conditioned on.
        working: bytes.
    """

    def __init__(self, store: MapStore, zq: Tensor, working: int) -> None:
        self.store, self.zq, self.working = store, zq, working
        self._memory = store.like.new_empty(0)

    def decode(self, decoder: Any, z: Tensor) -> Tensor:
        """A MOVQDecoder's image of z, ``(1, z_channels, h, w)``."""
        h = self.first(decoder.conv_in, z)
        for _, layer, _ in decoder.steps():
            h = self.then(layer, h)
        return self.rows(h) if decoder.give_pre_end else self.last(decoder.norm_out, decoder.conv_out, h)

    def first(self, conv: nn.Conv2d, z: Tensor) -> FeatureMap:
        """conv(z)."""
        source = self.store.new(*z.shape[1:])
        source.write(0, z)
        return self._convolve(source, self._copied(source), conv, self.store.new(conv.out_channels, *z.shape[2:]))

    def then(self, layer: nn.Module, x: FeatureMap) -> FeatureMap:
        """layer(x), for which x is given up."""
        with profiling.layer_range(layer):
            if isinstance(layer, ResnetBlock):
                return self._resnet_block(layer, x)
            if isinstance(layer, AttnBlock):
                return self._attn_block(layer, x)
            return self._upsample(cast(Upsample, layer), x)

    def rows(self, x: FeatureMap) -> Tensor:
        """x, in NCHW."""
        return x.read(0, x.height).contiguous()

    def last(self, norm: nn.Module, conv: nn.Conv2d, x: FeatureMap) -> Tensor:
        """conv(silu(norm(x))), ``(1, conv.out_channels, H, W)``."""
        out = self.store.like.new_empty(1, conv.out_channels, x.height, x.width)
        add = self._convolution(conv, x, self._normalised(norm, x, "silu"))
        for first, last in self._spans(x, convolution_values(x.channels, conv.out_channels)):
            rows = out.new_zeros(1, last - first, x.width, conv.out_channels).permute(0, 3, 1, 2)
            add(first, last, rows)
            out[:, :, first:last] = rows
        return out

    # --- Layers

    def _resnet_block(self, block: ResnetBlock, x: FeatureMap) -> FeatureMap:
        h = self._convolve(
            x, self._normalised(block.norm1, x, "silu"), block.conv1, self.store.new(block.out_channels, x.height, x.width)
        )
        in_place = block.out_channels <= block.in_channels and not hasattr(block, "conv_shortcut")
        out = x.successor(block.out_channels) if in_place else self.store.new(block.out_channels, x.height, x.width)
        self._convolve(h, self._normalised(block.norm2, h, "silu"), block.conv2, out, self._shortcut(block, x))
        self.store.drop(h)
        if not in_place:
            self.store.drop(x)
        return out

    def _shortcut(self, block: ResnetBlock, x: FeatureMap) -> Rows:
        if hasattr(block, "conv_shortcut"):
            add = self._convolution(block.conv_shortcut, x, self._copied(x))
            return lambda first, last, out: add(first, last, out.zero_())
        if hasattr(block, "nin_shortcut"):
            return lambda first, last, out: out.copy_(block.nin_shortcut(x.read(first, last)))
        return self._copied(x)

    def _attn_block(self, block: AttnBlock, x: FeatureMap) -> FeatureMap:
        normalise = self._normalised(block.norm, x, None)
        k, v = self._keys_and_values(block, x, normalise)
        out = x.successor(x.channels)
        for first, last in self._spans(x, 8 * x.channels):
            n = self._strip(x, last - first)
            normalise(first, last, n)
            attended = (
                attention(_projected(block.q, n), k, v).flatten(0, 2).unflatten(0, (1, last - first, x.width)).permute(0, 3, 1, 2)
            )
            out.write(first, block.proj_out(attended).add_(x.read(first, last)))
        return out

    def _keys_and_values(self, block: AttnBlock, x: FeatureMap, normalise: Rows) -> tuple[Tensor, Tensor]:
        """Of all positions, ``(1, 1, H * W, C)`` each."""
        k, v = (self.store.like.new_empty(1, 1, x.height * x.width, x.channels) for _ in range(2))
        for first, last in self._spans(x, 8 * x.channels):
            n = self._strip(x, last - first)
            normalise(first, last, n)
            for layer, whole in ((block.k, k), (block.v, v)):
                whole[:, :, first * x.width : last * x.width] = _projected(layer, n)
        return k, v

    def _upsample(self, layer: Upsample, x: FeatureMap) -> FeatureMap:
        out = self.store.new(x.channels, 2 * x.height, 2 * x.width)
        if layer.with_conv and is_plain_conv3x3(layer.conv):
            self._upsample_by_windows(layer, x, out)
            self.store.drop(x)
            return out
        for first, last in self._spans(x, 10 * x.channels):
            above, below = int(first > 0), int(last < x.height)
            strip = layer(x.read(first - above, last + below))
            # Rows at the ends of a haloed strip saw zeros in place of their neighbours: they are cut off.
            out.write(2 * first, strip[:, :, 2 * above : strip.shape[2] - 2 * below])
        self.store.drop(x)
        return out

    def _upsample_by_windows(self, layer: Upsample, x: FeatureMap, out: FeatureMap) -> None:
        """Every window of 2x2 pixels makes the four pixels of the large map around its middle, by one convolution."""
        size = (1, x.channels, x.height + 1, x.width)
        four = Convolution(
            fold_windows(layer.conv.weight), None if layer.conv.bias is None else layer.conv.bias.repeat(4), (0, 1), size
        )
        for first, last in self._spans(x, 10 * x.channels):
            strip, *_ = self._haloed(x, self._copied(x), first, last)
            made = self.store.like.new_zeros(1, last - first + 1, x.width + 1, 4 * x.channels).permute(0, 3, 1, 2)
            with profiling.layer_range(layer.conv):
                four.add_to(made, strip)
            made = made.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))[0]
            rows = out.place(2 * first, 2 * last)
            pixels = rows.permute(0, 2, 3, 1).view(last - first, 2, x.width, 2, x.channels)
            for down in (0, 1):
                for right in (0, 1):  # the windows of a pixel begin above or below, left or right of its cell
                    part = made[1 - down : 1 - down + last - first, 1 - right : 1 - right + x.width, down, right]
                    pixels[:, 1 - down, :, 1 - right] = part
            out.keep(2 * first, rows)

    # --- Convolutions

    def _convolve(self, x: FeatureMap, before: Rows, conv: nn.Conv2d, out: FeatureMap, start: Rows | None = None) -> FeatureMap:
        """conv(before(x)) into out, on top of what `start` puts there."""
        add = self._convolution(conv, x, before)
        for first, last in self._spans(x, convolution_values(x.channels, conv.out_channels)):
            rows = out.place(first, last)
            if start is None:
                rows.zero_()
            else:
                start(first, last, rows)
            add(first, last, rows)
            out.keep(first, rows)
        return out

    def _convolution(self, conv: nn.Conv2d, x: FeatureMap, before: Rows) -> Rows:
        """Adds rows of conv(before(x)) to what is there."""
        plain = None
        if is_plain_conv(conv):
            plain = Convolution(conv.weight, conv.bias, (0, 1), (1, x.channels, min(x.height, 32) + HALO, x.width))

        def add(first: int, last: int, out: Tensor) -> None:
            strip, above, below = self._haloed(x, before, first, last)
            if plain is None:  # it pads by itself, where strips meet too
                inside = strip[:, :, 1 - above : strip.shape[2] - 1 + below]
                out.add_(conv(inside.clone())[:, :, above : inside.shape[2] - below])  # whose hooks may keep what they are given
                return
            with profiling.layer_range(conv):
                plain.add_to(out, strip)

        return add

    def _haloed(self, x: FeatureMap, before: Rows, first: int, last: int) -> tuple[Tensor, int, int]:
        """Rows first - 1 to last of before(x), zeros where x has none; and whether it has the one above and the one below."""
        strip = self._strip(x, last - first + HALO)
        above, below = int(first > 0), int(last < x.height)
        before(first - above, last + below, strip[:, :, 1 - above : strip.shape[2] - 1 + below])
        if not above:
            strip[:, :, 0] = 0
        if not below:
            strip[:, :, -1] = 0
        return strip, above, below

    def _copied(self, x: FeatureMap) -> Rows:
        def copy(first: int, last: int, out: Tensor) -> None:
            rows = x.read(first, last)
            if rows.data_ptr() != out.data_ptr():  # a successor in x's place has them
                out.copy_(rows)

        return copy

    def _strip(self, x: FeatureMap, rows: int) -> Tensor:
        """So many rows of a map like x; every strip takes the memory of the one before, which is in the cache."""
        count = rows * x.width * x.channels
        if self._memory.numel() < count:
            self._memory = self.store.like.new_empty(count)
        return self._memory[:count].view(1, rows, x.width, x.channels).permute(0, 3, 1, 2)

    def _spans(self, x: FeatureMap, values: int) -> Iterator[tuple[int, int]]:
        """First and last row of each strip of x, for work that holds this many values for every pixel."""
        rows = max(1, self.working // (values * x.width * self.store.like.itemsize) - HALO)
        if rows < x.height:
            rows = 1 << rows.bit_length() - 1  # whole cells of zq, mostly
        for first in range(0, x.height, rows):
            yield first, min(first + rows, x.height)

    # --- Norms

    def _normalised(self, norm: nn.Module, x: FeatureMap, activation: str | None) -> Rows:
        """GroupNorm or SpatialNorm of x as ``x * scale + shift``, with a scale and a shift for every channel and cell of zq."""
        layer = norm.norm_layer if isinstance(norm, SpatialNorm) else norm
        assert isinstance(layer, nn.GroupNorm)
        mean, rstd = x.moments.of_groups(layer.num_groups, layer.eps)
        scale = rstd if layer.weight is None else rstd * layer.weight
        shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
        wide = torch.promote_types(self.store.like.dtype, torch.float32)
        scale, shift = (t.to(wide)[None, :, None, None] for t in (scale, shift))
        modulate = (
            self._modulated(norm, x, scale, shift)
            if isinstance(norm, SpatialNorm)
            else lambda first, last: [(first, last, scale, shift)]
        )

        def normalise(first: int, last: int, out: Tensor) -> None:
            values = widened(x.read(first, last))
            result = out if out.dtype == wide else values  # which is a copy then
            with profiling.layer_range(norm):
                for begin, end, scale, shift in modulate(first, last):
                    rows = slice(begin - first, end - first)
                    scale_by_cells(values[:, :, rows], scale, shift, out=result[:, :, rows])
                if activation == "silu":
                    F.silu(result, inplace=True)
                if result is not out:
                    out.copy_(result)

        return normalise

    def _modulated(self, norm: SpatialNorm, x: FeatureMap, scale: Tensor, shift: Tensor) -> Modulated:
        """``(v * scale + shift) * y + b`` as one scale and shift, for rows of x that lie in whole cells or within one."""

        def combine(y: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            y, b = widened(y), widened(b)
            return y * scale, torch.addcmul(b, y, shift)

        height, width = self.zq.shape[2:]
        rows, columns = self._sources(height, x.height), self._sources(width, x.width)
        if norm.add_conv:  # a 3x3 convolution does not commute with the resize

            def convolved(first: int, last: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
                above, below = int(first > 0), int(last < x.height)
                zq = norm.conv(self.zq[:, :, rows[first - above : last + below]][:, :, :, columns])
                yield first, last, *combine(*norm.modulation(zq[:, :, above : zq.shape[2] - below]))

            return convolved

        scales, shifts = combine(*norm.modulation(self.zq))
        if is_power_of_two_ratio(height, x.height) and is_power_of_two_ratio(width, x.width):
            size = x.height // height

            def whole(first: int, last: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
                for begin, end in whole_cells(first, last, size):
                    cells = slice(begin // size, -(-end // size))
                    yield begin, end, scales[:, :, cells], shifts[:, :, cells]

            return whole

        def gathered(first: int, last: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
            cells = rows[first:last]
            yield first, last, scales[:, :, cells][:, :, :, columns], shifts[:, :, cells][:, :, :, columns]

        return gathered

    def _sources(self, small: int, large: int) -> Tensor:
        """torch's nearest rule: from which cell of `small` each of `large` is."""
        cells = torch.arange(small, dtype=torch.float32, device=self.zq.device)
        return F.interpolate(cells[None, None], size=large, mode="nearest")[0, 0].long()


def check_decoder(decoder: Any) -> None:
    """What is computed in strips must be known, and must not depend on where in the map it is but for zeros around that."""
    for _, layer, _ in decoder.steps():
        if not isinstance(layer, (ResnetBlock, AttnBlock, Upsample)):
            raise TypeError(f"a decoder in strips takes ResnetBlock, AttnBlock and Upsample, got {type(layer).__name__}")
    for name, module in decoder.named_modules():
        convolutions = [child for child_name, child in module.named_children() if child_name in CONVOLUTIONS]
        for conv in convolutions:
            plain = ((3, 3), (1, 1), (1, 1), "zeros")
            if not isinstance(conv, nn.Conv2d) or (conv.kernel_size, conv.stride, conv.padding, conv.padding_mode) != plain:
                raise TypeError(
                    f"a decoder in strips takes 3x3 nn.Conv2d padded with zeros, got {conv} in {name or 'the decoder'}"
                )
        if isinstance(module, SpatialNorm) and (
            type(module.norm_layer) is not nn.GroupNorm or not is_unmodified(module.norm_layer)
        ):
            raise TypeError(f"a decoder in strips takes nn.GroupNorm as it is, got {module.norm_layer} in {name}")


def check_evaluation(decoder: nn.Module) -> None:
    """Dropout has no place in a decode in strips."""
    if decoder.training and any(isinstance(module, nn.Dropout) and module.p > 0 for module in decoder.modules()):
        raise ValueError("decoder must be in evaluation mode: call decoder.eval() first")


CONVOLUTIONS = ("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "conv")


def _projected(layer: nn.Module, n: Tensor) -> Tensor:
    """layer(n) as one head's tokens, ``(1, 1, rows * W, C)``."""
    return cast(Tensor, layer(n).permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1))


def whole_cells(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Rows first to last - 1 in up to three parts: of whole cells of `size` rows, before them and behind them."""
    head = min(last, -(-first // size) * size)
    tail = max(head, last // size * size)
    return ((begin, end) for begin, end in ((first, head), (head, tail), (tail, last)) if begin < end)


def convolution_values(channels: int, out_channels: int) -> int:
    """For each pixel: a strip, its normalised copy, wider copies of both and their scales; the result and what is added to it."""
    return 5 * channels + 2 * out_channels
