"""The norms of the MoVQ autoencoder. Attribute names match the published checkpoints."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.functional import fused_spatial_norm
from ..ops.native import is_inference
from ..ops.options import NormOptions
from ..profiling import FusedModule
from .checks import check_batch, check_groups, check_latent
from .fusion import is_plain_conv1x1, is_plain_conv3x3, is_plain_group_norm, is_unmodified, plain_weight, runs_inference
from .modulation import Modulations, can_convolve_cells, convolve_cells, modulate

NORM_GROUPS = 32
NORM_EPS = 1e-6


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` with SpatialNorm's signature, for blocks that are not conditioned on a latent."""

    def forward(self, f: Tensor, zq: object = None, activation: str | None = None) -> Tensor:
        """Normalise f ``(B, C, H, W)``, then apply the activation (None or ``"silu"``). zq is ignored.

        Raises what `spatial_norm` raises.
        """
        return fused_spatial_norm(f, None, None, NormOptions.from_layer(self, activation))

    def _forward_fused(
        self,
        f: Tensor,
        modulations: Modulations,
        activation: str | None = None,
        f_bias: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """Compute forward of ``f + f_bias[c]`` in inference, with the addition inside the norm. statistics: see NormOptions."""
        return fused_spatial_norm(f, None, None, NormOptions.from_layer(self, activation, f_bias, statistics=statistics))


class SpatialNorm(nn.Module, FusedModule):
    """Normalisation whose scale and offset depend on the quantised latent (MoVQ, arXiv:2209.09002, equation 4).

    ``out = norm_layer(f) * conv_y(zq) + conv_b(zq)``, with zq resized (nearest) to f's height and width.

    Args:
        f_channels: channels of the features f.
        zq_channels: channels of the latent zq.
        norm_layer: class of the normalisation, called as ``norm_layer(num_channels=f_channels, **norm_layer_params)``.
        freeze_norm_layer: never train the norm layer's parameters or update its running statistics.
        add_conv: apply a 3x3 convolution to the resized zq first.
        **norm_layer_params: e.g. ``num_groups=32, eps=1e-6, affine=True``.

    Raises:
        ValueError: num_groups of a group norm is not positive or does not divide f_channels.
    """

    def __init__(
        self,
        f_channels: int,
        zq_channels: int,
        norm_layer: type[nn.Module] = nn.GroupNorm,
        freeze_norm_layer: bool = False,
        add_conv: bool = False,
        **norm_layer_params: Any,
    ) -> None:
        super().__init__()
        if norm_layer is nn.GroupNorm:
            check_groups(f_channels, norm_layer_params.get("num_groups"))
        self.norm_layer = norm_layer(num_channels=f_channels, **norm_layer_params)
        self.f_channels, self.zq_channels = f_channels, zq_channels
        self.freeze_norm_layer = freeze_norm_layer
        if freeze_norm_layer:
            self.norm_layer.requires_grad_(False).eval()
        self.add_conv = add_conv
        if add_conv:
            self.conv = nn.Conv2d(zq_channels, zq_channels, kernel_size=3, padding=1)
        self.conv_y = nn.Conv2d(zq_channels, f_channels, kernel_size=1)
        self.conv_b = nn.Conv2d(zq_channels, f_channels, kernel_size=1)

    def train(self, mode: bool = True) -> SpatialNorm:
        super().train(mode)
        if self.freeze_norm_layer:  # a frozen BatchNorm must not update its running statistics either
            self.norm_layer.eval()
        return self

    def forward(self, f: Tensor, zq: Tensor, activation: str | None = None) -> Tensor:
        """Normalise f ``(B, f_channels, H, W)`` conditioned on zq ``(B, zq_channels, h, w)``, then apply the activation.

        The activation is None or ``"silu"``. Returns f's shape.

        Raises ValueError (rank, channels, batch, device) or TypeError (dtype) naming the argument.
        """
        self._check(f, zq)
        if self.add_conv and runs_inference(self, f, zq) and is_plain_group_norm(self.norm_layer):
            return self._forward_fused(f, Modulations(zq), activation)
        if self.add_conv:
            zq = self._convolve_resized(zq, f)
        y, b = self.modulation(zq)
        if is_plain_group_norm(self.norm_layer):  # one operator for the lines below
            return fused_spatial_norm(f, y, b, NormOptions.from_layer(self.norm_layer, activation))
        y, b = (F.interpolate(x, size=f.shape[2:], mode="nearest") for x in (y, b))
        out: Tensor = self.norm_layer(f) * y + b
        return F.silu(out) if activation == "silu" else out

    def _forward_fused(
        self,
        f: Tensor,
        modulations: Modulations,
        activation: str | None = None,
        f_bias: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """Compute forward of ``f + f_bias[c]`` in inference, for an unmodified nn.GroupNorm. statistics: see NormOptions.

        Fused: the addition, in the norm; the products of many norms, in modulations; add_conv's convolution, which is computed
        on zq's grid where zq's cells are large enough.
        """
        zq = cast(Tensor, modulations.zq)
        if not modulations.is_batched(self):  # else the decoder has checked its latents
            self._check(f, zq)
        # A hook or an adapter before this norm may have made f require a gradient, which the operator with cells does not record.
        by_cells = self.add_conv and is_inference(f) and is_plain_conv3x3(self.conv) and can_convolve_cells(zq, f.shape[2:])
        if by_cells:
            y, b = self.modulation(convolve_cells(self.conv, zq))
        elif self.add_conv:
            y, b = self.modulation(self._convolve_resized(zq, f))
        else:
            y, b = modulations[self]
        group_norm = cast(nn.GroupNorm, self.norm_layer)
        options = NormOptions.from_layer(group_norm, activation, f_bias, bordered=by_cells, statistics=statistics)
        return fused_spatial_norm(f, y, b, options)

    def _convolve_resized(self, zq: Tensor, f: Tensor) -> Tensor:
        """Return ``conv(zq)`` at f's size: unlike conv_y and conv_b, a 3x3 convolution does not commute with the resize."""
        return cast(Tensor, self.conv(F.interpolate(zq, size=f.shape[2:], mode="nearest")))

    def _check(self, f: Tensor, zq: Tensor) -> None:
        weight = plain_weight(self.conv_y)
        check_latent("f", f, self.f_channels, weight)
        check_latent("zq", zq, self.zq_channels, weight)
        check_batch(f=f, zq=zq)

    def modulation(self, zq: Tensor) -> tuple[Tensor, Tensor]:
        """Return conv_y(zq) and conv_b(zq), ``(B, f_channels, h, w)`` each."""
        return modulate([self], zq)[0] if self.is_plain_modulation() else (self.conv_y(zq), self.conv_b(zq))

    def is_plain_modulation(self) -> bool:
        """True if conv_y and conv_b are plain 1x1 convolutions with biases, which one matrix product computes together."""
        conv_y, conv_b = self.conv_y, self.conv_b
        are_plain = is_plain_conv1x1(conv_y) and is_plain_conv1x1(conv_b)
        return are_plain and conv_y.bias is not None and conv_b.bias is not None


def make_norm(channels: int, zq_ch: int | None, add_conv: bool) -> GroupNorm | SpatialNorm:
    """Return a norm of 32 groups: GroupNorm if zq_ch is None, else SpatialNorm conditioned on a latent of zq_ch channels."""
    check_groups(channels, NORM_GROUPS)
    if zq_ch is None:
        return GroupNorm(NORM_GROUPS, channels, NORM_EPS)
    return SpatialNorm(channels, zq_ch, add_conv=add_conv, num_groups=NORM_GROUPS, eps=NORM_EPS, affine=True)


def is_plain_norm(norm: nn.Module) -> bool:
    """True for an unmodified GroupNorm or SpatialNorm, which may be computed without calling it."""
    if type(norm) is SpatialNorm and not is_plain_group_norm(norm.norm_layer):
        return False
    return type(norm) in (GroupNorm, SpatialNorm) and is_unmodified(norm)
