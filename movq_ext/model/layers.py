"""The layers of the MoVQ autoencoder. Attribute names are those of the published checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.functional import fused_spatial_norm, spatial_attention
from ..ops.native import is_inference
from ..ops.options import NormOptions
from ..profiling import ComputesOwnLayers
from .checks import check_batch, check_groups, check_latent
from .fusion import add_residual, conv_deferring_bias, fold_upsampling, is_plain_conv, is_plain_conv3x3, is_unmodified
from .modulation import Modulations, convolve_cells, is_convolved_by_cells, modulate

NORM_GROUPS = 32
NORM_EPS = 1e-6


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` with SpatialNorm's signature, for blocks that are not conditioned on a latent (zq is ignored)."""

    def forward(self, f: Tensor, zq: object = None, activation: str | None = None, f_bias: Tensor | None = None) -> Tensor:
        """Normalise f ``(B, C, H, W)``, with ``f_bias[c]`` added where given; returns f's shape.

        Raises what `spatial_norm` raises.
        """
        return fused_spatial_norm(f, None, None, NormOptions.of_layer(self, activation, f_bias))


class SpatialNorm(nn.Module, ComputesOwnLayers):
    """Normalisation whose scale and offset depend on the quantised latent (MoVQ, arXiv:2209.09002, equation 4).

    ``out = norm_layer(f) * conv_y(zq) + conv_b(zq)``, with zq resized (nearest) to f's height and width.

    Args:
        f_channels: channels of the features f.
        zq_channels: channels of the latent zq.
        norm_layer: class of the normalisation, called as ``norm_layer(num_channels=f_channels, **norm_layer_params)``.
        freeze_norm_layer: keep the norm layer's parameters and running statistics as they are in training.
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

    def forward(self, f: Tensor, zq: Tensor | Modulations, activation: str | None = None, f_bias: Tensor | None = None) -> Tensor:
        """Normalise f ``(B, f_channels, H, W)``, with ``f_bias[c]`` added where given, on zq ``(B, zq_channels, h, w)``; returns
        f's shape.

        Raises ValueError (rank, channels, batch, device) or TypeError (dtype) naming the argument.
        """
        check_latent("f", f, self.conv_y.out_channels, self.conv_y.weight)
        if not isinstance(zq, Modulations):
            check_latent("zq", zq, self.conv_y.in_channels, self.conv_y.weight)
            check_batch(f=f, zq=zq)
        norm, bordered = self.norm_layer, False
        group_norm = norm if type(norm) is nn.GroupNorm and is_unmodified(norm) else None
        if self.add_conv:  # a 3x3 convolution does not commute with the resize
            assert isinstance(zq, Tensor), "Modulations are of norms without add_conv"
            free = group_norm is not None and is_plain_conv3x3(self.conv) and is_inference(f, zq, *self.parameters())
            bordered = free and is_convolved_by_cells(zq, f.shape[2:])
            zq = convolve_cells(self.conv, zq) if bordered else self.conv(F.interpolate(zq, size=f.shape[2:], mode="nearest"))
        y, b = self.modulation(zq)
        if group_norm is not None:
            return fused_spatial_norm(f, y, b, NormOptions.of_layer(group_norm, activation, f_bias, bordered))
        f = f if f_bias is None else f + f_bias[:, None, None]
        y, b = (F.interpolate(x, size=f.shape[-2:], mode="nearest") for x in (y, b))
        out = cast(Tensor, norm(f) * y + b)
        return F.silu(out) if activation == "silu" else out

    def modulation(self, zq: Tensor | Modulations) -> tuple[Tensor, Tensor]:
        """conv_y(zq) and conv_b(zq), ``(B, f_channels, h, w)`` each."""
        if isinstance(zq, Modulations):
            return zq.of(self)
        return modulate([self], zq)[0] if self.is_product() else (self.conv_y(zq), self.conv_b(zq))

    def is_product(self) -> bool:
        """Whether conv_y and conv_b of a latent are one matrix product."""
        return all(
            is_plain_conv(layer) and layer.kernel_size == (1, 1) and layer.bias is not None
            for layer in (self.conv_y, self.conv_b)
        )


def is_plain_network(network: nn.Module) -> bool:
    """Whether the network is all layers of this file as they are, which may then be computed without calling each one."""
    return all(is_unmodified(module) and _is_known_layer(module) for module in network.modules() if module is not network)


def _is_known_layer(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return is_plain_conv(module)
    if type(module) is nn.Dropout:
        return module.p == 0 or not module.training
    containers = (nn.Module, nn.ModuleList, Stage, Middle)
    return type(module) in (*containers, nn.GroupNorm, GroupNorm, SpatialNorm, ResnetBlock, AttnBlock, Upsample)


def _tensors(zq: object) -> list[Tensor]:
    return [zq] if isinstance(zq, Tensor) else []  # Modulations are made where nothing records a gradient


def make_norm(channels: int, zq_ch: int | None, add_conv: bool) -> GroupNorm | SpatialNorm:
    """The norm of every block: SpatialNorm where there is a latent to condition on, else GroupNorm; 32 groups."""
    check_groups(channels, NORM_GROUPS)
    if zq_ch is None:
        return GroupNorm(NORM_GROUPS, channels, NORM_EPS)
    return SpatialNorm(channels, zq_ch, add_conv=add_conv, num_groups=NORM_GROUPS, eps=NORM_EPS, affine=True)


class Upsample(nn.Module, ComputesOwnLayers):
    """Nearest 2x upsampling, then a 3x3 convolution; the two are computed as one transposed convolution.

    Args:
        in_channels: of the map, before and after.
        with_conv: whether there is the convolution.
    """

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C, 2H, 2W)``."""
        # Folded in every call: whatever would remember the result cannot see all the ways in which a weight is changed.
        if self.with_conv and is_plain_conv3x3(self.conv):
            return F.conv_transpose2d(x, fold_upsampling(self.conv.weight), self.conv.bias, stride=2, padding=1)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halve height and width: a stride-2 3x3 convolution padded at the bottom and right, or a 2x2 mean.

    Args:
        in_channels: of the map, before and after.
        with_conv: the convolution rather than the mean.
    """

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C, H // 2, W // 2)``."""
        return self.conv(F.pad(x, (0, 1, 0, 1))) if self.with_conv else F.avg_pool2d(x, 2)


class ResnetBlock(nn.Module, ComputesOwnLayers):
    """``shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + temb_proj(silu(temb))))))``.

    Args:
        in_channels, out_channels: multiples of 32; out_channels defaults to in_channels.
        conv_shortcut: where the channels differ, shortcut by a 3x3 (``conv_shortcut``) instead of a 1x1 (``nin_shortcut``).
        dropout: probability.
        temb_channels: channels of the optional timestep embedding; 0 for none.
        zq_ch: channels of the latent the norms are conditioned on; None for plain GroupNorm.
        add_conv: see `SpatialNorm`.

    Raises:
        ValueError: channels are not a multiple of 32.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 0,
        zq_ch: int | None = None,
        add_conv: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels = in_channels if out_channels is None else out_channels
        self.norm1 = make_norm(in_channels, zq_ch, add_conv)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = make_norm(out_channels, zq_ch, add_conv)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, temb: Tensor | None = None, zq: Tensor | Modulations | None = None) -> Tensor:
        """``(B, in_channels, H, W) -> (B, out_channels, H, W)``; temb ``(B, temb_channels)``, zq ``(B, zq_ch, h, w)``.

        Raises ValueError if temb is given to a block without ``temb_channels``, or is missing from one with them.
        """
        if (temb is not None) != hasattr(self, "temb_proj"):
            raise ValueError("temb must be given exactly when the block was made with temb_channels > 0")
        h = self.norm1(x, zq, activation="silu")  # named again and again, so that what was there before is freed
        norm = self.norm2
        norm2: Callable[..., Tensor] = norm
        if temb is not None:
            h = self.conv1(h) + self.temb_proj(F.silu(temb))[:, :, None, None]
        elif type(norm) in (GroupNorm, SpatialNorm) and is_inference(*norm.parameters(), *_tensors(zq)) and is_unmodified(norm):
            h, bias = conv_deferring_bias(self.conv1, h)
            norm2 = partial(norm, f_bias=bias)
        else:
            h = self.conv1(h)
        h, bias = conv_deferring_bias(self.conv2, self.dropout(norm2(h, zq, activation="silu")))
        shortcut = next((getattr(self, name) for name in ("conv_shortcut", "nin_shortcut") if hasattr(self, name)), None)
        if shortcut is not None:
            if bias is None:
                x = shortcut(x)
            else:
                x, more = conv_deferring_bias(shortcut, x)
                bias = bias if more is None else bias + more
        return add_residual(h, bias, x, self.conv2)


class AttnBlock(nn.Module, ComputesOwnLayers):
    """``x + proj_out(attention(q(n), k(n), v(n)))`` with ``n = norm(x)``: one head of size in_channels over all positions.

    q, k and v are one convolution when they run, and three in the state dict.

    Args:
        in_channels: of the map, a multiple of 32.
        zq_ch: channels of the latent the norm is conditioned on; None for plain GroupNorm.
        add_conv: see `SpatialNorm`.

    Raises:
        ValueError: in_channels is not a multiple of 32.
    """

    def __init__(self, in_channels: int, zq_ch: int | None = None, add_conv: bool = False) -> None:
        super().__init__()
        self.norm = make_norm(in_channels, zq_ch, add_conv)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def forward(self, x: Tensor, zq: Tensor | Modulations | None = None) -> Tensor:
        """``(B, C, H, W) -> (B, C, H, W)``; zq ``(B, zq_ch, h, w)`` where the norm is conditioned."""
        return add_residual(
            *conv_deferring_bias(self.proj_out, spatial_attention(*self._project(self.norm(x, zq)))), x, self.proj_out
        )

    def _project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = (self.q, self.k, self.v)
        if not all(is_plain_conv(layer) and layer.bias is not None for layer in layers):
            return self.q(h), self.k(h), self.v(h)
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        q, k, v = F.conv2d(h, weight, bias).chunk(3, dim=1)
        return q, k, v


class Stage(nn.Module):
    """The layers of one level, of the encoder or the decoder."""

    downsample: Downsample
    upsample: Upsample

    def __init__(self) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()


class Middle(nn.Module):
    """The layers of the smallest map: two blocks and, if ``attends``, attention between them."""

    def __init__(self, channels: int, dropout: float, attends: bool, zq_ch: int | None = None, add_conv: bool = False) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, dropout=dropout, zq_ch=zq_ch, add_conv=add_conv)
        self.attn_1 = AttnBlock(channels, zq_ch, add_conv) if attends else None
        self.block_2 = ResnetBlock(in_channels=channels, dropout=dropout, zq_ch=zq_ch, add_conv=add_conv)
