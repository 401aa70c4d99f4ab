"""diffusers' group norms and spatial norms, alone and together with the activation that follows."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.fusion import is_plain_conv1x1, is_unmodified
from ..model.modulation import modulate
from ..ops.functional import fused_spatial_norm
from ..ops.native import is_tracing
from ..ops.norm_into import can_normalise_into, spatial_norm_into
from ..ops.options import NormOptions
from .accelerated import Accelerated, can_compute, child_reason, count_call, is_computable, is_plain_instance, original_class
from .causal_convolution import clip_format


class GroupNorm(Accelerated):
    """``group_norm(f)`` of a feature map or a clip."""

    ranks = (4, 5)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return None

    def forward(self: Any, input: Tensor) -> Tensor:
        if not count_call(self, can_compute(self, input)):
            return nn.GroupNorm.forward(self, input)
        return fused_spatial_norm(input, None, None, NormOptions.from_layer(self))

    def forward_with_silu(self: Any, f: Tensor) -> Tensor:
        """Return ``silu(group_norm(f))``."""
        if not is_computable(f, GroupNorm.ranks):
            return F.silu(self(f))
        count_call(self, True)
        options = NormOptions.from_layer(self, "silu")
        return normalise_clip(f, None, None, options) if f.dim() == 5 else fused_spatial_norm(f, None, None, options)


class SpatialNorm(Accelerated):
    """``norm_layer(f) * conv_y(zq) + conv_b(zq)``, zq resized to f; KVAE's may convolve the resized zq first."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if reason := group_norm_reason("norm_layer", module.norm_layer):
            return reason
        plain = all(is_plain_conv1x1(conv) and conv.bias is not None for conv in (module.conv_y, module.conv_b))
        return None if plain else "its conv_y or conv_b is replaced or hooked"

    def forward(self: Any, f: Tensor, zq: Tensor) -> Tensor:
        if not (can_compute(self, f) and SpatialNorm.can_modulate(self, f, zq)):
            count_call(self, False)
            return original_class(self).forward(self, f, zq)  # type: ignore[no-any-return]
        return SpatialNorm.modulated(self, f, zq)

    def can_modulate(self: Any, f: Tensor, zq: Tensor) -> bool:
        """True if f and zq fit and, in KVAE, whose blocks are diffusers' own, fewer elements are read and written than there."""
        supported = SpatialNorm.unsupported_reason(self) is None
        if not supported or not isinstance(zq, Tensor) or zq.dim() != 4 or zq.shape[0] != f.shape[0]:
            return False
        if not hasattr(self, "add_conv") or not has_extra_pass(f):
            return True
        return not self.add_conv and zq.shape[2] * zq.shape[3] < f.shape[2] * f.shape[3]

    def modulated(self: Any, f: Tensor, zq: Tensor, activation: str | None = None, f_bias: Tensor | None = None) -> Tensor:
        """``act(norm_layer(f + f_bias) * conv_y(zq) + conv_b(zq))``."""
        count_call(self, True)
        if getattr(self, "add_conv", False):
            zq = self.conv(F.interpolate(zq, size=f.shape[2:], mode="nearest"))
        if f.is_cuda or not f.is_contiguous():
            ((y, b),) = modulate([self], zq)
        else:  # in f's layout: on a CPU, mixed layouts cost more than one product for both saves
            zq = zq.contiguous()
            y, b = self.conv_y(zq), self.conv_b(zq)
        return fused_spatial_norm(f, y, b, NormOptions.from_layer(self.norm_layer, activation, f_bias))


def normalise_clip(f: Tensor, y: Tensor | None, b: Tensor | None, options: NormOptions, out: Tensor | None = None) -> Tensor:
    """`spatial_norm` of a clip. In inference it writes to `out`, and on a CPU takes fewer passes.

    Args:
        f, y, b, options: as for `spatial_norm`.
        out: memory for the result, see `spatial_norm_into`; only where `can_normalise_into` allows.
    """
    if out is None and can_normalise_into(f, y, b, options.weight, options.bias):
        f = f.contiguous(memory_format=clip_format(f))
        out = torch.empty_like(f)
    return fused_spatial_norm(f, y, b, options) if out is None else spatial_norm_into(out, f, y, b, options)


def has_extra_pass(f: Tensor) -> bool:
    """True where our norm reads and writes f once more than PyTorch's, for accurate statistics: see `native.spatial_norm`."""
    return not is_tracing() and f.device.type == "cpu" and f.itemsize >= 4 and not f.is_contiguous()


def group_norm_reason(name: str, norm: Any) -> str | None:
    return child_reason(name, norm, nn.GroupNorm)


def spatial_norm_reason(name: str, norm: Any) -> str | None:
    expected = import_module("diffusers.models.attention_processor").SpatialNorm
    return child_reason(name, norm, expected) or SpatialNorm.unsupported_reason(norm)


def can_fuse_group_norm(norm: Any, activation: Any) -> bool:
    return original_class(norm) is nn.GroupNorm and is_unmodified(norm) and is_plain_instance(activation, nn.SiLU)


def apply_group_norm(
    norm: Any, activation: Any, f: Tensor, y: Tensor | None = None, b: Tensor | None = None, f_bias: Tensor | None = None
) -> Tensor:
    """``activation(norm(f + f_bias) * y + b)``; f_bias only if can_fuse_group_norm was True."""
    if f_bias is not None or can_fuse_group_norm(norm, activation):
        count_call(norm, True)
        return fused_spatial_norm(f, y, b, NormOptions.from_layer(norm, "silu", f_bias))
    out = norm(f)
    return activation(out if y is None or b is None else out * y + b)  # type: ignore[no-any-return]


def can_fuse_spatial_norm(norm: Any, activation: Any, f: Tensor, zq: Tensor) -> bool:
    accelerated = isinstance(norm, SpatialNorm) and is_unmodified(norm)
    return accelerated and SpatialNorm.can_modulate(norm, f, zq) and is_plain_instance(activation, nn.SiLU)


def apply_spatial_norm(norm: Any, activation: Any, f: Tensor, zq: Tensor, f_bias: Tensor | None = None) -> Tensor:
    """``activation(norm(f + f_bias, zq))``; f_bias only if can_fuse_spatial_norm was True: it may be False by now."""
    if f_bias is not None or can_fuse_spatial_norm(norm, activation, f, zq):
        return SpatialNorm.modulated(norm, f, zq, "silu", f_bias)
    return activation(norm(f, zq))  # type: ignore[no-any-return]
