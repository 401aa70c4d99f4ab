"""Group norms of every frame alone, from Mochi's autoencoder: a clip's frames are normalised as a batch of images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.functional import fused_spatial_norm
from ..ops.options import NormOptions
from .accelerated import Accelerated, can_compute, child_reason, count_call, is_computable, is_plain_instance, original_class
from .norms import group_norm_reason


def normalise_frames(f: Tensor, options: NormOptions) -> Tensor:
    """Return the group norm of every frame of ``(B, C, T, H, W)``, with the activation in ``options``."""
    frames = f.transpose(1, 2)
    normalised = fused_spatial_norm(frames.flatten(0, 1), None, None, options)
    out: Tensor = normalised.unflatten(0, frames.shape[:2]).transpose(1, 2)
    return out


class MochiChunkedGroupNorm3D(Accelerated):
    """``norm_layer(f)`` of every frame, all at once: diffusers takes eight frames at a time and concatenates the results."""

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return group_norm_reason("norm_layer", module.norm_layer)

    def forward(self: Any, x: Tensor, *args: Any) -> Tensor:
        serves = not args and can_compute(self, x) and not MochiChunkedGroupNorm3D.unsupported_reason(self)
        if not count_call(self, serves):
            return original_class(self).forward(self, x, *args)  # type: ignore[no-any-return]
        return normalise_frames(x, NormOptions.from_layer(self.norm_layer))

    def forward_with_silu(self: Any, f: Tensor) -> Tensor:
        """Return ``silu(forward(f))``."""
        if not is_computable(f, MochiChunkedGroupNorm3D.ranks):
            return F.silu(self(f))
        count_call(self, True)
        return normalise_frames(f, NormOptions.from_layer(self.norm_layer, "silu"))


class MochiResnetBlock3D(Accelerated):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``: each norm and its activation in one operator."""

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        for name in ("norm1", "norm2"):
            norm = getattr(module, name)
            reason = child_reason(name, norm, "MochiChunkedGroupNorm3D") or MochiChunkedGroupNorm3D.unsupported_reason(norm)
            if reason:
                return reason
        return child_reason("activation", module.nonlinearity, nn.SiLU)

    def forward(self: Any, inputs: Tensor, conv_cache: Any = None, *args: Any) -> Any:
        plain = MochiResnetBlock3D.unsupported_reason(self) is None and is_plain_instance(self.nonlinearity, nn.SiLU)
        if not count_call(self, not args and can_compute(self, inputs) and plain):
            return original_class(self).forward(self, inputs, conv_cache, *args)
        x, cache, new_cache = inputs, conv_cache or {}, {}
        h = MochiChunkedGroupNorm3D.forward_with_silu(self.norm1, x)
        h, new_cache["conv1"] = self.conv1(h, conv_cache=cache.get("conv1"))
        h = MochiChunkedGroupNorm3D.forward_with_silu(self.norm2, h)
        h, new_cache["conv2"] = self.conv2(h, conv_cache=cache.get("conv2"))
        return h + x, new_cache
