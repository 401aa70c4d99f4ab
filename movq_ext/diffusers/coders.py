"""The decoder and the encoder of AutoencoderKL and VQModel: their last norm and activation as one operator.

Their forward is diffusers'. It runs on a stand-in for the module, in which conv_norm_out computes SiLU too. On a CPU without
gradients, where the blocks run strip by strip, so do the last layers, and maps between layers are channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.fusion import is_plain_conv3x3, is_unmodified
from .accelerated import (
    Accelerated,
    can_compute,
    child_reason,
    count_call,
    is_diffusers_class,
    original_class,
    own_class,
    patched_forward_reason,
)
from .map_strips import can_run_in_strips, is_faster_in_strips, layout_of, run_output
from .norms import SpatialNorm, apply_group_norm, apply_spatial_norm, can_fuse_group_norm, can_fuse_spatial_norm

RESIDUAL_BLOCKS = ("ResnetBlock2D", "ResnetBlockCondNorm2D")


class Decoder(Accelerated):
    """``conv_out(silu(conv_norm_out(up(mid(conv_in(z))))))``, with blocks and a norm that may be conditioned on the latent zq."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return _output_reason(module)

    def forward(self: Any, sample: Tensor, latent_embeds: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        z, zq = sample, latent_embeds
        original = original_class(self)
        if not count_call(self, _can_fuse(self, z, zq)):
            return original.forward(self, z, zq, *args, **kwargs)  # type: ignore[no-any-return]
        stages = [(self.mid_block, 1.0), *((block, 2.0**i) for i, block in enumerate(self.up_blocks))]
        return original.forward(_stand_in(self, z, zq, stages), z, zq, *args, **kwargs)  # type: ignore[no-any-return]


class Encoder(Accelerated):
    """``conv_out(silu(conv_norm_out(mid(down(conv_in(x))))))``."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return _output_reason(module)

    def forward(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = sample
        original = original_class(self)
        if not count_call(self, _can_fuse(self, x, None)):
            return original.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        stages = [
            *((block, 0.5**i) for i, block in enumerate(self.down_blocks)),
            (self.mid_block, 0.5 ** (len(self.down_blocks) - 1)),
        ]
        return original.forward(_stand_in(self, x, None, stages), x, *args, **kwargs)  # type: ignore[no-any-return]


class FusedOutput:
    """A coder in which conv_norm_out computes the activation too. diffusers' forward takes it for ``self``."""

    def __init__(self, coder: Any) -> None:
        self.coder = coder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.coder, name)

    def conv_norm_out(self, h: Tensor, *latent: Tensor) -> Any:
        norm, act = self.coder.conv_norm_out, self.coder.conv_act
        return apply_spatial_norm(norm, act, h, *latent) if latent else apply_group_norm(norm, act, h)

    def conv_act(self, h: Any) -> Any:
        return h


class OutputInStrips(FusedOutput):
    """A coder whose last layers run strip by strip, and whose maps are channels_last. The result has diffusers' layout."""

    def conv_in(self, x: Tensor) -> Tensor:
        h: Tensor = self.coder.conv_in(x)
        self.layout = layout_of(h)
        return h.contiguous(memory_format=torch.channels_last)

    def conv_norm_out(self, h: Tensor, *latent: Tensor) -> Any:
        return h, *latent  # conv_out normalises each strip

    def conv_out(self, inputs: tuple[Tensor, ...]) -> Tensor:
        norm, conv_out, (h, *latent) = self.coder.conv_norm_out, self.coder.conv_out, inputs
        zq = latent[0] if latent else None
        count_call(norm, True)
        return run_output(norm, conv_out, h, zq).contiguous(memory_format=self.layout)


def _output_reason(coder: Any) -> str | None:
    norm = coder.conv_norm_out
    reason = patched_forward_reason(norm)
    if is_diffusers_class(original_class(norm), "SpatialNorm"):
        reason = reason or SpatialNorm.unsupported_reason(norm)
    elif original_class(norm) is not nn.GroupNorm:
        reason = reason or f"its conv_norm_out is {type(norm).__name__}, not GroupNorm or SpatialNorm"
    return reason or child_reason("activation", coder.conv_act, nn.SiLU)


def _can_fuse(coder: Any, x: Tensor, zq: Tensor | None) -> bool:
    """True if the last norm and activation can be fused: its map has the layout of x."""
    if not can_compute(coder, x):
        return False
    norm, act = coder.conv_norm_out, coder.conv_act
    return can_fuse_group_norm(norm, act) if zq is None else can_fuse_spatial_norm(norm, act, x, zq)


def _stand_in(coder: Any, x: Tensor, zq: Tensor | None, stages: Sequence[tuple[Any, float]]) -> FusedOutput:
    """Return the stand-in that computes the coder fastest.

    Args:
        coder: a Decoder or an Encoder.
        x, zq: its input, and the latent that the norms are conditioned on or None.
        stages: its blocks, each with the height and width of its maps in those of x.
    """
    is_faster = can_run_in_strips(x, zq) and any(_is_faster_in_strips(stage, x, scale) for stage, scale in stages)
    in_strips = is_faster and can_run_in_strips(x, zq, coder) and _is_as_built(coder)
    return OutputInStrips(coder) if in_strips else FusedOutput(coder)


def _is_as_built(coder: Any) -> bool:
    """True if all layers are PyTorch's and diffusers' own, unmodified: others, and hooks, may rely on the layout of maps."""
    layers = [layer for child in coder.children() for layer in child.modules()]
    own = all(own_class(layer).__module__.startswith(("diffusers.", "torch.nn.")) and is_unmodified(layer) for layer in layers)
    return own and is_plain_conv3x3(coder.conv_out)


def _is_faster_in_strips(stage: Any, x: Tensor, scale: float) -> bool:
    """True if one of the stage's residual blocks is."""
    height, width = (int(size * scale) for size in x.shape[2:])
    blocks = stage.modules() if isinstance(stage, nn.Module) else ()
    residual_blocks = (block for block in blocks if is_diffusers_class(own_class(block), *RESIDUAL_BLOCKS))
    return any(isinstance(block, Accelerated) and is_faster_in_strips(block, height, width) for block in residual_blocks)
