"""HunyuanVideo's attention over the frames of a clip, in which a frame attends to itself and to earlier frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.fusion import is_unmodified
from ..ops.functional import attention
from ..ops.options import NormOptions
from .accelerated import Accelerated, can_compute, child_reason, count_call, original_class
from .attention import Attention
from .norms import normalise_clip


class HunyuanVideoMidBlock3D(Accelerated):
    """``resnet(attention(resnet(x)))`` of a clip of T frames.

    Each frame's queries get the keys and values of the frames up to it. diffusers computes all scores and masks those of later
    frames, which takes twice as many and a mask of all pairs of tokens.
    """

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        layers = [layer for layer in module.attentions if layer is not None]
        for i, layer in enumerate(layers):
            if reason := child_reason(f"attentions.{i}", layer, "Attention") or _attention_reason(layer):
                return reason
        return None if layers else "it has no attention"

    def forward(self: Any, hidden_states: Tensor, *args: Any) -> Tensor:
        x, checkpoints = hidden_states, torch.is_grad_enabled() and self.gradient_checkpointing
        serves = not args and not checkpoints and can_compute(self, x) and HunyuanVideoMidBlock3D.can_attend(self)
        if not count_call(self, serves):
            return original_class(self).forward(self, x, *args)  # type: ignore[no-any-return]
        out: Tensor = self.resnets[0](x)
        for layer, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            out = resnet(out if layer is None else attend_to_earlier_frames(layer, out))
        return out

    def can_attend(self: Any) -> bool:
        """True if the attention layers are accelerated too and nothing else is to be called."""
        layers = [layer for layer in self.attentions if layer is not None]
        return all(isinstance(layer, Attention) and is_unmodified(layer) and not _attention_reason(layer) for layer in layers)


def _attention_reason(layer: Any) -> str | None:
    if layer.group_norm is None or layer.spatial_norm is not None:
        return "its attention has no group norm"
    return Attention.unsupported_reason(layer)


def attend_to_earlier_frames(layer: Any, x: Tensor) -> Tensor:
    """Return diffusers' Attention of a clip ``(B, C, T, H, W)`` in which no frame attends to a later one."""
    count_call(layer, True)
    frames, pixels = x.shape[2], x.shape[3] * x.shape[4]
    normalised = normalise_clip(x, None, None, NormOptions.from_layer(layer.group_norm))
    q, k, v = (h.unsqueeze(1) for h in Attention.project(layer, normalised.flatten(2).transpose(1, 2)))  # (B, 1, T * H * W, C)
    ends = [pixels * (frame + 1) for frame in range(frames)]
    parts = [attention(q[:, :, end - pixels : end], k[:, :, :end], v[:, :, :end]) for end in ends]
    h = torch.cat(parts, dim=2).squeeze(1)
    for projection in layer.to_out:
        h = projection(h)
    out: Tensor = h.transpose(1, 2).unflatten(2, x.shape[2:])
    out = x + out if layer.residual_connection else out  # x first: the sum has the layout of x, as in diffusers
    divisor: float = layer.rescale_output_factor
    return out if divisor == 1 else out / divisor
