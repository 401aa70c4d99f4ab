"""diffusers' residual blocks.

Both compute ``(shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x)))))))) / output_scale_factor``. In inference on a GPU
the bias of conv1 is added by norm2, and that of conv2 together with the residual. On a CPU wide blocks run strip by strip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..model.fusion import add_residual, conv_deferring_bias, convolve_shortcut, runs_inference
from .accelerated import Accelerated, can_compute, child_reason, count_call, original_class
from .map_strips import block_runs_in_strips, run_block
from .norms import (
    apply_group_norm,
    apply_spatial_norm,
    can_fuse_group_norm,
    can_fuse_spatial_norm,
    group_norm_reason,
    has_extra_pass,
    spatial_norm_reason,
)


class ResnetBlock2D(Accelerated):
    """The block with group norms.

    A time embedding t, projected to channels, enters at norm2 as ``norm2(h + t)`` or, in two halves, as
    ``norm2(h) * (1 + scale) + shift``. The latter is SpatialNorm's modulation on a grid of one cell.
    """

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if module.time_embedding_norm not in ("default", "scale_shift", "group"):  # "group": AutoencoderKL's, without embedding
            return f"its time_embedding_norm is {module.time_embedding_norm}"
        return _block_reason(module, group_norm_reason)

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        x, act, norm2 = input_tensor, self.nonlinearity, self.norm2
        embeds, scale_shift = self.time_emb_proj is not None, self.time_embedding_norm == "scale_shift"
        # Where the embedding does not fit the block, diffusers raises, or adds it without a projection.
        fits = embeds == (temb is not None) and (embeds or not scale_shift)
        # With an embedding a block saves fewer passes over the map than an extra one of its norms costs.
        pays = any(can_fuse_group_norm(norm, act) for norm in (self.norm1, norm2)) and (temb is None or not has_extra_pass(x))
        if not count_call(self, not args and not kwargs and fits and can_compute(self, x) and pays):
            return original_class(self).forward(self, x, temb, *args, **kwargs)  # type: ignore[no-any-return]
        if (
            temb is None
            and all(can_fuse_group_norm(norm, act) for norm in (self.norm1, norm2))
            and block_runs_in_strips(self, x, None)
        ):
            return run_block(self, x, None)
        # Rebinding h frees each map as soon as the next one exists.
        h = apply_group_norm(self.norm1, act, x)
        if temb is None:  # act(norm2(conv1(h)))
            defers = can_fuse_group_norm(norm2, act) and runs_inference(norm2)
            h, bias = conv_deferring_bias(self.conv1, h) if defers else (self.conv1(h), None)
            h = apply_group_norm(norm2, act, h, f_bias=bias)
        else:
            h = self.conv1(h)
            t = self.time_emb_proj(temb if self.skip_time_act else act(temb))[:, :, None, None]
            if scale_shift:  # act(norm2(h) * (1 + scale) + shift)
                scale, shift = t.chunk(2, dim=1)
                h = apply_group_norm(norm2, act, h, 1 + scale, shift)
            else:  # act(norm2(h + t))
                h = apply_group_norm(norm2, act, add_residual(h, None, t, self.conv1))
        h, bias = conv_deferring_bias(self.conv2, self.dropout(h))
        return _add_shortcut(self, h, bias, x)


class ResnetBlockCondNorm2D(Accelerated):
    """The block with spatial norms: ``norm1(x, zq)`` and ``norm2(h, zq)``, where diffusers calls the latent zq ``temb``."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if module.time_embedding_norm != "spatial":
            return f"its time_embedding_norm is {module.time_embedding_norm}"
        return _block_reason(module, spatial_norm_reason)

    def forward(self: Any, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, zq, act, norm2 = input_tensor, temb, self.nonlinearity, self.norm2
        # can_modulate sees x for norm2 too: their maps have the same grid and layout.
        pays = any(can_fuse_spatial_norm(norm, act, x, zq) for norm in (self.norm1, norm2))
        if not count_call(self, not args and not kwargs and can_compute(self, x) and pays):
            return original_class(self).forward(self, x, zq, *args, **kwargs)  # type: ignore[no-any-return]
        norms = (self.norm1, norm2)
        if all(can_fuse_spatial_norm(norm, act, x, zq) for norm in norms) and block_runs_in_strips(self, x, zq):
            for norm in norms:
                count_call(norm, True)
            return run_block(self, x, zq)
        h = apply_spatial_norm(self.norm1, act, x, zq)
        defers = can_fuse_spatial_norm(norm2, act, h, zq) and runs_inference(norm2, zq)
        h, bias = conv_deferring_bias(self.conv1, h) if defers else (self.conv1(h), None)
        h = apply_spatial_norm(norm2, act, h, zq, bias)
        h, bias = conv_deferring_bias(self.conv2, self.dropout(h))
        return _add_shortcut(self, h, bias, x)


def _block_reason(block: Any, norm_reason: Callable[[str, Any], str | None]) -> str | None:
    if block.upsample is not None or block.downsample is not None:
        return "it resamples between its norm and its convolution"
    norms = norm_reason("norm1", block.norm1) or norm_reason("norm2", block.norm2)
    return norms or child_reason("activation", block.nonlinearity, nn.SiLU)


def _add_shortcut(block: Any, h: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """``(conv_shortcut(x) + h + bias[c]) / output_scale_factor``, for the h and the deferred bias of conv2."""
    if block.conv_shortcut is not None:
        x = x.contiguous() if block.training else x  # as diffusers does, for DDP
        x, bias = convolve_shortcut(block.conv_shortcut, x, bias)
    out = add_residual(h, bias, x, block.conv2)
    return out if block.output_scale_factor == 1 else out / block.output_scale_factor
