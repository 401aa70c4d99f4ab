"""Causal convolutions whose padding repeats the border of every frame, without a padded copy of the clip.

A convolution that pads with zeros lacks, in the first and last row and column, the taps that fall on repeated pixels. They are
convolutions of one row or column, added to the result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.fusion import is_unmodified
from ..ops.native import compute_dtype, is_inference, is_tracing
from .accelerated import Accelerated, can_compute, count_call, is_plain_conv3d, original_class
from .causal_convolution import (
    MAX_ELEMENTS,
    CausalConv3d,
    clip_format,
    convolve,
    convolve_folding_padding,
    repeated_first_frame,
    without_border,
)

# Pixels per frame, times the batch size. A first clip needs as many as folding does (see causal_convolution.py). Later clips,
# which cannot be folded, take as long as diffusers' from about 48x48, where the border is small.
MIN_PIXELS_FIRST, MIN_PIXELS_LATER = 512, 2048


class HunyuanVideoCausalConv3d(Accelerated):
    """``conv(pad(x))`` of a whole clip, padded with its border and its first frame."""

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if module.pad_mode != "replicate":
            return f"its pad_mode is {module.pad_mode}"
        if (reason := convolution_reason(module.conv)) is not None:
            return reason
        frames, height, width = module.conv.kernel_size
        fits = tuple(module.time_causal_padding) == (width // 2, width // 2, height // 2, height // 2, frames - 1, 0)
        return None if fits else "its padding does not fit its kernel"

    def forward(self: Any, hidden_states: Tensor, *args: Any) -> Tensor:
        x = hidden_states
        serves = can_compute(self, x) and not HunyuanVideoCausalConv3d.unsupported_reason(self) and pays(x, None)
        if not count_call(self, not args and serves):
            return original_class(self).forward(self, x, *args)  # type: ignore[no-any-return]
        return convolve_replicating(self.conv, x, None)


class CogVideoXCausalConv3d(CausalConv3d):
    """CogVideoX's `CausalConv3d`, and Mochi's, which repeats the border and keeps no cache."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return convolution_reason(module.conv) if module.pad_mode == "replicate" else super().unsupported_reason(module)

    def forward(self: Any, inputs: Tensor, conv_cache: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.pad_mode != "replicate":
            return CausalConv3d.forward(self, inputs, conv_cache, *args, **kwargs)
        serves = can_compute(self, inputs) and convolution_reason(self.conv) is None and pays(inputs, None)
        if not count_call(self, not args and not kwargs and serves):
            return original_class(self).forward(self, inputs, conv_cache, *args, **kwargs)
        return convolve_replicating(self.conv, inputs, None), None


class KVAECachedCausalConv3d(Accelerated):
    """`HunyuanVideoCausalConv3d` of a segment of a clip, whose cache holds the padded last frames of the segment before."""

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return convolution_reason(module.conv)

    def forward(self: Any, input: Tensor, cache: Any, *args: Any, **kwargs: Any) -> Tensor:
        x = input
        serves, before = KVAECachedCausalConv3d.frames_before(self, x, cache)
        if not count_call(self, not args and not kwargs and serves):
            return original_class(self).forward(self, x, cache, *args, **kwargs)  # type: ignore[no-any-return]
        return KVAECachedCausalConv3d.convolved(self, x, before, cache)

    def frames_before(self: Any, x: Tensor, cache: Any) -> tuple[bool, Tensor | None]:
        """Return whether x can be convolved here and pays, and the frames before it: None to repeat its first."""
        frames = self.time_pad
        serves = can_compute(self, x) and frames > 0 and convolution_reason(self.conv) is None
        before = None if cache["padding"] is None else without_border(cache["padding"], self.height_pad, self.width_pad)
        if serves and before is None and not is_inference(x, *self.conv.parameters()):
            # Gradient checkpointing computes a segment again with the cache that it left, and must then record the same
            # operators: the first segment is padded like later ones.
            before = repeated_first_frame(x, frames)
        serves = serves and pays(x, before)
        return serves and (before is None or before.shape == (*x.shape[:2], frames, *x.shape[3:])), before

    def convolved(self: Any, x: Tensor, before: Tensor | None, cache: Any, padded: Tensor | None = None) -> Tensor:
        """Return the convolution, and store the padded last frames in the cache. padded: see `convolve_replicating`."""
        out = convolve_replicating(self.conv, x, before, padded)
        # Like diffusers, of a single frame it caches only this one, not its repetitions.
        cache["padding"] = replicate_border(x[:, :, x.shape[2] - self.time_pad :], self.height_pad, self.width_pad)
        return out.to(x.dtype)  # which autocast changes

    @staticmethod
    def room_behind_cache(module: Any, x: Tensor, cache: Any) -> Tensor | None:
        """Return memory ``(B, C, padding + T, H, W)`` for the input of a convolution, which begins with the cached frames.

        None if a call of the module is not to be replaced by `convolve_behind_cache`, or if nothing is cached.

        Args:
            module: any layer.
            x: a clip of the shape and layout of its input.
            cache: of the module.
        """
        if not isinstance(module, KVAECachedCausalConv3d) or not is_unmodified(module) or cache["padding"] is None:
            return None
        serves, before = KVAECachedCausalConv3d.frames_before(module, x, cache)
        if not serves or before is None:
            return None
        shape = (*x.shape[:2], before.shape[2] + x.shape[2], *x.shape[3:])
        padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=clip_format(x))
        padded[:, :, : before.shape[2]] = before
        return padded

    @staticmethod
    def convolve_behind_cache(module: Any, padded: Tensor, cache: Any) -> Tensor:
        """Return what a call of the module returns for the last frames of `room_behind_cache`, without copying them."""
        count_call(module, True)
        before, x = padded[:, :, : module.time_pad], padded[:, :, module.time_pad :]
        return KVAECachedCausalConv3d.convolved(module, x, before, cache, padded)


def convolution_reason(conv: Any) -> str | None:
    """Return why a convolution cannot be computed here, or None if it can."""
    if tuple(getattr(conv, "stride", (1, 1, 1))) != (1, 1, 1):
        return "it skips frames or pixels"
    plain = is_plain_conv3d(conv) and tuple(conv.padding) == (0, 0, 0) and conv.kernel_size[1:] in ((1, 1), (3, 3))
    return None if plain else "its convolution is replaced, hooked or not 1x1 or 3x3 in space"


def pays(x: Tensor, before: Tensor | None) -> bool:
    """True if the frames are so large that the convolution takes no longer than diffusers', which copies the clip.

    On a GPU it is not measured, and used only for images, where folding saves the most. A compiler needs plain operators. In 16
    bits the border would be rounded three times.
    """
    if is_tracing() or compute_dtype(x).itemsize < 4:
        return False
    pixels = x.shape[0] * x.shape[3] * x.shape[4]
    large = pixels >= (MIN_PIXELS_FIRST if before is None else MIN_PIXELS_LATER) and x.numel() <= MAX_ELEMENTS
    return large and (not x.is_cuda or (before is None and x.shape[2] == 1))


def convolve_replicating(conv: Any, x: Tensor, before: Tensor | None, padded: Tensor | None = None) -> Tensor:
    """Return ``conv(pad(x))``, with ``before`` as the frames before x, or its first frame repeated.

    Args:
        conv: as `convolution_reason` allows.
        x: ``(B, C, T, H, W)``.
        before: ``(B, C, taps - 1, H, W)`` or None.
        padded: ``cat([before, x])`` where it exists already.
    """
    taps, height, width = conv.kernel_size
    padding = (0, height // 2, width // 2)
    if taps == 1:
        out = convolve(x, conv.weight, conv.bias, padding)
    elif before is None:
        out = convolve_folding_padding(conv.weight, conv.bias, padding, x)
    else:
        padded = torch.cat([before, x], dim=2) if padded is None else padded
        out = convolve(padded, conv.weight, conv.bias, padding)
    if height == 3:
        add_border(out, x, repeated_first_frame(x, taps - 1) if before is None else before, conv.weight)
    return out


def add_border(out: Tensor, x: Tensor, before: Tensor, weight: Tensor) -> None:
    """Add the taps that fall on repeated border pixels to a convolution that padded with zeros.

    Args:
        out: ``(B, out, T, H, W)``, modified in place.
        x: ``(B, C, T, H, W)``.
        before: the frames before x, ``(B, C, taps - 1, H, W)``.
        weight: ``(out, C, taps, 3, 3)``.
    """
    for side, tap in ((0, 0), (-1, 2)):
        row = torch.cat([before[..., side, :], x[..., side, :]], dim=2)  # (B, C, taps - 1 + T, W)
        row = F.pad(row, (1, 1, 0, 0), mode="replicate")  # the corners, too
        out[..., side, :] += F.conv2d(row, weight[:, :, :, tap])
        column = torch.cat([before[..., side], x[..., side]], dim=2)  # (B, C, taps - 1 + T, H)
        out[..., side] += F.conv2d(column, weight[..., tap], padding=(0, 1))


def replicate_border(x: Tensor, height: int, width: int) -> Tensor:
    """Return a padded copy of x."""
    return F.pad(x, (width, width, height, height, 0, 0), mode="replicate") if height or width else x.clone()
