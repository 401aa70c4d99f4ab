"""Implementations of the compiled operators for CPU tensors and fake tensors, and the operators of chunked attention.

The CPU implementations let a program that was exported with these operators run anywhere. Signatures are the schemas of
csrc/bindings.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked_attention, clips, upsampling
from .options import NormOptions


def register_implementations() -> None:
    """Register the CPU and fake implementations with PyTorch. The extension must be loaded."""
    for name, implementation in CPU_IMPLEMENTATIONS.items():
        torch.library.register_kernel(f"movq_ext::{name}", "cpu", implementation)
        torch.library.register_fake(f"movq_ext::{name}", FAKE_IMPLEMENTATIONS[name])


# --- Spatial norm


def spatial_norm_forward_cpu(
    f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float,
    silu: bool, f_bias: Tensor | None = None, bordered: bool = False, statistics: Tensor | None = None,
    frames: int = 1, latent_frames: int = 1, split_first_frame: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the norm from f; the given statistics are not needed."""
    out = torch.empty_like(_in_layout_of(f, f))
    if f_bias is not None:  # added in float32, as the kernels do
        f = f.float() + f_bias.float()[:, None, None]
        zq_y, zq_b, weight, bias = (None if x is None else x.float() for x in (zq_y, zq_b, weight, bias))
    options = NormOptions(weight, bias, groups, eps, "silu" if silu else None, bordered=bordered)
    clip = clips.ClipShape(frames, latent_frames, split_first_frame)
    out.copy_(clips.native_spatial_norm(f, zq_y, zq_b, options, clip))
    variance, mean = torch.var_mean(f.float().reshape(f.shape[0], groups, -1), dim=2, correction=0)
    return out, mean, (variance + eps).rsqrt()


def spatial_norm_into_cpu(
    out: Tensor, f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int,
    eps: float, silu: bool, *clip: Any,
) -> None:  # fmt: skip
    out.copy_(spatial_norm_forward_cpu(f, zq_y, zq_b, weight, bias, groups, eps, silu, None, False, None, *clip)[0])


def spatial_norm_backward_cpu(
    dout: Tensor, f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, groups: int, silu: bool, frames: int = 1, latent_frames: int = 1, split_first_frame: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, channels = f.shape[:2]
    clip = clips.ClipShape(frames, latent_frames, split_first_frame)

    def over_map(group_values: Tensor) -> Tensor:  # (B, groups) -> (B, C, 1, 1)
        return group_values.repeat_interleave(channels // groups, dim=1)[:, :, None, None]

    def group_means(x: Tensor) -> Tensor:
        return over_map(x.reshape(batch, groups, -1).mean(2))

    # Forward: out = silu(modulated), modulated = affine * y + b, affine = normalised * weight + bias.
    rstd = over_map(rstd)
    normalised = (f.float() - over_map(mean)) * rstd
    affine = normalised if weight is None else normalised * weight.float()[:, None, None]
    affine = affine if bias is None else affine + bias.float()[:, None, None]
    y, modulated = None, affine
    if zq_y is not None and zq_b is not None:
        y, b = (_spread_cells(zq.float(), f, clip) for zq in (zq_y, zq_b))
        modulated = affine * y + b

    # Backward, from the output to f.
    dmodulated = dout.float()
    if silu:  # silu(u) = u sigmoid(u), silu'(u) = sigmoid(u) (1 + u (1 - sigmoid(u)))
        gate = torch.sigmoid(modulated)
        dmodulated = dmodulated * gate * (1 + modulated * (1 - gate))
    dzq_y, dzq_b = f.new_empty(0), f.new_empty(0)
    if zq_y is not None:
        dzq_y, dzq_b = (_sum_cells(dmap, f, zq_y, clip) for dmap in (dmodulated * affine, dmodulated))
    daffine = dmodulated if y is None else dmodulated * y
    dweight = f.new_empty(0) if weight is None else (daffine * normalised).sum((0, 2, 3)).to(weight.dtype)
    dbias = f.new_empty(0) if bias is None else daffine.sum((0, 2, 3)).to(bias.dtype)
    dnormalised = daffine if weight is None else daffine * weight.float()[:, None, None]
    df = rstd * (dnormalised - group_means(dnormalised) - normalised * group_means(dnormalised * normalised))
    return torch.empty_like(_in_layout_of(f, f)).copy_(df), dzq_y, dzq_b, dweight, dbias


def _spread_cells(zq: Tensor, f: Tensor, clip: clips.ClipShape) -> Tensor:
    """Resize zq to f's grid."""
    frames = clips.as_clip(zq, clip.latent_frames).index_select(2, clips.source_frames(clip))
    size = f.shape[2] // clip.frames, f.shape[3]
    resized = F.interpolate(frames.flatten(1, 2), size=size, mode="nearest")
    return resized.view(f.shape)  # (B, C * T, H, W) -> (B, C, T * H, W)


def _sum_cells(dmap: Tensor, f: Tensor, zq: Tensor, clip: clips.ClipShape) -> Tensor:
    """Sum a gradient on f's grid over the pixels of each of zq's cells: the gradient of `_spread_cells`."""
    batch, channels, rows, width = zq.shape
    frames = clips.as_clip(dmap, clip.frames).flatten(1, 2)  # (B, C * T, H, W)
    size = batch, channels * clip.frames, rows // clip.latent_frames, width
    sums = torch.ops.aten.upsample_nearest2d_backward(frames.contiguous(), frames.shape[2:], size)
    dzq = sums.new_zeros(batch, channels, clip.latent_frames, *size[2:])
    dzq.index_add_(2, clips.source_frames(clip), sums.unflatten(1, (channels, clip.frames)))
    return torch.empty_like(_in_layout_of(f, zq)).copy_(clips.as_map(dzq))


def _in_layout_of(f: Tensor, x: Tensor) -> Tensor:
    """Return x in the kernels' layout: f's layout if f is dense NCHW or NHWC, else NCHW."""
    if f.is_contiguous():
        return x.contiguous()
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(f))


def spatial_norm_forward_fake(
    f: Tensor, zq_y: Any, zq_b: Any, weight: Any, bias: Any, groups: int, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (f.new_empty(f.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(_in_layout_of(f, f)), mean, rstd


def spatial_norm_into_fake(out: Tensor, f: Tensor, *_: Any, **__: Any) -> None:
    """Do nothing: out is written in place, and its shape stays."""


def spatial_norm_backward_fake(
    dout: Tensor, f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: Any,
    **__: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    maps = [None if x is None else _in_layout_of(f, x) for x in (f, zq_y, zq_b)]
    return tuple(f.new_empty(0) if x is None else torch.empty_like(x) for x in (*maps, weight, bias))


# --- Attention


def attention_forward_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = q.float() @ k.float().mT * scale
    lse = scores.logsumexp(3)
    weights = (scores - lse[..., None]).exp()
    return (weights @ v.float()).to(q.dtype), lse


def attention_backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    weights = (q @ k.mT * scale - lse[..., None]).exp()
    dweights = dout @ v.mT
    dscores = weights * (dweights - (dout * out).sum(3, keepdim=True)) * scale
    return (dscores @ k).to(dtype), (dscores.mT @ q).to(dtype), (weights.mT @ dout).to(dtype)


def attention_forward_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def attention_backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def shared_kv_attention_forward_cpu(q: Tensor, kv: Tensor, scale: float, hopper: bool = False) -> tuple[Tensor, Tensor]:
    return attention_forward_cpu(q, kv, kv, scale)


def shared_kv_attention_backward_cpu(
    dout: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, scale: float, hopper: bool = False
) -> tuple[Tensor, Tensor]:
    dq, dk, dv = attention_backward_cpu(dout, q, kv, kv, out, lse, scale)
    return dq, dk + dv


def shared_kv_attention_forward_fake(q: Tensor, kv: Tensor, scale: float, hopper: bool = False) -> tuple[Tensor, Tensor]:
    return attention_forward_fake(q, kv, kv, scale)


def shared_kv_attention_backward_fake(
    dout: Tensor, q: Tensor, kv: Tensor, *_: Any, hopper: bool = False
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


# --- Chunked attention: operators, because a compiler would unroll its loops for one size. They need no extension.


def chunked_attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return chunked_attention.forward(q, k, v, scale)


def chunked_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, shared_kv: bool = False
) -> tuple[Tensor, ...]:
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        grads = chunked_attention.backward(dout, q, k, v, out, lse, scale, shared_kv)
    return tuple(grad for grad in grads if grad is not None)


def chunked_shared_kv_attention_forward(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return chunked_attention_forward(q, kv, kv, scale)


def chunked_shared_kv_attention_backward(
    dout: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    return chunked_attention_backward(dout, q, kv, kv, out, lse, scale, shared_kv=True)


CHUNKED_LIBRARY = torch.library.Library("movq_ext", "FRAGMENT")  # the operators live as long as this


def _define_chunked(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    CHUNKED_LIBRARY.define(schema)
    CHUNKED_LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"movq_ext::{name}", fake, lib=CHUNKED_LIBRARY)


_define_chunked(
    "chunked_attention_forward(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor lse)",
    chunked_attention_forward,
    attention_forward_fake,
)
_define_chunked(
    "chunked_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    chunked_attention_backward,
    attention_backward_fake,
)
_define_chunked(
    "chunked_shared_kv_attention_forward(Tensor q, Tensor kv, float scale) -> (Tensor out, Tensor lse)",
    chunked_shared_kv_attention_forward,
    shared_kv_attention_forward_fake,
)
_define_chunked(
    "chunked_shared_kv_attention_backward(Tensor dout, Tensor q, Tensor kv, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dkv)",
    chunked_shared_kv_attention_backward,
    shared_kv_attention_backward_fake,
)


# --- The epilogue of a convolution


def add_bias_residual_cpu(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    out = x.float()
    out = out if bias is None else out + bias.float()[:, None, None]
    x.copy_(out if residual is None else out + residual.float())


def add_bias_residual_fake(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Do nothing: x is modified in place, and its shape stays."""


def add_bias_residual_statistics_cpu(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int, chunk_pixels: int
) -> Tensor:
    add_bias_residual_cpu(x, bias, residual)
    values = x.float().flatten(2).unflatten(1, (groups, -1))  # (B, groups, channels of a group, pixels)
    chunks = [_moments(chunk, 3 if x.is_contiguous() else (2, 3)) for chunk in values.split(chunk_pixels, dim=3)]
    return torch.stack(chunks, dim=-2).flatten(2, -2)


def _moments(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the mean, the sum of squared distances from it, the number of values and 0, in a new last dimension."""
    variance, mean = torch.var_mean(x, dim, correction=0)
    count = torch.full_like(mean, x.numel() // mean.numel())
    return torch.stack([mean, variance * count, count, torch.zeros_like(mean)], dim=-1)


def add_bias_residual_statistics_fake(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int, chunk_pixels: int
) -> Tensor:
    chunks = (x.shape[2] * x.shape[3] + chunk_pixels - 1) // chunk_pixels
    parts = chunks * (x.shape[1] // groups) if x.is_contiguous() else chunks
    return x.new_empty(x.shape[0], groups, parts, 4, dtype=torch.float32)


# --- Upsampling


def fold_upsampling_cpu(weight: Tensor, windows: bool = False) -> Tensor:
    fold = upsampling.fold_windows if windows else upsampling.fold_upsampling
    return fold(weight.float()).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def fold_upsampling_backward_cpu(dfolded: Tensor, channels_last: bool) -> Tensor:
    dsums = dfolded.float().transpose(0, 1).flip(2, 3)
    for dim in (2, 3):  # dw0 = ds0 + ds1, dw1 = ds1 + ds2, dw2 = ds2 + ds3
        dsums = dsums.narrow(dim, 0, 3) + dsums.narrow(dim, 1, 3)
    return dsums.to(dfolded.dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def interleave_windows_cpu(windows: Tensor, bias: Tensor | None) -> Tensor:
    out = upsampling.interleave_windows(windows.float(), None if bias is None else bias.float())
    return out.to(windows.dtype).contiguous(memory_format=torch.channels_last)


def interleave_windows_statistics_cpu(
    windows: Tensor, bias: Tensor | None, groups: int, chunk_columns: int
) -> tuple[Tensor, Tensor]:
    out = interleave_windows_cpu(windows, bias)
    values = out.float().unflatten(1, (groups, -1))  # (B, groups, channels of a group, rows, columns)
    chunks = [_moments(chunk, (2, 4)) for chunk in values.split(chunk_columns, dim=4)]
    return out, torch.stack(chunks, dim=3).flatten(2, 3)


def _empty_channels_last(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape).contiguous(memory_format=torch.channels_last)


def fold_upsampling_fake(weight: Tensor, windows: bool = False) -> Tensor:
    out, in_ = weight.shape[:2]
    return _empty_channels_last(weight, *((4 * out, in_, 2, 2) if windows else (in_, out, 4, 4)))


def fold_upsampling_backward_fake(dfolded: Tensor, channels_last: bool) -> Tensor:
    in_, out = dfolded.shape[:2]
    return _empty_channels_last(dfolded, out, in_, 3, 3) if channels_last else dfolded.new_empty(out, in_, 3, 3)


def interleave_windows_fake(windows: Tensor, bias: Tensor | None) -> Tensor:
    batch, phases, height, width = windows.shape
    return _empty_channels_last(windows, batch, phases // 4, 2 * height - 2, 2 * width - 2)


def interleave_windows_statistics_fake(
    windows: Tensor, bias: Tensor | None, groups: int, chunk_columns: int
) -> tuple[Tensor, Tensor]:
    out = interleave_windows_fake(windows, bias)
    parts = out.shape[2] * ((out.shape[3] + chunk_columns - 1) // chunk_columns)
    return out, out.new_empty(out.shape[0], groups, parts, 4, dtype=torch.float32)


CPU_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "spatial_norm_forward": spatial_norm_forward_cpu,
    "spatial_norm_into": spatial_norm_into_cpu,
    "spatial_norm_backward": spatial_norm_backward_cpu,
    "attention_forward": attention_forward_cpu,
    "attention_backward": attention_backward_cpu,
    "shared_kv_attention_forward": shared_kv_attention_forward_cpu,
    "shared_kv_attention_backward": shared_kv_attention_backward_cpu,
    "add_bias_residual_": add_bias_residual_cpu,
    "add_bias_residual_statistics_": add_bias_residual_statistics_cpu,
    "fold_upsampling": fold_upsampling_cpu,
    "fold_upsampling_backward": fold_upsampling_backward_cpu,
    "interleave_windows": interleave_windows_cpu,
    "interleave_windows_statistics": interleave_windows_statistics_cpu,
}
FAKE_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "spatial_norm_forward": spatial_norm_forward_fake,
    "spatial_norm_into": spatial_norm_into_fake,
    "spatial_norm_backward": spatial_norm_backward_fake,
    "attention_forward": attention_forward_fake,
    "attention_backward": attention_backward_fake,
    "shared_kv_attention_forward": shared_kv_attention_forward_fake,
    "shared_kv_attention_backward": shared_kv_attention_backward_fake,
    "add_bias_residual_": add_bias_residual_fake,
    "add_bias_residual_statistics_": add_bias_residual_statistics_fake,
    "fold_upsampling": fold_upsampling_fake,
    "fold_upsampling_backward": fold_upsampling_backward_fake,
    "interleave_windows": interleave_windows_fake,
    "interleave_windows_statistics": interleave_windows_statistics_fake,
}
