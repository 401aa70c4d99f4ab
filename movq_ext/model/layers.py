"""The layers of the MoVQ autoencoder. Attribute names match the published checkpoints.

``forward`` is the published formula. ``_forward_fused`` computes the same in inference, with fewer passes and less memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.functional import spatial_attention, spatial_shared_kv_attention, upsample_conv, upsample_conv_with_statistics
from ..ops.native import compute_dtype
from ..ops.statistics import MeasuredMap
from ..profiling import FusedModule
from .fusion import (
    SHARED_KV_DTYPES,
    absorb_keys,
    add_residual_with_statistics,
    conv1x1,
    conv_deferring_bias,
    convolve_shortcut,
    is_plain_conv,
    is_plain_conv1x1,
    is_plain_conv3x3,
    is_unmodified,
    run_conv1x1,
    run_fused,
    runs_inference,
    submodules,
)
from .modulation import Modulations
from .norms import GroupNorm, SpatialNorm, is_plain_norm, make_norm


class Upsample(nn.Module, FusedModule):
    """Nearest 2x upsampling, then a 3x3 convolution, computed together as one convolution of the small map.

    That takes 2.25 times fewer multiplications, in training too, and 4 times fewer in wide layers on a CPU without gradients.

    Args:
        in_channels: channels of the map, before and after.
        with_conv: apply the convolution.
    """

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, 2H, 2W)`` for x ``(B, C, H, W)``."""
        if self.with_conv and is_plain_conv3x3(self.conv):
            # Weights are added up in every call: no cache could see every way in which a weight is changed.
            return upsample_conv(x, self.conv.weight, self.conv.bias)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x

    def _forward_fused(self, x: MeasuredMap, modulations: Modulations, next_groups: int = 0) -> MeasuredMap:
        """Compute forward in inference. Fused on a GPU: the statistics for a norm of next_groups groups, in the last pass."""
        if self.with_conv and is_plain_conv3x3(self.conv):
            return upsample_conv_with_statistics(x.values, self.conv.weight, self.conv.bias, next_groups)
        return MeasuredMap(self.forward(x.values))


class Downsample(nn.Module):
    """Halve height and width: a stride-2 3x3 convolution padded at the bottom and right, or a 2x2 mean.

    Args:
        in_channels: channels of the map, before and after.
        with_conv: halve by the convolution rather than by the mean.
    """

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H // 2, W // 2)`` for x ``(B, C, H, W)``."""
        return self.conv(F.pad(x, (0, 1, 0, 1))) if self.with_conv else F.avg_pool2d(x, 2)


class ResnetBlock(nn.Module, FusedModule):
    """Residual block: ``shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + temb_proj(silu(temb))))))``.

    Args:
        in_channels, out_channels: multiples of 32; out_channels defaults to in_channels.
        conv_shortcut: if the channels differ, use a 3x3 shortcut (``conv_shortcut``) instead of a 1x1 (``nin_shortcut``).
        dropout: probability.
        temb_channels: channels of the optional timestep embedding; 0 for none.
        zq_ch: channels of the latent that conditions the norms; None for plain GroupNorm.
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

    def forward(self, x: Tensor, temb: Tensor | None = None, zq: Tensor | None = None) -> Tensor:
        """Return ``(B, out_channels, H, W)`` for x ``(B, in_channels, H, W)``.

        temb is ``(B, temb_channels)`` and zq ``(B, zq_ch, h, w)``.

        Raises ValueError if temb is given to a block without ``temb_channels``, or is missing from one with them.
        """
        if (temb is not None) != hasattr(self, "temb_proj"):
            given = "none" if temb is None else f"shape {tuple(temb.shape)}"
            raise ValueError(f"temb must be given exactly when the block was made with temb_channels > 0, got {given}")
        if temb is None and runs_inference(self, x, zq) and is_plain_norm(self.norm1) and is_plain_norm(self.norm2):
            return self._forward_fused(MeasuredMap(x), Modulations(zq)).values
        h: Tensor = self.conv1(self.norm1(x, zq, activation="silu"))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(self.norm2(h, zq, activation="silu")))
        return self._shortcut(x) + h

    def _forward_fused(self, measured: MeasuredMap, modulations: Modulations, next_groups: int = 0) -> MeasuredMap:
        """Compute forward in inference, without temb.

        Fused on a GPU: conv1's bias, in norm2; the biases of conv2 and of the shortcut, in the pass that adds the shortcut, and
        the statistics of its sum for a norm of next_groups groups. On every device the sum overwrites conv2's result. A hooked or
        replaced convolution is called and keeps its bias.
        """
        # Rebinding h frees each map as soon as the next one exists.
        x, statistics = measured
        h = run_fused(self.norm1, x, modulations, "silu", statistics=statistics)
        h, bias = conv_deferring_bias(self.conv1, h)
        h = run_fused(self.norm2, h, modulations, "silu", f_bias=bias)
        h, bias = conv_deferring_bias(self.conv2, self.dropout(h))
        if (shortcut := self._shortcut_layer()) is not None:
            x, bias = convolve_shortcut(shortcut, x, bias)
        return add_residual_with_statistics(h, bias, x, self.conv2, next_groups)

    def _shortcut(self, x: Tensor) -> Tensor:
        """Return x, or its convolution if the channels differ."""
        shortcut = self._shortcut_layer()
        return x if shortcut is None else cast(Tensor, shortcut(x))

    def _shortcut_layer(self) -> nn.Module | None:
        modules = self._modules  # getattr takes longest where there is none, as in most blocks
        return modules.get("conv_shortcut", modules.get("nin_shortcut"))


class AttnBlock(nn.Module, FusedModule):
    """Self-attention block: ``x + proj_out(attention(q(n), k(n), v(n)))`` with ``n = norm(x)``.

    One head of size in_channels attends over all positions. q, k and v are three convolutions in the state dict and run as one.
    In 16-bit types n itself serves as keys and values: k is applied to the queries, and v to attention's result.

    Args:
        in_channels: channels of the map, a multiple of 32.
        zq_ch: channels of the latent that conditions the norm; None for plain GroupNorm.
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

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        """Return ``(B, C, H, W)`` for x of that shape and, if the norm is conditioned, zq ``(B, zq_ch, h, w)``."""
        if runs_inference(self, x, zq) and is_plain_norm(self.norm):
            return self._forward_fused(MeasuredMap(x), Modulations(zq)).values
        n = self.norm(x, zq)
        if self.shares_keys_and_values(compute_dtype(n)):
            h: Tensor = self.proj_out(self._attend_shared(n))
        else:
            q, k, v = self._project(n)
            h = self.proj_out(spatial_attention(q, k, v))
        return x + h

    def _forward_fused(self, measured: MeasuredMap, modulations: Modulations, next_groups: int = 0) -> MeasuredMap:
        """Compute forward in inference.

        Fused on a GPU: proj_out's bias, in the pass that adds x, and the statistics of its sum for a norm of next_groups groups.
        On every device the sum overwrites proj_out's result. A hooked or replaced convolution is called and keeps its bias.
        """
        x, statistics = measured
        n = run_fused(self.norm, x, modulations, statistics=statistics)
        if self.shares_keys_and_values(compute_dtype(n)):
            h = self._attend_shared(n)
        else:
            q, k, v = self._project(n)
            del n  # free each map after its last use
            h = spatial_attention(q, k, v)
            del q, k, v
        h, bias = conv_deferring_bias(self.proj_out, h)
        return add_residual_with_statistics(h, bias, x, self.proj_out, next_groups)

    def shares_keys_and_values(self, dtype: torch.dtype) -> bool:
        """True if the normalised input, in this dtype, serves as both keys and values. k and v must be plain for that."""
        return dtype in SHARED_KV_DTYPES and is_plain_conv1x1(self.k) and is_plain_conv1x1(self.v)

    def shared_queries(self, n: Tensor) -> tuple[Tensor, float]:
        """Return the queries that attend to n rather than to k(n), and the scale of their scores."""
        q = run_conv1x1(self.q, n)
        projection, scale = absorb_keys(self.k.weight, self.k.bias, compute_dtype(q))
        return conv1x1(q, projection), scale

    def _attend_shared(self, n: Tensor) -> Tensor:
        """Compute ``attention(q(n), k(n), v(n))`` with n as keys and values.

        v commutes with attention, whose weights sum to one: ``sum(p * v(n)) = v(sum(p * n))``.
        """
        n = n.to(compute_dtype(n))  # once, rather than in q and in attention
        q, scale = self.shared_queries(n)
        return run_conv1x1(self.v, spatial_shared_kv_attention(q, n, scale))

    def _project(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q(n), k(n) and v(n), from one convolution if all three are plain."""
        layers = (self.q, self.k, self.v)
        if not all(is_plain_conv(layer) and layer.bias is not None for layer in layers):
            return self.q(n), self.k(n), self.v(n)
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        q, k, v = F.conv2d(n, weight, bias).chunk(3, dim=1)
        return q, k, v


class Stage(nn.Module):
    """The layers of one level of the encoder or decoder."""

    downsample: Downsample
    upsample: Upsample

    def __init__(self) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()


class MiddleBlock(nn.Module):
    """The layers of the smallest map: two blocks, with attention between them if ``attends``."""

    def __init__(self, channels: int, dropout: float, attends: bool, zq_ch: int | None = None, add_conv: bool = False) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, dropout=dropout, zq_ch=zq_ch, add_conv=add_conv)
        self.attn_1 = AttnBlock(channels, zq_ch, add_conv) if attends else None
        self.block_2 = ResnetBlock(in_channels=channels, dropout=dropout, zq_ch=zq_ch, add_conv=add_conv)


def input_groups(layer: nn.Module | None) -> int:
    """Return the groups of the norm that reads a layer's input, 0 if the layer does not begin with one."""
    norm = layer.norm1 if isinstance(layer, ResnetBlock) else layer.norm if isinstance(layer, AttnBlock) else layer
    norm = norm.norm_layer if isinstance(norm, SpatialNorm) else norm
    return norm.num_groups if isinstance(norm, nn.GroupNorm) else 0


def blocks_with_pixels(layers: Iterable[nn.Module], pixels: int) -> Iterator[tuple[ResnetBlock, int]]:
    """Yield each ResnetBlock of a decoder's layers with its map's pixels. The first layer's map has the given number."""
    for layer in layers:
        if isinstance(layer, Upsample):
            pixels *= 4
        elif isinstance(layer, ResnetBlock):
            yield layer, pixels


def is_plain_network(network: nn.Module) -> bool:
    """True if the network has only known, unmodified layers, which may be computed without calling them."""
    return all(map(_is_plain_layer, submodules(network)[1:]))


CONTAINERS = (nn.Module, nn.ModuleList, Stage, MiddleBlock)
PLAIN_LAYERS = frozenset((*CONTAINERS, nn.Dropout, nn.GroupNorm, GroupNorm, SpatialNorm, ResnetBlock, AttnBlock, Upsample))


def _is_plain_layer(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return is_plain_conv(module)
    if type(module) is nn.Dropout and module.p != 0 and module.training:
        return False
    return type(module) in PLAIN_LAYERS and is_unmodified(module)
