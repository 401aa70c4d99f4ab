"""EasyAnimate's causal convolution (AutoencoderKLMagvit)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model.fusion import has_patched_convolution, has_plain_parameters
from ..ops.native import compute_dtype, is_tracing
from .accelerated import Accelerated, can_compute, count_call, original_class
from .causal_convolution import (
    MAX_ELEMENTS,
    convolve,
    convolve_folding_padding,
    has_pixels_to_fold,
    last_frames,
    repeated_first_frame,
)


class EasyAnimateCausalConv3d(Accelerated):
    """``conv(cat([prev_features or repeated first frame, x]))``. The last frames of that are the next ``prev_features``.

    It convolves all frames at once; diffusers convolves one after another.
    """

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if tuple(module.stride) != (1, 1, 1):
            return "it skips frames or pixels"
        if has_patched_convolution(module, nn.Conv3d):
            return "its convolution is patched"
        if not has_plain_parameters(module):
            return "its parameters are tensor subclasses"
        dense = tuple(module.dilation) == (1, 1, 1) and module.groups == 1 and module.padding_mode == "zeros"
        return None if dense and module.temporal_padding > 0 else "its kernel is dilated, grouped, or not padded with zeros"

    def forward(self: Any, hidden_states: Tensor, *args: Any) -> Tensor:
        x, before, frames = hidden_states, self.prev_features, self.temporal_padding
        serves = can_compute(self, x) and not is_tracing() and EasyAnimateCausalConv3d.unsupported_reason(self) is None
        if not count_call(self, not args and serves and x.numel() <= MAX_ELEMENTS):
            return original_class(self).forward(self, x, *args)  # type: ignore[no-any-return]
        # In 16 bits the folded taps would be rounded.
        if before is None and has_pixels_to_fold(x) and compute_dtype(x).itemsize >= 4:
            self.prev_features = last_frames(x, frames).clone()
            return convolve_folding_padding(self.weight, self.bias, self.padding, x)
        padded = torch.cat([repeated_first_frame(x, frames) if before is None else before, x], dim=2)
        self.prev_features = padded[:, :, -frames:].clone()
        return convolve(padded, self.weight, self.bias, self.padding)
