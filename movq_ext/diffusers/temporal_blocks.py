"""Residual blocks of clips with plain group norms, from several video models, and Allegro's convolutions over time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.options import NormOptions
from .accelerated import Accelerated, can_compute, child_reason, count_call, is_plain_instance, original_class
from .frame_norms import normalise_frames
from .norms import can_fuse_group_norm, group_norm_reason, normalise_clip

CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4")  # of Allegro's layer


class ClipResnetBlock(Accelerated):
    """``shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + t))))``: each norm and its activation in one operator.

    Of Stable Video Diffusion, with a time embedding t, HunyuanVideo and EasyAnimate (Magvit). The convolutions are diffusers'.
    """

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        norms = group_norm_reason("norm1", module.norm1) or group_norm_reason("norm2", module.norm2)
        return norms or child_reason("activation", module.nonlinearity, nn.SiLU)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x, temb = (*args, None, None)[:2]
        fits = len(args) in (1, 2) and not kwargs and isinstance(x, Tensor) and can_compute(self, x)
        projection = getattr(self, "time_emb_proj", None)
        if not count_call(self, fits and (projection is None or temb is not None) and ClipResnetBlock.can_fuse(self)):
            return original_class(self).forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        h = self.conv1(_normalise(self, self.norm1, x))
        if projection is not None:
            h = h + projection(self.nonlinearity(temb)).transpose(1, 2)[:, :, :, None, None]  # (B, T, C) of every frame
        h = _normalise(self, self.norm2, h)
        h = self.conv2(self.dropout(h))
        shortcut = self.shortcut if hasattr(self, "shortcut") else self.conv_shortcut
        x = x if shortcut is None else shortcut(x)
        out: Tensor = x + h
        divisor = getattr(self, "output_scale_factor", 1)
        return out if divisor == 1 else out / divisor

    def can_fuse(self: Any) -> bool:
        norms = all(can_fuse_group_norm(norm, self.nonlinearity) for norm in (self.norm1, self.norm2))
        return norms and is_plain_instance(self.nonlinearity, nn.SiLU)


def _normalise(block: Any, norm: Any, x: Tensor) -> Tensor:
    """Return ``silu(norm(x))`` of the clip, or of every frame alone, as EasyAnimate's blocks may ask."""
    options = NormOptions.from_layer(norm, "silu")
    if getattr(block, "spatial_group_norm", False):
        return normalise_frames(x, options)
    return normalise_clip(x, None, None, options)


class AllegroTemporalConvLayer(Accelerated):
    """``x + conv4(conv3(conv2(conv1(x))))`` of a clip, each of a group norm, SiLU and a convolution over padded frames.

    Norm and SiLU are one operator, and padding copies the clip once. Where the layer halves or doubles the number of frames,
    conv1 is not padded, and x is sampled or repeated.
    """

    ranks = (4, 5)  # frames (B * T, C, H, W), which it convolves as a clip

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        for name in CONVOLUTIONS:
            norm, activation, *_ = layers = getattr(module, name)
            reason = group_norm_reason(f"{name}.0", norm) or child_reason("activation", activation, nn.SiLU)
            if reason or not is_plain_instance(layers, nn.Sequential):
                return reason or f"its {name} is hooked or patched"
        return None

    def forward(self: Any, hidden_states: Tensor, batch_size: int, *args: Any) -> Tensor:
        serves = not args and can_compute(self, hidden_states) and not AllegroTemporalConvLayer.unsupported_reason(self)
        if not count_call(self, serves):
            return original_class(self).forward(self, hidden_states, batch_size, *args)  # type: ignore[no-any-return]
        h = x = hidden_states.unflatten(0, (batch_size, -1)).transpose(1, 2)
        for name in CONVOLUTIONS:
            if name != "conv1" or not (self.down_sample or self.up_sample):
                h = torch.cat([h[:, :, :1], h, h[:, :, -1:]], dim=2)
            norm, _, *others = getattr(self, name)
            h = normalise_clip(h, None, None, NormOptions.from_layer(norm, "silu"))
            for layer in others:
                h = layer(h)
            if name == "conv1" and self.up_sample:
                h = h.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        if self.down_sample:
            x = x[:, :, ::2]
        elif self.up_sample:
            x = x.repeat_interleave(2, dim=2)
        out: Tensor = (x + h).transpose(1, 2).flatten(0, 1)
        return out
