"""The residual block and the upsampling of CogVideoX's autoencoder."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.fusion import is_plain_conv3x3
from ..ops.clips import resize_frames
from ..ops.cpu_upsampling import prepare_upsample_conv
from ..ops.functional import upsample_conv
from ..ops.native import compute_dtype, is_inference
from ..ops.norm_into import can_normalise_into
from ..ops.options import NormOptions
from .accelerated import (
    Accelerated,
    can_compute,
    child_reason,
    count_call,
    is_plain_conv3d,
    is_plain_instance,
    original_class,
)
from .causal_convolution import (
    MIN_PART_PIXELS,
    causal_convolution,
    clip_format,
    equal_parts,
    frames_with_pixels,
    room_for_padding,
)
from .norms import can_fuse_group_norm, group_norm_reason, normalise_clip
from .upsampling import folding_pays
from .video_norms import CogVideoXSpatialNorm3D


class CogVideoXResnetBlock3D(Accelerated):
    """``shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x)))))))`` with causal convolutions.

    The norms are conditioned on the latent zq in the decoder, and group norms in the encoder. In inference, each norm
    writes its result behind the frames that pad the convolution's input.
    """

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        for name in ("norm1", "norm2"):
            norm = getattr(module, name)
            reason = group_norm_reason(name, norm)
            if hasattr(norm, "conv_y"):
                reason = child_reason(name, norm, "CogVideoXSpatialNorm3D")
                reason = reason or CogVideoXSpatialNorm3D.unsupported_reason(norm)
            if reason:
                return reason
        for name in ("conv1", "conv2"):
            conv = getattr(module, name)
            if reason := child_reason(name, conv, "CogVideoXCausalConv3d"):
                return reason
            if conv.pad_mode == "replicate":
                return f"its {name} repeats the border in space too"
        return child_reason("activation", module.nonlinearity, nn.SiLU)

    def forward(
        self: Any, inputs: Tensor, temb: Tensor | None = None, zq: Tensor | None = None, conv_cache: Any = None, *args: Any
    ) -> Any:
        served = not args and can_compute(self, inputs) and CogVideoXResnetBlock3D.can_fuse(self, inputs, zq)
        if not count_call(self, served):
            return original_class(self).forward(self, inputs, temb, zq, conv_cache, *args)
        x, cache = inputs, conv_cache or {}
        new_cache: dict[str, Any] = {}
        # Rebinding h frees each map as soon as the next one exists.
        h, padded = _normalise(self.norm1, x, zq, self.conv1, cache.get("conv1"))
        h, new_cache["conv1"] = causal_convolution(self.conv1, h, cache.get("conv1"), padded)
        if temb is not None:
            h = h + self.temb_proj(self.nonlinearity(temb))[:, :, None, None, None]
        h, padded = _normalise(self.norm2, h, zq, self.conv2, cache.get("conv2"), owned=is_plain_conv3d(self.conv1.conv))
        dropped = self.dropout(h)
        h, padded = dropped, padded if dropped is h else None
        h, new_cache["conv2"] = causal_convolution(self.conv2, h, cache.get("conv2"), padded)
        del padded, dropped
        if zq is not None:
            new_cache |= {name: CogVideoXSpatialNorm3D.empty_cache() for name in ("norm1", "norm2")}
        if self.in_channels != self.out_channels:
            if self.use_conv_shortcut:
                x, new_cache["conv_shortcut"] = self.conv_shortcut(x, conv_cache=cache.get("conv_shortcut"))
            else:
                x = self.conv_shortcut(x)
        owned = is_plain_conv3d(self.conv2.conv) and h.dtype == x.dtype and h.shape == x.shape and is_inference(h, x)
        return h.add_(x) if owned else h + x, new_cache

    def can_fuse(self: Any, x: Tensor, zq: Tensor | None) -> bool:
        """True if both norms can be computed with their activation; norm2's map has x's size."""
        if CogVideoXResnetBlock3D.unsupported_reason(self) or not is_plain_instance(self.nonlinearity, nn.SiLU):
            return False
        norms = (self.norm1, self.norm2)
        if zq is None:
            return all(can_fuse_group_norm(norm, self.nonlinearity) for norm in norms)
        return all(hasattr(norm, "conv_y") and CogVideoXSpatialNorm3D.can_modulate(norm, x, zq) for norm in norms)


def _normalise(
    norm: Any, x: Tensor, zq: Tensor | None, conv: Any, conv_cache: Tensor | None, owned: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return ``silu(norm(x, zq))`` and, if it was written behind room for conv's padding, that room with it.

    owned: x may be overwritten.
    """
    padded = out = None
    if can_normalise_into(x, zq, conv_cache, *norm.parameters()):
        padded = room_for_padding(conv, x, conv_cache)
        if padded is not None:
            out = padded[:, :, -x.shape[2] :]
        elif owned and x.is_contiguous(memory_format=clip_format(x)):
            out = x
    if zq is None:
        return normalise_clip(x, None, None, NormOptions.from_layer(norm, "silu"), out), padded
    return CogVideoXSpatialNorm3D.modulated(norm, x, zq, "silu", out), padded


class CogVideoXUpsample3D(Accelerated):
    """``conv(upsample(x))`` of every frame, as one convolution of the small frame; nearest along time too, on request.

    Frames are convolved before they are repeated: diffusers repeats them first.
    """

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return None if is_plain_conv3x3(module.conv) else "its convolution is replaced, hooked or not a padded 3x3"

    def forward(self: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        conv = self.conv
        if not count_call(self, not args and not kwargs and can_compute(self, inputs) and is_plain_conv3x3(conv)):
            return original_class(self).forward(self, inputs, *args, **kwargs)  # type: ignore[no-any-return]
        if not inputs.is_cuda and is_inference(inputs, *conv.parameters()):
            return upsample_in_parts(self, inputs)
        x = upsampled_frames(self, enlarge_clip(functools.partial(enlarge_frames, conv), inputs))
        return x.contiguous(memory_format=clip_format(x))


def upsample_in_parts(module: Any, x: Tensor) -> Tensor:
    """Return CogVideoXUpsample3D's result, computed for some frames at a time.

    On a CPU, the convolution takes as much memory again as its result, and so does the result's layout.
    """
    conv, batch, frames = module.conv, x.shape[0], x.shape[2]
    numbers = torch.arange(frames, dtype=torch.float32).view(1, 1, -1, 1, 1)
    sources = upsampled_frames(module, numbers).flatten().int().tolist()  # of each frame of the result, ascending
    upsample = prepare_upsample_conv(conv.weight, conv.bias, compute_dtype(x), x.numel() // x.shape[1])
    out: Any = None
    for first, last in equal_parts(frames, frames_with_pixels(x, MIN_PART_PIXELS)):
        large = enlarge_clip(upsample, x[:, :, first:last])
        if out is None:
            shape = (batch, large.shape[1], len(sources), *large.shape[3:])
            out = torch.empty(shape, dtype=large.dtype, device=x.device, memory_format=clip_format(x))
        start, end = bisect_left(sources, first), bisect_left(sources, last)
        out[:, :, start:end] = large[:, :, [source - first for source in sources[start:end]]]
    return out  # type: ignore[no-any-return]


def enlarge_clip(upsample: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``upsample(x)`` of each frame of a clip ``(B, C, T, H, W)``."""
    frames = x.transpose(1, 2)
    large: Tensor = upsample(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    return large.transpose(1, 2)


def enlarge_frames(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return ``conv(upsample(x))`` of frames ``(B * T, C, H, W)``, nearest 2x."""
    return upsample_conv(x, conv.weight, conv.bias) if folding_pays(x, conv.weight) else conv(F.interpolate(x, scale_factor=2.0))


def upsampled_frames(module: Any, x: Tensor) -> Tensor:
    """Return the clip with its frames repeated as CogVideoXUpsample3D does, all but the first where their number is odd."""
    frames = x.shape[2]
    if not module.compress_time or frames == 1:
        return x
    odd = frames % 2
    return resize_frames(x, 2 * frames - odd, x.shape[3], split_first_frame=odd == 1)
