"""diffusers' spatial norms of clips."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops import clips
from ..ops.native import is_inference
from ..ops.options import NormOptions
from .accelerated import Accelerated, can_compute, child_reason, count_call, is_computable, is_plain_conv3d, original_class
from .causal_convolution import clip_format
from .norms import group_norm_reason, normalise_clip


class CogVideoXSpatialNorm3D(Accelerated):
    """``norm_layer(f) * conv_y(zq) + conv_b(zq)``, zq resized to f; of an odd number of frames, the first apart.

    conv_y and conv_b are 1x1x1, so they take zq before its resize. diffusers' caches of them are never read: we return None.
    """

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        reason = group_norm_reason("norm_layer", module.norm_layer)
        for name in ("conv_y", "conv_b"):
            reason = reason or child_reason(name, getattr(module, name), "CogVideoXCausalConv3d")
        return reason or pointwise_reason(module.conv_y.conv, module.conv_b.conv)

    def forward(self: Any, f: Tensor, zq: Tensor, conv_cache: Any = None, *args: Any, **kwargs: Any) -> Any:
        serves = not args and not kwargs and can_compute(self, f) and CogVideoXSpatialNorm3D.can_modulate(self, f, zq)
        if not serves:
            count_call(self, False)
            return original_class(self).forward(self, f, zq, conv_cache, *args, **kwargs)
        return CogVideoXSpatialNorm3D.modulated(self, f, zq), CogVideoXSpatialNorm3D.empty_cache()

    def forward_with_silu(self: Any, f: Tensor, zq: Tensor, conv_cache: Any = None) -> Any:
        """Return what forward returns, with SiLU of the result."""
        if not (is_computable(f, CogVideoXSpatialNorm3D.ranks) and CogVideoXSpatialNorm3D.can_modulate(self, f, zq)):
            out, cache = self(f, zq, conv_cache=conv_cache)
            return F.silu(out), cache
        return CogVideoXSpatialNorm3D.modulated(self, f, zq, "silu"), CogVideoXSpatialNorm3D.empty_cache()

    @staticmethod
    def empty_cache() -> dict[str, None]:
        """Return the cache of a spatial norm as diffusers names its parts."""
        return {"conv_y": None, "conv_b": None}

    def can_modulate(self: Any, f: Tensor, zq: Any) -> bool:
        return fits_clip(zq, f) and CogVideoXSpatialNorm3D.unsupported_reason(self) is None

    def modulated(self: Any, f: Tensor, zq: Tensor, activation: str | None = None, out: Tensor | None = None) -> Tensor:
        """``activation(norm_layer(f) * conv_y(zq) + conv_b(zq))``; see `normalise_clip` for out."""
        for part in (self, self.conv_y, self.conv_b):
            count_call(part, True)
        zq = zq.contiguous(memory_format=clip_format(f))  # operators are slow on maps of two layouts
        frames = f.shape[2]
        options = NormOptions.from_layer(self.norm_layer, activation, split_first_frame=frames > 1 and frames % 2 == 1)
        return normalise_clip(f, self.conv_y.conv(zq), self.conv_b.conv(zq), options, out)


class KVAECachedSpatialNorm3D(Accelerated):
    """KVAE's SpatialNorm of a segment of a clip: the first frame is apart in the first segment, which the cache tells."""

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if module.add_conv:
            return "it convolves the resized latent"
        if reason := cached_group_norm_reason("norm_layer", module.norm_layer):
            return reason
        return pointwise_reason(module.conv_y, module.conv_b)

    def forward(self: Any, f: Tensor, zq: Tensor, cache: Any, *args: Any, **kwargs: Any) -> Tensor:
        serves = not args and not kwargs and can_compute(self, f) and KVAECachedSpatialNorm3D.can_modulate(self, f, zq)
        if not serves:
            count_call(self, False)
            return original_class(self).forward(self, f, zq, cache, *args, **kwargs)  # type: ignore[no-any-return]
        return KVAECachedSpatialNorm3D.modulated(self, f, zq, cache)

    def can_modulate(self: Any, f: Tensor, zq: Any) -> bool:
        return fits_clip(zq, f) and KVAECachedSpatialNorm3D.unsupported_reason(self) is None

    def modulated(
        self: Any, f: Tensor, zq: Tensor, cache: Any, activation: str | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``activation(norm_layer(f) * conv_y(zq) + conv_b(zq))``; see `normalise_clip` for out."""
        count_call(self, True)
        norm, is_first_segment = self.norm_layer.norm_layer, _start_segment(cache["norm"])
        zq = zq.contiguous(memory_format=clip_format(f))
        options = NormOptions.from_layer(norm, activation, split_first_frame=is_first_segment)
        return normalise_clip(f, self.conv_y(zq), self.conv_b(zq), options, out)


def cached_group_norm_reason(name: str, norm: Any) -> str | None:
    """Return why a KVAECachedGroupNorm is not a plain group norm, or None if it is."""
    return child_reason(name, norm, "KVAECachedGroupNorm") or group_norm_reason(f"{name}.norm_layer", norm.norm_layer)


def normalise_cached(norm: Any, f: Tensor, cache: Any, activation: str, out: Tensor | None = None) -> Tensor:
    """``activation(norm(f, cache))`` of a KVAECachedGroupNorm; see `normalise_clip` for out."""
    if cache is not None:
        _start_segment(cache)
    return normalise_clip(f, None, None, NormOptions.from_layer(norm.norm_layer, activation), out)


def _start_segment(cache: Any) -> bool:
    """Return whether a group norm's cache says that this is the first segment, and make it say that it was."""
    is_first = cache.get("mean") is None and cache.get("var") is None
    if is_first:
        cache["mean"] = cache["var"] = 1
    return is_first


class Kandinsky6SRSpatialNorm3D(Accelerated):
    """``norm_layer(f) * conv_y(zq) + conv_b(zq)`` with an RMS norm over channels, which is diffusers'.

    The latent is convolved on its own grid and never resized to f.
    """

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return pointwise_reason(module.conv_y, module.conv_b)

    def forward(self: Any, hidden_states: Tensor, zq: Tensor, cache: Any, *args: Any, **kwargs: Any) -> Tensor:
        f = hidden_states
        plain = fits_clip(zq, f) and Kandinsky6SRSpatialNorm3D.unsupported_reason(self) is None
        if args or kwargs or not can_compute(self, f) or not plain:
            count_call(self, False)
            return original_class(self).forward(self, f, zq, cache, *args, **kwargs)  # type: ignore[no-any-return]
        return Kandinsky6SRSpatialNorm3D.modulated(self, f, zq, cache)

    def modulated(self: Any, f: Tensor, zq: Tensor, cache: Any) -> Tensor:
        """``norm_layer(f) * conv_y(zq) + conv_b(zq)``."""
        count_call(self, True)
        maps = (clips.modulation_map(conv(zq), f, cache["is_first_segment"]) for conv in (self.conv_y, self.conv_b))
        y, b = (clips.widen(zq_map, f.shape[4]) for zq_map in maps)
        cache["is_first_segment"] = False
        # Any other norm layer may return f itself, or a hook may hold its result.
        owned = child_reason("norm_layer", self.norm_layer, "Kandinsky6VAERMSNorm") is None
        normalised = self.norm_layer(f)
        owned &= is_inference(normalised, y, b) and normalised.dtype == y.dtype == b.dtype
        owned &= normalised.is_contiguous(memory_format=clip_format(normalised))
        return clips.scale_rows(normalised, y, b, normalised if owned else None)


def fits_clip(zq: Any, f: Tensor) -> bool:
    """True if zq is a clip of f's batch size."""
    return isinstance(zq, Tensor) and zq.dim() == 5 and zq.shape[0] == f.shape[0] and zq.numel() > 0


def pointwise_reason(conv_y: Any, conv_b: Any) -> str | None:
    """Return why one is not a plain 1x1x1 convolution, which commutes with a nearest resize, or None if both are."""
    plain = all(is_plain_conv3d(conv) and conv.kernel_size == (1, 1, 1) for conv in (conv_y, conv_b))
    return None if plain else "its conv_y or conv_b is replaced or hooked"
