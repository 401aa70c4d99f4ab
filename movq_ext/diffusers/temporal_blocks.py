"""Residual blocks of clips with plain group norms, from several video models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.options import NormOptions
from .accelerated import Accelerated, can_compute, child_reason, count_call, is_plain_instance, original_class
from .norms import can_fuse_group_norm, group_norm_reason
from .video_norms import normalise_clip


class ClipResnetBlock(Accelerated):
    """``shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + t))))``: each norm and its activation in one operator.

    Of Stable Video Diffusion, with a time embedding t, HunyuanVideo and EasyAnimate (Magvit). The convolutions are diffusers'.
    """

    takes_clips = True

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if getattr(module, "spatial_group_norm", False):
            return "it normalises every frame alone"
        norms = group_norm_reason("norm1", module.norm1) or group_norm_reason("norm2", module.norm2)
        return norms or child_reason("activation", module.nonlinearity, nn.SiLU)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x, temb = (*args, None, None)[:2]
        fits = len(args) in (1, 2) and not kwargs and isinstance(x, Tensor) and can_compute(self, x)
        projection = getattr(self, "time_emb_proj", None)
        if not count_call(self, fits and (projection is None or temb is not None) and ClipResnetBlock.can_fuse(self)):
            return original_class(self).forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        h = self.conv1(normalise_clip(x, None, None, NormOptions.from_layer(self.norm1, "silu")))
        if projection is not None:
            h = h + projection(self.nonlinearity(temb)).transpose(1, 2)[:, :, :, None, None]  # (B, T, C) of every frame
        h = normalise_clip(h, None, None, NormOptions.from_layer(self.norm2, "silu"))
        h = self.conv2(self.dropout(h))
        shortcut = self.shortcut if hasattr(self, "shortcut") else self.conv_shortcut
        x = x if shortcut is None else shortcut(x)
        out: Tensor = x + h
        divisor = getattr(self, "output_scale_factor", 1)
        return out if divisor == 1 else out / divisor

    def can_fuse(self: Any) -> bool:
        norms = all(can_fuse_group_norm(norm, self.nonlinearity) for norm in (self.norm1, self.norm2))
        return norms and is_plain_instance(self.nonlinearity, nn.SiLU) and not getattr(self, "spatial_group_norm", False)
