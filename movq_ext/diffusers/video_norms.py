"""diffusers' spatial norms of clips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.functional import fused_spatial_norm
from ..ops.norm_into import can_normalise_into, spatial_norm_into
from ..ops.options import NormOptions
from .accelerated import Accelerated, can_compute_clip, count_call, named_child_reason, original_class
from .causal_convolution import clip_format, is_plain_conv3d
from .norms import group_norm_reason


class CogVideoXSpatialNorm3D(Accelerated):
    """``norm_layer(f) * conv_y(zq) + conv_b(zq)``, zq resized to f; of an odd number of frames, the first apart.

    conv_y and conv_b are 1x1x1, so they take zq before its resize. diffusers' caches of them are never read: we return None.
    """

    takes_clips = True

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        reason = group_norm_reason("norm_layer", module.norm_layer)
        for name in ("conv_y", "conv_b"):
            reason = reason or named_child_reason(name, getattr(module, name), "CogVideoXCausalConv3d")
        if reason:
            return reason
        plain = all(is_pointwise(conv.conv) for conv in (module.conv_y, module.conv_b))
        return None if plain else "its conv_y or conv_b is replaced or hooked"

    def forward(self: Any, f: Tensor, zq: Tensor, conv_cache: Any = None, *args: Any, **kwargs: Any) -> Any:
        serves = not args and not kwargs and can_compute_clip(self, f) and CogVideoXSpatialNorm3D.can_modulate(self, f, zq)
        if not count_call(self, serves):
            return original_class(self).forward(self, f, zq, conv_cache, *args, **kwargs)
        return CogVideoXSpatialNorm3D.modulated(self, f, zq), CogVideoXSpatialNorm3D.empty_cache()

    @staticmethod
    def empty_cache() -> dict[str, None]:
        """Return the cache of a spatial norm as diffusers names its parts."""
        return {"conv_y": None, "conv_b": None}

    def can_modulate(self: Any, f: Tensor, zq: Any) -> bool:
        fits = isinstance(zq, Tensor) and zq.dim() == 5 and zq.shape[0] == f.shape[0] and zq.numel() > 0
        return fits and CogVideoXSpatialNorm3D.unsupported_reason(self) is None

    def modulated(self: Any, f: Tensor, zq: Tensor, activation: str | None = None, out: Tensor | None = None) -> Tensor:
        """``activation(norm_layer(f) * conv_y(zq) + conv_b(zq))``; see `normalise_clip` for out."""
        zq = zq.contiguous(memory_format=clip_format(f))  # operators are slow on maps of two layouts
        frames = f.shape[2]
        options = NormOptions.from_layer(self.norm_layer, activation, split_first_frame=frames > 1 and frames % 2 == 1)
        return normalise_clip(f, self.conv_y.conv(zq), self.conv_b.conv(zq), options, out)


def normalise_clip(f: Tensor, y: Tensor | None, b: Tensor | None, options: NormOptions, out: Tensor | None = None) -> Tensor:
    """`spatial_norm` of a clip, in inference on a CPU with fewer passes over it.

    Args:
        f, y, b, options: as for `spatial_norm`.
        out: memory for the result, see `spatial_norm_into`; only where `can_normalise_into` allows.
    """
    if out is None and can_normalise_into(f, y, b, options.weight, options.bias):
        f = f.contiguous(memory_format=clip_format(f))
        out = torch.empty_like(f)
    return fused_spatial_norm(f, y, b, options) if out is None else spatial_norm_into(out, f, y, b, options)


def is_pointwise(layer: Any) -> bool:
    """True for a plain 1x1x1 convolution, which commutes with a nearest resize."""
    return is_plain_conv3d(layer) and layer.kernel_size == (1, 1, 1)
