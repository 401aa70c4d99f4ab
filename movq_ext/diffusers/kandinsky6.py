"""The residual block and the causal convolution of Kandinsky 6's video autoencoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.native import is_inference
from .accelerated import Accelerated, can_compute, child_reason, count_call, is_plain_conv3d, original_class
from .causal_convolution import (
    can_fold_padding,
    convolve,
    convolve_folding_padding,
    last_frames,
    repeated_first_frame,
    without_border,
)
from .video_norms import Kandinsky6SRSpatialNorm3D, fits_clip

MAX_ELEMENTS = 2 * 10**9  # of a convolution's input, which diffusers splits if it is larger


class Kandinsky6SRCausalConv3d(Accelerated):
    """`CausalConv3d` whose cache is a dict of frames that are padded with zeros in space. Ours pads inside the convolution."""

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if module.time_stride != 1:
            return "it takes every other frame"
        return None if is_plain_conv3d(module.conv) else "its convolution is replaced or hooked"

    def forward(self: Any, hidden_states: Tensor, cache: Any, *args: Any, **kwargs: Any) -> Tensor:
        x, conv = hidden_states, self.conv
        serves = can_compute(self, x) and not Kandinsky6SRCausalConv3d.unsupported_reason(self)
        if not count_call(self, not args and not kwargs and serves and x.numel() <= MAX_ELEMENTS):
            return original_class(self).forward(self, x, cache, *args, **kwargs)  # type: ignore[no-any-return]
        height, width, frames = self.height_pad, self.width_pad, self.time_pad
        before = None if cache["padding"] is None else without_border(cache["padding"], height, width)
        if can_fold_padding(self, x, before):
            out = convolve_folding_padding(conv.weight, conv.bias, (0, height, width), x)
            last = last_frames(x, frames)
        else:
            padded = torch.cat([repeated_first_frame(x, frames) if before is None else before, x], dim=2)
            out = convolve(padded, conv.weight, conv.bias, (0, height, width))
            last = padded[:, :, padded.shape[2] - frames :]
        cache["padding"] = F.pad(last, (width, width, height, height))
        return out.to(x.dtype)  # which autocast changes


class Kandinsky6SRResnetBlock3D(Accelerated):
    """``shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`` of the decoder, which overwrites maps in inference."""

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if not hasattr(module.norm1, "conv_y"):
            return "its norms are not conditioned on a latent"
        for name in ("norm1", "norm2"):
            norm = getattr(module, name)
            reason = child_reason(name, norm, "Kandinsky6SRSpatialNorm3D")
            if reason := reason or Kandinsky6SRSpatialNorm3D.unsupported_reason(norm):
                return reason
        return None

    def forward(self: Any, hidden_states: Tensor, cache: Any, zq: Tensor | None = None, *args: Any) -> Tensor:
        x = hidden_states
        plain = fits_clip(zq, x) and not Kandinsky6SRResnetBlock3D.unsupported_reason(self)
        if not count_call(self, not args and can_compute(self, x) and plain):
            return original_class(self).forward(self, x, cache, zq, *args)  # type: ignore[no-any-return]
        h = self.conv1(_normalise(self.norm1, x, zq, cache["norm1"]), cache["conv1"])
        h = self.conv2(_normalise(self.norm2, h, zq, cache["norm2"]), cache["conv2"])
        if self.in_channels != self.out_channels:
            x = self.nin_shortcut(x)
        out: Tensor = x + h
        return out


def _normalise(norm: Any, x: Tensor, zq: Any, cache: Any) -> Tensor:
    """``silu(norm(x, zq, cache))``."""
    h = Kandinsky6SRSpatialNorm3D.modulated(norm, x, zq, cache)
    return F.silu(h, inplace=is_inference(h))
