"""What SpatialNorm makes of the latent: conv_y(zq) and conv_b(zq), of one norm or of many in one product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.native import is_power_of_two_ratio

MOST_BYTES = 64 << 20  # of one product, where several norms could share it


def modulate(norms: Sequence[Any], zq: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(conv_y(zq), conv_b(zq)), ``(B, C, h, w)`` in channels_last each, for norms of C channels with plain 1x1 convolutions."""
    layers = [layer for norm in norms for layer in (norm.conv_y, norm.conv_b)]
    weight, bias = torch.stack([layer.weight.flatten(1) for layer in layers]), torch.stack([layer.bias for layer in layers])
    cells = zq.permute(0, 2, 3, 1).reshape(1, -1, zq.shape[1]).expand(len(layers), -1, -1)
    products = torch.baddbmm(bias.unsqueeze(1), cells, weight.mT)
    maps = products.unflatten(1, (zq.shape[0], *zq.shape[2:])).permute(0, 1, 4, 2, 3).unbind()
    return list(zip(maps[::2], maps[1::2], strict=True))


class Modulations:
    """``modulate(norms, zq)``, in place of zq: as few products as fit their bound, each made when the first of its norms asks and
    given up when a norm of another does.

    Args:
        norms: SpatialNorm layers with plain convolutions and no add_conv, in the order of their use.
        zq: ``(B, zq_ch, h, w)``.
        most: bytes of a product, unless one norm alone takes more.
    """

    def __init__(self, norms: Sequence[nn.Module], zq: Tensor, most: int = MOST_BYTES) -> None:
        self.zq = zq
        self._runs = list(self._cut(norms, most))
        self._run_of = {norm: run for run in self._runs for norm in run}
        self._made: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """conv_y(zq) and conv_b(zq) of a norm; what other products made may be gone."""
        if norm not in self._made:
            run = self._run_of[norm]
            self._made = {}  # given back before more is asked for
            self._made = dict(zip(run, modulate(run, self.zq), strict=True))
        return self._made[norm]

    def _cut(self, norms: Sequence[Any], most: int) -> Iterator[list[Any]]:
        run: list[Any] = []
        for norm in norms:
            size = 2 * self.zq[:, 0].numel() * norm.conv_y.out_channels * self.zq.itemsize
            if run and (norm.conv_y.out_channels != run[0].conv_y.out_channels or (len(run) + 1) * size > most):
                yield run
                run = []
            run.append(norm)
        if run:
            yield run


def is_convolved_by_cells(zq: Tensor, size: Sequence[int]) -> bool:
    """Whether convolve_cells gives what a convolution of zq resized to this height and width does, in fewer rows."""
    sizes = zip(zq.shape[2:], size, strict=True)
    return all(is_power_of_two_ratio(small, large) and large // small >= 4 for small, large in sizes)


def convolve_cells(conv: nn.Conv2d, zq: Tensor) -> Tensor:
    """``(B, zq_ch, 3h, 3w)``: a 3x3 convolution of zq after its resize, for the first, inner and last rows and columns of cells.

    Inside a cell the resized zq is constant: between its borders the kernel sees that value alone, and at a border one neighbour
    too. So the nine values of a cell are one convolution of zq itself with nine kernels, which are sums of conv's weights.
    """
    weight = conv.weight
    for dim in (-1, -2):  # of rows of weights those of the cells before, here and behind, for each part of a cell
        first, middle, last = weight.split(1, dim)
        none, both = torch.zeros_like(middle), [first + middle, middle + last]
        parts = [(first, both[1], none), (none, first + both[1], none), (none, both[0], last)]
        weight = torch.stack([torch.cat(part, dim) for part in parts], dim=1)
    bias = None if conv.bias is None else conv.bias.repeat_interleave(9)
    return F.pixel_shuffle(F.conv2d(zq, weight.flatten(0, 2), bias, padding=1), 3)
