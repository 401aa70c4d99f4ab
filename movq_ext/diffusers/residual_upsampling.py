"""The upsampling of KVAE's and Kandinsky 6's video autoencoders: ``linear(x + spatial_conv(x))`` of the enlarged x."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops.functional import upsample_conv
from .accelerated import Accelerated, can_compute, count_call, is_plain_conv3d, original_class
from .causal_convolution import clip_format
from .upsampling import folding_pays


class KVAECachedPXSUpsample(Accelerated):
    """Upsampling whose convolution reflects the border. A reflected row of the enlarged map repeats a row of the small one."""

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return "it does not double the size" if module.factor != 2 else spatial_conv_reason(module.spatial_conv, "reflect")

    def forward(self: Any, x: Tensor, cache: Any, *args: Any) -> Tensor:
        serves = can_compute(self, x) and not KVAECachedPXSUpsample.unsupported_reason(self)
        serves = serves and folding_pays(x, self.spatial_conv.weight)
        if not count_call(self, not args and serves):
            return original_class(self).forward(self, x, cache, *args)  # type: ignore[no-any-return]
        if self.temporal_compress:
            x = self.temporal_upsample(x, cache)
        large = enlarge(x, self.spatial_conv, reflects=True)
        out: Tensor = self.linear(large).to(large.dtype)  # which autocast changes
        return out


class Kandinsky6SRUpsample(Accelerated):
    """Upsampling whose convolution pads with zeros."""

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return spatial_conv_reason(module.spatial_conv, "zeros")

    def forward(self: Any, hidden_states: Tensor, cache: Any, *args: Any) -> Tensor:
        x = hidden_states
        serves = can_compute(self, x) and not Kandinsky6SRUpsample.unsupported_reason(self)
        serves = serves and folding_pays(x, self.spatial_conv.weight)
        if not count_call(self, not args and serves):
            return original_class(self).forward(self, x, cache, *args)  # type: ignore[no-any-return]
        if self.compress_time:  # T + 1 frames of a clip become 2 T + 1
            is_first_segment = cache["temporal_conv"]["padding"] is None
            repeated = x.repeat_interleave(2, dim=2)[:, :, 1 if is_first_segment else 0 :]
            x = self.temporal_conv(repeated, cache["temporal_conv"]) + repeated
        out: Tensor = self.linear(enlarge(x, self.spatial_conv, reflects=False))
        return out


def spatial_conv_reason(conv: Any, padding_mode: str) -> str | None:
    plain = is_plain_conv3d(conv, padding_mode) and conv.kernel_size == (1, 3, 3) and tuple(conv.padding) == (0, 1, 1)
    return None if plain else "its convolution is replaced or hooked"


def enlarge(x: Tensor, conv: Any, reflects: bool) -> Tensor:
    """Return ``up(x) + conv(up(x))`` of every frame, nearest 2x and 1x3x3, as a convolution of the small frames."""
    batch, height, width = x.shape[0], *x.shape[3:]
    frames = x.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
    border = int(reflects)
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate") if reflects else frames
    large = upsample_conv(padded, conv.weight[:, :, 0], conv.bias)
    large = large[:, :, 2 * border : 2 * (height + border), 2 * border : 2 * (width + border)]
    blocks = large.unflatten(3, (width, 2)).unflatten(2, (height, 2)) + frames[:, :, :, None, :, None]
    out: Tensor = blocks.flatten(4, 5).flatten(2, 3).unflatten(0, (batch, -1)).transpose(1, 2)
    return out.contiguous(memory_format=clip_format(out))
