"""The residual block of KVAE's video autoencoder."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops.norm_into import can_normalise_into
from .accelerated import Accelerated, can_compute, child_reason, count_call, original_class
from .replicated_border import KVAECachedCausalConv3d
from .video_norms import KVAECachedSpatialNorm3D, cached_group_norm_reason, normalise_cached


class KVAECachedResnetBlock3D(Accelerated):
    """``shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))``: each norm and its activation in one operator.

    The norms are conditioned on the latent zq in the decoder, and group norms in the encoder. In inference on a CPU each norm of
    a later segment writes its result behind the cached frames that pad the convolution's input.
    """

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        for name in ("norm1", "norm2"):
            norm = getattr(module, name)
            if hasattr(norm, "conv_y"):
                reason = child_reason(name, norm, "KVAECachedSpatialNorm3D")
                reason = reason or KVAECachedSpatialNorm3D.unsupported_reason(norm)
            else:
                reason = cached_group_norm_reason(name, norm)
            if reason:
                return reason
        return None

    def forward(self: Any, x: Tensor, temb: Tensor | None, layer_cache: Any, zq: Tensor | None = None, *args: Any) -> Tensor:
        if not count_call(self, not args and can_compute(self, x) and KVAECachedResnetBlock3D.can_fuse(self, x, zq)):
            return original_class(self).forward(self, x, temb, layer_cache, zq, *args)  # type: ignore[no-any-return]
        h = _convolve_normalised(self.norm1, self.conv1, x, zq, layer_cache["norm1"], layer_cache["conv1"])
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None, None]
        h = _convolve_normalised(self.norm2, self.conv2, h, zq, layer_cache["norm2"], layer_cache["conv2"])
        if self.in_channels != self.out_channels:
            if self.use_conv_shortcut:
                x = self.conv_shortcut(x, cache=layer_cache["conv_shortcut"])
            else:
                x = self.nin_shortcut(x)
        out: Tensor = x + h
        return out

    def can_fuse(self: Any, x: Tensor, zq: Tensor | None) -> bool:
        """True if both norms can be computed with their activation; norm2's map has x's size."""
        norms = (self.norm1, self.norm2)
        if KVAECachedResnetBlock3D.unsupported_reason(self) or any(hasattr(norm, "conv_y") == (zq is None) for norm in norms):
            return False
        return zq is None or all(KVAECachedSpatialNorm3D.can_modulate(norm, x, zq) for norm in norms)


def _convolve_normalised(norm: Any, conv: Any, x: Tensor, zq: Tensor | None, norm_cache: Any, conv_cache: Any) -> Tensor:
    """``conv(silu(norm(x, zq, norm_cache)), conv_cache)``."""
    writes = can_normalise_into(x, zq, conv_cache["padding"], *norm.parameters())
    padded = KVAECachedCausalConv3d.room_behind_cache(conv, x, conv_cache) if writes else None
    if padded is None:
        return conv(_normalise(norm, x, zq, norm_cache), cache=conv_cache)  # type: ignore[no-any-return]
    _normalise(norm, x, zq, norm_cache, padded[:, :, -x.shape[2] :])
    return KVAECachedCausalConv3d.convolve_behind_cache(conv, padded, conv_cache)


def _normalise(norm: Any, x: Tensor, zq: Tensor | None, cache: Any, out: Tensor | None = None) -> Tensor:
    """``silu(norm(x, zq, cache))``; see `normalise_clip` for out."""
    if zq is None:
        return normalise_cached(norm, x, cache, "silu", out)
    return KVAECachedSpatialNorm3D.modulated(norm, x, zq, cache, "silu", out)
