"""The scale and offset that SpatialNorm computes from the latent, for one norm or for many in one product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.native import is_power_of_two_ratio, is_tracing, multiply_pixels
from .fusion import runs_kernels

MAX_BATCH_BYTES = 64 << 20
ALIGNED_CHANNELS = 8  # of 16 bits: the rows of an operand are then aligned to 16 bytes, which cuBLAS's fast kernels need


class Batch(NamedTuple):
    """The 1x1 convolutions of norms with C channels each, conv_y and conv_b in turn.

    Attributes:
        norms: SpatialNorm layers.
        weight: ``(2 * len(norms) * C, zq_ch)``, or with more columns if they hold the bias (see `append_bias`).
        bias: ``(2 * len(norms) * C,)``, or None if it is part of weight.
        cells: the latent as ``(B * h * w, zq_ch)``, with ones in further columns if weight holds the bias.
    """

    norms: Sequence[Any]
    weight: Tensor
    bias: Tensor | None
    cells: Tensor


def modulate(norms: Sequence[Any], zq: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return conv_y(zq) and conv_b(zq) of every norm, from one batched matrix product. On a GPU a single norm takes two products.

    Args:
        norms: SpatialNorm layers of C channels with plain 1x1 convolutions.
        zq: ``(B, zq_ch, h, w)``.

    Returns:
        Pairs of ``(B, C, h, w)`` in channels_last.
    """
    if len(norms) == 1 and runs_kernels(zq) and not is_tracing():  # two kernels that add biases, rather than four
        conv_y, conv_b = norms[0].conv_y, norms[0].conv_b
        return [(multiply_pixels(zq, conv_y.weight, conv_y.bias), multiply_pixels(zq, conv_b.weight, conv_b.bias))]
    weight, bias = _concatenate(norms, zq)
    return multiply(Batch(norms, weight, bias, _cells(zq, weight, bias)), zq)


def multiply(batch: Batch, zq: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return what `modulate` returns, from weights that are already in one tensor."""
    layers = 2 * len(batch.norms)
    cells = batch.cells.expand(layers, -1, -1)
    weight = batch.weight.unflatten(0, (layers, -1)).transpose(1, 2)  # ONNX has no mT
    if batch.bias is None:
        products = cells @ weight
    else:
        products = torch.baddbmm(batch.bias.unflatten(0, (layers, 1, -1)), cells, weight)
    maps = products.unflatten(1, (zq.shape[0], *zq.shape[2:])).permute(0, 1, 4, 2, 3).unbind()
    return list(zip(maps[::2], maps[1::2], strict=True))


def _cells(zq: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return zq as ``(B * h * w, K)``, with ones from channel zq_ch on if weight holds the bias."""
    cells = zq.permute(0, 2, 3, 1).flatten(0, 2)
    return cells if bias is not None else F.pad(cells, (0, weight.shape[1] - cells.shape[1]), value=1.0)


def _concatenate(norms: Sequence[Any], zq: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weights and the biases of the norms' 1x1 convolutions, one below the other, as `Batch` has them."""
    layers = [layer for norm in norms for layer in (norm.conv_y, norm.conv_b)]
    weight, bias = torch.cat([layer.weight for layer in layers]).flatten(1), torch.cat([layer.bias for layer in layers])
    if runs_kernels(zq) and zq.itemsize == 2 and weight.dtype == bias.dtype == zq.dtype:
        return append_bias(weight, bias), None
    return weight, bias


def append_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``(rows, K)`` whose product with an input, padded with ones to K channels, includes the bias.

    The columns are weight, bias and zeros, in 16 bits. cuBLAS copies a bias of batched products to the whole result first, and
    has only slow kernels for inputs of four channels. The product with 1 is exact, and the sum in float32 as before.
    """
    rows, columns = weight.shape
    zeros = weight.new_zeros(1).expand(rows, -(columns + 1) % ALIGNED_CHANNELS)
    return torch.cat([weight, bias.unsqueeze(1), zeros], 1)


class Modulations:
    """``modulations[norm]`` is ``conv_y(zq), conv_b(zq)`` of a SpatialNorm without add_conv.

    Batched products under a byte limit: computed on first use, freed when the next batch starts.

    Args:
        zq: ``(B, zq_ch, h, w)``, or None for blocks with plain group norms.
        norms: SpatialNorm layers to batch, in order of use. Others are computed alone, on every look-up.
        max_batch_bytes: limit for the products of one batch. A single norm may exceed it.
    """

    def __init__(self, zq: Tensor | None, norms: Iterable[Any] = (), max_batch_bytes: int = MAX_BATCH_BYTES) -> None:
        self.zq = zq
        batchable = [norm for norm in norms if norm.is_plain_modulation() and not norm.add_conv]
        batches = [] if zq is None or not batchable else _batches(batchable, zq, max_batch_bytes)
        self._batch_of = {norm: batch for batch in batches for norm in batch.norms}
        self._computed: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def is_batched(self, norm: Any) -> bool:
        """True for the norms given to batch, except those with other convolutions than plain ones."""
        return norm in self._batch_of

    def __getitem__(self, norm: Any) -> tuple[Tensor, Tensor]:
        assert self.zq is not None, "a norm that is conditioned on a latent"
        if norm not in self._batch_of:
            return norm.modulation(self.zq)  # type: ignore[no-any-return]
        if norm not in self._computed:
            batch = self._batch_of[norm]
            self._computed = {}  # freed before the next allocation
            self._computed = dict(zip(batch.norms, multiply(batch, self.zq), strict=True))
        return self._computed[norm]


def _batches(norms: Sequence[Any], zq: Tensor, max_bytes: int) -> list[Batch]:
    """Split norms, in order, into batches of equal channels whose modulations fit max_bytes.

    One kernel concatenates the weights of all batches, and one their biases: a batch has views.
    """
    batches: list[list[Any]] = []
    for channels, group in groupby(norms, key=_channels):
        norm_bytes = 2 * channels * zq[:, 0].numel() * zq.itemsize
        batch_size = max(1, max_bytes // norm_bytes)
        neighbours = list(group)
        batches += [neighbours[start : start + batch_size] for start in range(0, len(neighbours), batch_size)]
    rows = [2 * sum(map(_channels, batch)) for batch in batches]
    weight, bias = _concatenate(norms, zq)
    biases = [None] * len(rows) if bias is None else bias.split(rows)
    cells = _cells(zq, weight, bias)
    return [Batch(*batch, cells) for batch in zip(batches, weight.split(rows), biases, strict=True)]


def _channels(norm: Any) -> int:
    channels: int = norm.f_channels
    return channels


def can_convolve_cells(zq: Tensor, size: Sequence[int]) -> bool:
    """True if convolve_cells can replace a convolution of zq resized to this height and width, and computes fewer pixels."""
    sizes = zip(zq.shape[2:], size, strict=True)
    return all(is_power_of_two_ratio(small, large) and large // small >= 4 for small, large in sizes)


def convolve_cells(conv: nn.Conv2d, zq: Tensor) -> Tensor:
    """Return a 3x3 convolution of the resized zq at three rows and columns of each cell: first, inner and last.

    The resized zq is constant within a cell. Inside, the kernel sees that value only; at a border it sees one neighbour too. So
    the nine values of a cell are one convolution of zq itself with nine kernels, which are sums of conv's weights.

    Returns:
        ``(B, zq_ch, 3h, 3w)``.
    """
    weight = conv.weight
    for dim in (-1, -2):  # for each part of a cell, sum the weights that fall on the previous, the same and the next cell
        first, middle, last = weight.split(1, dim)
        zero = torch.zeros_like(middle)
        parts = [(first, middle + last, zero), (zero, first + (middle + last), zero), (zero, first + middle, last)]
        weight = torch.stack([torch.cat(part, dim) for part in parts], dim=1)
    bias = None if conv.bias is None else conv.bias.repeat_interleave(9)
    return F.pixel_shuffle(F.conv2d(zq, weight.flatten(0, 2), bias, padding=1), 3)
