"""diffusers' group norms and spatial norms, alone and together with the activation that follows."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..model.fusion import is_plain_conv1x1, is_plain_group_norm, is_unmodified
from ..model.modulation import modulate
from ..ops.functional import fused_spatial_norm
from ..ops.options import NormOptions
from .accelerated import Accelerated, can_compute, child_reason, is_plain_instance, original_class


class GroupNorm(Accelerated):
    """``group_norm(f)`` of a feature map."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return None

    def forward(self: Any, input: Tensor) -> Tensor:
        if not can_compute(self, input):
            return nn.GroupNorm.forward(self, input)
        return fused_spatial_norm(input, None, None, NormOptions.from_layer(self))


class SpatialNorm(Accelerated):
    """``norm_layer(f) * conv_y(zq) + conv_b(zq)``, zq resized to f; KVAE's may convolve the resized zq first."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if reason := group_norm_reason("norm_layer", module.norm_layer):
            return reason
        plain = all(is_plain_conv1x1(conv) and conv.bias is not None for conv in (module.conv_y, module.conv_b))
        return None if plain else "its conv_y or conv_b is replaced or hooked"

    def forward(self: Any, f: Tensor, zq: Tensor) -> Tensor:
        if not can_compute(self, f) or not self.can_modulate(f, zq):
            return original_class(self).forward(self, f, zq)  # type: ignore[no-any-return]
        return self.modulated(f, zq)  # type: ignore[no-any-return]

    def can_modulate(self: Any, f: Tensor, zq: Tensor) -> bool:
        supported = SpatialNorm.unsupported_reason(self) is None
        return supported and isinstance(zq, Tensor) and zq.dim() == 4 and zq.shape[0] == f.shape[0]

    def modulated(self: Any, f: Tensor, zq: Tensor, activation: str | None = None, f_bias: Tensor | None = None) -> Tensor:
        """``act(norm_layer(f + f_bias) * conv_y(zq) + conv_b(zq))``."""
        if getattr(self, "add_conv", False):
            zq = self.conv(F.interpolate(zq, size=f.shape[2:], mode="nearest"))
        ((y, b),) = modulate([self], zq)
        return fused_spatial_norm(f, y, b, NormOptions.from_layer(self.norm_layer, activation, f_bias))


def group_norm_reason(name: str, norm: Any) -> str | None:
    return child_reason(name, norm, nn.GroupNorm)


def spatial_norm_reason(name: str, norm: Any) -> str | None:
    expected = import_module("diffusers.models.attention_processor").SpatialNorm
    return child_reason(name, norm, expected) or SpatialNorm.unsupported_reason(norm)


def can_fuse_group_norm(norm: Any, activation: Any) -> bool:
    return is_plain_group_norm(norm) and is_plain_instance(activation, nn.SiLU)


def apply_group_norm(
    norm: Any, activation: Any, f: Tensor, y: Tensor | None = None, b: Tensor | None = None, f_bias: Tensor | None = None
) -> Tensor:
    """``activation(norm(f + f_bias) * y + b)``; f_bias only if can_fuse_group_norm."""
    if can_fuse_group_norm(norm, activation):
        return fused_spatial_norm(f, y, b, NormOptions.from_layer(norm, "silu", f_bias))
    out = norm(f)
    return activation(out if y is None or b is None else out * y + b)  # type: ignore[no-any-return]


def can_fuse_spatial_norm(norm: Any, activation: Any, f: Tensor, zq: Tensor) -> bool:
    accelerated = isinstance(norm, SpatialNorm) and is_unmodified(norm)
    return accelerated and norm.can_modulate(f, zq) and is_plain_instance(activation, nn.SiLU)


def apply_spatial_norm(norm: Any, activation: Any, f: Tensor, zq: Tensor, f_bias: Tensor | None = None) -> Tensor:
    """``activation(norm(f + f_bias, zq))``; f_bias only if can_fuse_spatial_norm."""
    if can_fuse_spatial_norm(norm, activation, f, zq):
        return norm.modulated(f, zq, "silu", f_bias)  # type: ignore[no-any-return]
    return activation(norm(f, zq))  # type: ignore[no-any-return]
