"""The decoder and the encoder of AutoencoderKL and VQModel: their last norm and activation as one operator.

On a CPU without gradients, where the blocks run strip by strip, so do the last layers, and maps between layers are channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.fusion import is_plain_conv3x3
from .accelerated import (
    Accelerated,
    can_compute,
    child_reason,
    count_call,
    is_diffusers_class,
    original_class,
    patched_forward_reason,
)
from .map_strips import can_run_in_strips, is_faster_in_strips, layout_of, run_output
from .norms import SpatialNorm, apply_group_norm, apply_spatial_norm, can_fuse_group_norm, can_fuse_spatial_norm


class Decoder(Accelerated):
    """``conv_out(silu(conv_norm_out(up(mid(conv_in(z))))))``, with blocks and a norm that may be conditioned on the latent zq."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return _output_reason(module)

    def forward(self: Any, sample: Tensor, latent_embeds: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        z, zq = sample, latent_embeds
        if not count_call(self, not args and not kwargs and _can_run(self, z, zq)):
            return original_class(self).forward(self, z, zq, *args, **kwargs)  # type: ignore[no-any-return]
        up_blocks = self.up_blocks
        ends = [(self.mid_block.resnets[0], 1.0), (up_blocks[-1].resnets[-1], 2.0 ** (len(up_blocks) - 1))]
        return _run(self, z, zq, [self.mid_block, *up_blocks], ends)


class Encoder(Accelerated):
    """``conv_out(silu(conv_norm_out(mid(down(conv_in(x))))))``."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return _output_reason(module)

    def forward(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = sample
        if not count_call(self, not args and not kwargs and _can_run(self, x, None)):
            return original_class(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        down_blocks = self.down_blocks
        ends = [(down_blocks[0].resnets[0], 1.0), (self.mid_block.resnets[0], 0.5 ** (len(down_blocks) - 1))]
        return _run(self, x, None, [*down_blocks, self.mid_block], ends)


def _output_reason(coder: Any) -> str | None:
    norm = coder.conv_norm_out
    reason = patched_forward_reason(norm)
    if is_diffusers_class(original_class(norm), "SpatialNorm"):
        reason = reason or SpatialNorm.unsupported_reason(norm)
    elif original_class(norm) is not nn.GroupNorm:
        reason = reason or f"its conv_norm_out is {type(norm).__name__}, not GroupNorm or SpatialNorm"
    return reason or child_reason("activation", coder.conv_act, nn.SiLU)


def _can_run(coder: Any, x: Tensor, zq: Tensor | None) -> bool:
    """True if the last norm and activation can be fused: its map has the layout of x."""
    if not can_compute(coder, x) or (torch.is_grad_enabled() and coder.gradient_checkpointing):
        return False
    norm, act = coder.conv_norm_out, coder.conv_act
    return can_fuse_group_norm(norm, act) if zq is None else can_fuse_spatial_norm(norm, act, x, zq)


def _run(coder: Any, x: Tensor, zq: Tensor | None, blocks: Sequence[Any], ends: Sequence[tuple[Any, float]]) -> Tensor:
    """Compute a coder.

    Args:
        coder: a Decoder or an Encoder.
        x, zq: its input, and the latent that the norms are conditioned on or None.
        blocks: its layers between conv_in and conv_norm_out.
        ends: residual blocks with its smallest and its largest maps, and the height and width of these in those of x.
    """
    norm, act, conv_out = coder.conv_norm_out, coder.conv_act, coder.conv_out
    height, width = x.shape[2:]
    in_strips = can_run_in_strips(x, zq, *(block for block, _ in ends)) and any(
        is_faster_in_strips(block, int(height * scale), int(width * scale)) for block, scale in ends
    )
    h = coder.conv_in(x)
    layout = layout_of(h)  # as in diffusers, the result has it too
    if in_strips:
        h = h.contiguous(memory_format=torch.channels_last)
    for block in blocks:
        h = block(h) if zq is None else block(h, zq)
    if in_strips and is_plain_conv3x3(conv_out) and can_run_in_strips(h, zq, norm, conv_out):
        count_call(norm, True)
        out = run_output(norm, conv_out, h, zq)
    elif zq is None:
        out = conv_out(apply_group_norm(norm, act, h))
    else:
        out = conv_out(apply_spatial_norm(norm, act, h, zq))
    return out.contiguous(memory_format=layout) if in_strips else out
