"""GroupNorm and SpatialNorm of strips, with the statistics of the whole map.

A norm computes ``x * scale + shift`` for each value. For SpatialNorm, scale and shift include the modulation by zq:
``(x * scale + shift) * y + b = x * (scale * y) + (shift * y + b)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import profiling
from ..ops.native import is_power_of_two_ratio, scale_by_cells
from .feature_maps import FeatureMap
from .map_rows import MapRows
from .norms import SpatialNorm
from .strip_buffer import StripBuffer

RowModulation = Callable[[int, int], tuple[Tensor, Tensor]]  # (first, last) to the scale and the shift of these rows of cells


class NormalisedRows(MapRows):
    """Rows of ``norm(x)``, then SiLU if ``activation`` is "silu".

    Args:
        norm: a GroupNorm or SpatialNorm.
        x: a completely written map.
        zq: ``(1, zq_ch, h, w)``; None for a GroupNorm.
        activation: "silu" or None.
        buffer: for a strip in float32.
    """

    def __init__(self, norm: nn.Module, x: FeatureMap, zq: Tensor | None, activation: str | None, buffer: StripBuffer) -> None:
        self.norm, self.x, self.activation, self.buffer = norm, x, activation, buffer
        group_norm = norm.norm_layer if isinstance(norm, SpatialNorm) else norm
        assert isinstance(group_norm, nn.GroupNorm)
        mean, rstd = x.moments.group_statistics(group_norm.num_groups, group_norm.eps)
        scale = rstd if group_norm.weight is None else rstd * group_norm.weight
        shift = -mean * scale if group_norm.bias is None else group_norm.bias - mean * scale
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.affine: Affine
        if isinstance(norm, SpatialNorm):
            assert zq is not None, "a norm that is conditioned on a latent"
            self.affine = _modulate(CombinedModulation(norm, scale, shift, self.dtype), zq, x)
        else:
            self.affine = ChannelAffine(*(t.to(self.dtype)[None, :, None, None] for t in (scale, shift)))

    def write_rows(self, first: int, last: int, out: Tensor) -> None:
        self.normalise(self.x.read(first, last), first, last, out)

    def normalise(self, values: Tensor, first: int, last: int, out: Tensor) -> None:
        """Write the result for rows first to last - 1 of x to out. values: these rows, which may be out itself."""
        values = self.buffer.upcast(values)
        result = out if out.dtype == self.dtype else values  # where the dtypes differ, values are a copy
        with profiling.layer_range(self.norm):
            for part in self.affine.parts(first, last):
                rows = slice(part.first - first, part.last - first)
                scale_by_cells(values[:, :, rows], part.scale, part.shift, out=result[:, :, rows])
            if self.activation == "silu":
                F.silu(result, inplace=True)
            if result is not out:
                out.copy_(result)


class AffinePart(NamedTuple):
    """Scale and shift of rows first to last - 1: one of each for every channel and block of pixels."""

    first: int
    last: int
    scale: Tensor
    shift: Tensor


class Affine(Protocol):
    """The scales and shifts of a map."""

    def parts(self, first: int, last: int) -> Iterator[AffinePart]:
        """Yield the scales and shifts of rows first to last - 1."""
        ...


class ChannelAffine:
    """One scale and shift for each channel, ``(1, C, 1, 1)``."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = scale, shift

    def parts(self, first: int, last: int) -> Iterator[AffinePart]:
        yield AffinePart(first, last, self.scale, self.shift)


class CellAffine:
    """One scale and shift for each channel and cell of zq, where a cell covers ``size`` whole rows.

    They are computed for the rows of a strip, by its thread.
    """

    def __init__(self, modulation: CombinedModulation, zq: Tensor, size: int) -> None:
        self.size = size
        # Modified layers of a modulation may mix cells: they are called once, with all of them.
        self.of_rows = modulation.of_rows(zq) if modulation.is_plain else _stored_rows(*modulation(zq))

    def parts(self, first: int, last: int) -> Iterator[AffinePart]:
        first_cell = first // self.size
        scale, shift = self.of_rows(first_cell, -(-last // self.size))
        for part_first, part_last in split_at_cells(first, last, self.size):
            cells = slice(part_first // self.size - first_cell, -(-part_last // self.size) - first_cell)
            yield AffinePart(part_first, part_last, scale[:, :, cells], shift[:, :, cells])


class NearestAffine:
    """One scale and shift for each channel and cell of zq, ``(1, C, h, w)``, resized (nearest) to the map's pixels."""

    def __init__(self, scale: Tensor, shift: Tensor, height: int, width: int) -> None:
        self.scale, self.shift = scale, shift
        self.rows, self.columns = nearest_indices(scale, height, width)

    def parts(self, first: int, last: int) -> Iterator[AffinePart]:
        scale, shift = (t[:, :, self.rows[first:last]][:, :, :, self.columns] for t in (self.scale, self.shift))
        yield AffinePart(first, last, scale, shift)


class CombinedModulation:
    """``(scale * y, shift * y + b)`` for the modulation ``(y, b)`` of a latent: one scale and one shift for each value.

    One product computes both, since ``y = weight @ zq + bias`` and b likewise: scale and shift go into the weights. Modified
    layers are called.

    Args:
        norm: a SpatialNorm.
        scale, shift: ``(C,)``.
        dtype: of the results.
    """

    def __init__(self, norm: SpatialNorm, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> None:
        self.norm, self.scale, self.shift, self.dtype = norm, scale, shift, dtype
        self.is_plain = norm.is_plain_modulation() and getattr(norm.modulation, "__func__", None) is SpatialNorm.modulation
        if self.is_plain:
            y, b = _parameters(norm.conv_y, norm.conv_b).to(scale.dtype).chunk(2, 1)
            self.parameters = torch.cat([scale[:, None] * y, torch.addcmul(b, shift[:, None], y)]).to(dtype)

    def __call__(self, zq: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift of each channel and cell of zq, ``(1, C, h, w)`` each. Channels vary fastest."""
        if self.is_plain:
            return self.of_rows(zq)(0, zq.shape[2])
        y, b = (t.to(self.dtype) for t in self.norm.modulation(zq))
        scale, shift = (t.to(self.dtype)[:, None, None] for t in (self.scale, self.shift))
        return y * scale, torch.addcmul(b, y, shift)

    def of_rows(self, zq: Tensor) -> RowModulation:
        """Return a function that computes the scale and the shift of rows of cells, for layers that are not modified."""
        pixels = zq.permute(0, 2, 3, 1).to(self.dtype)
        cells = F.pad(pixels, (0, 1), value=1.0).squeeze(0)  # the bias is the last column of the parameters
        weight = self.parameters.t()

        def modulate(first: int, last: int) -> tuple[Tensor, Tensor]:
            out = cells.new_empty(last - first, cells.shape[1], weight.shape[1])
            torch.mm(cells[first:last].flatten(0, 1), weight, out=out.flatten(0, 1))  # with out, autocast casts nothing
            scale, shift = out.permute(2, 0, 1).unsqueeze(0).chunk(2, 1)
            return scale, shift

        return modulate


def _stored_rows(scale: Tensor, shift: Tensor) -> RowModulation:
    return lambda first, last: (scale[:, :, first:last], shift[:, :, first:last])


def _parameters(*convs: nn.Conv2d) -> Tensor:
    """Return the weights of 1x1 convolutions side by side, each with the bias as its last column, ``(out, (in + 1) * convs)``."""
    columns = []
    for conv in convs:
        assert conv.bias is not None
        columns += [conv.weight.flatten(1), conv.bias[:, None]]
    return torch.cat(columns, 1)


class ConvolvedAffine:
    """A scale and shift for each value, for norms with add_conv: a 3x3 convolution does not commute with the resize of zq."""

    def __init__(self, modulation: CombinedModulation, zq: Tensor, x: FeatureMap) -> None:
        self.modulation, self.zq, self.x = modulation, zq, x
        self.rows, self.columns = nearest_indices(zq, x.height, x.width)

    def parts(self, first: int, last: int) -> Iterator[AffinePart]:
        above, below = self.x.halo(first, last)
        resized = self.zq[:, :, self.rows[first - above : last + below]][:, :, :, self.columns]
        convolved = self.modulation.norm.conv(resized)
        yield AffinePart(first, last, *self.modulation(convolved[:, :, above : convolved.shape[2] - below]))


def _modulate(modulation: CombinedModulation, zq: Tensor, x: FeatureMap) -> Affine:
    if modulation.norm.add_conv:
        return ConvolvedAffine(modulation, zq, x)
    height, width = zq.shape[2:]
    if is_power_of_two_ratio(height, x.height) and is_power_of_two_ratio(width, x.width):
        return CellAffine(modulation, zq, x.height // height)
    return NearestAffine(*modulation(zq), x.height, x.width)


def split_at_cells(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Split rows first to last - 1 at cells of ``size`` rows into a partial cell, whole cells and another partial cell."""
    head = min(last, -(-first // size) * size)
    tail = max(head, last // size * size)
    return ((begin, end) for begin, end in ((first, head), (head, tail), (tail, last)) if begin < end)


def nearest_indices(small: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the row and the column of ``small`` that torch's nearest resize takes for each row and column of the result."""

    def indices(count: int, size: int) -> Tensor:
        numbers = torch.arange(count, dtype=torch.float32, device=small.device)
        return F.interpolate(numbers[None, None], size=size, mode="nearest")[0, 0].long()

    return indices(small.shape[2], height), indices(small.shape[3], width)
