"""Argument checks of the operators: each error names the argument, what was expected and what was given."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, upsampling
from .options import NormOptions

ACTIVATIONS = (None, "silu")
MAP, CLIP = "(batch, channels, height, width)", "(batch, channels, frames, height, width)"


def check_spatial_norm(f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions) -> None:
    if f.dim() not in (4, 5):
        raise ValueError(f"f must have 4 dimensions {MAP}, or 5 {CLIP}, got shape {tuple(f.shape)}")
    _check_not_empty_and_floating("f", f)
    if options.split_first_frame and f.dim() == 4:
        raise ValueError(f"split_first_frame must be False for an f without frames, got True for shape {tuple(f.shape)}")
    channels, groups = f.shape[1], options.groups
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must be a positive divisor of f's channels, got groups={groups} for {channels} channels")
    if options.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {options.activation!r}")
    if (zq_y is None) != (zq_b is None):
        given = "zq_y" if zq_b is None else "zq_b"
        raise ValueError(f"zq_y and zq_b must be given together or not at all, got only {given}")
    if zq_y is not None and zq_b is not None:
        _check_modulation(f, zq_y, zq_b)
    for name, parameter in (("weight", options.weight), ("bias", options.bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {tuple(parameter.shape)}")
    if options.f_bias is not None:
        check_channel_bias("f_bias", options.f_bias, "f", f)
    if options.bordered and (zq_y is None or f.dim() == 5 or not native.is_bordered(zq_y, f)):
        expected = f"three rows and columns for each cell of at least 2x2 of f's {tuple(f.shape[2:])} pixels"
        raise ValueError(f"bordered zq_y must have {expected}, got {None if zq_y is None else tuple(zq_y.shape)}")
    if options.statistics is not None:
        _check_statistics(f, options)
    if torch.is_grad_enabled() and (options.f_bias is not None or options.bordered or options.statistics is not None):
        fused = "bordered" if options.bordered else "f_bias" if options.f_bias is not None else "statistics"
        tensors = dict(f=f, zq_y=zq_y, zq_b=zq_b, weight=options.weight, bias=options.bias, f_bias=options.f_bias)
        check_no_gradient(f"spatial_norm with {fused}", **tensors)


def _check_statistics(f: Tensor, options: NormOptions) -> None:
    statistics, expected = options.statistics, (f.shape[0], options.groups)
    assert statistics is not None
    if statistics.dim() != 4 or statistics.shape[:2] != expected or statistics.shape[2] < 1 or statistics.shape[3] != 4:
        raise ValueError(f"statistics must have shape ({expected[0]}, {expected[1]}, parts, 4), got {tuple(statistics.shape)}")
    if statistics.device != f.device:
        raise ValueError(f"statistics must be on f's device {f.device}, got {statistics.device}")
    if statistics.dtype != torch.float32:
        raise TypeError(f"statistics must be float32, got {statistics.dtype}")
    if options.f_bias is not None:
        raise ValueError("statistics must not be given with f_bias: they are those of f alone")


def _check_modulation(f: Tensor, zq_y: Tensor, zq_b: Tensor) -> None:
    for name, zq in (("zq_y", zq_y), ("zq_b", zq_b)):
        _check_rank(name, zq, MAP if f.dim() == 4 else CLIP, f.dim())
        _check_not_empty_and_floating(name, zq)
        if zq.shape[:2] != f.shape[:2]:
            raise ValueError(f"{name} must have f's batch and channels {tuple(f.shape[:2])}, got shape {tuple(zq.shape)}")
    if zq_y.shape != zq_b.shape:
        raise ValueError(f"zq_y and zq_b must have the same shape, got {tuple(zq_y.shape)} and {tuple(zq_b.shape)}")
    check_device_and_dtype("f", f, zq_y=zq_y, zq_b=zq_b)


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_heads(q, k=k, v=v)
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have the same number of tokens, got {k.shape[2]} and {v.shape[2]}")
    check_device_and_dtype("q", q, k=k, v=v)


def check_shared_kv_attention(q: Tensor, kv: Tensor) -> None:
    _check_heads(q, kv=kv)
    check_device_and_dtype("q", q, kv=kv)


def _check_heads(q: Tensor, **others: Tensor) -> None:
    for name, tensor in (("q", q), *others.items()):
        _check_rank(name, tensor, "(batch, heads, tokens, head size)")
        _check_not_empty_and_floating(name, tensor)
        if tensor.shape[:2] != q.shape[:2] or tensor.shape[3] != q.shape[3]:
            raise ValueError(f"{name} must have q's batch, heads and head size {tuple(q.shape)}, got {tuple(tensor.shape)}")


def check_spatial_attention(q: Tensor, **others: Tensor) -> None:
    for name, tensor in (("q", q), *others.items()):
        check_map(name, tensor)
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")


def check_add_bias_residual(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check_map("x", x)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"x must be dense in NCHW or channels_last, got strides {x.stride()} for shape {tuple(x.shape)}")
    if bias is None and residual is None:
        raise ValueError("bias or residual must be given, got neither")
    if bias is not None:
        check_channel_bias("bias", bias, "x", x)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        if residual.device != x.device:
            raise ValueError(f"residual must be on x's device {x.device}, got {residual.device}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")
    check_no_gradient("add_bias_residual_", x=x, bias=bias, residual=residual)


def check_upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, method: str | None) -> None:
    check_map("x", x)
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"weight must have shape (out, {x.shape[1]}, 3, 3), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_device_and_dtype("x", x, weight=weight, **({} if bias is None else {"bias": bias}))
    if method is not None and method not in upsampling.METHODS:
        raise ValueError(f"method must be one of {', '.join(upsampling.METHODS)}, got {method!r}")


def check_map(name: str, x: Tensor) -> None:
    """x must be a non-empty floating-point ``(B, C, H, W)``."""
    _check_rank(name, x, MAP)
    _check_not_empty_and_floating(name, x)


def _check_rank(name: str, x: Tensor, dimensions: str, rank: int = 4) -> None:
    if x.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions {dimensions}, got shape {tuple(x.shape)}")


def _check_not_empty_and_floating(name: str, x: Tensor) -> None:
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def check_device_and_dtype(first: str, x: Tensor, **others: Tensor) -> None:
    """All tensors must be on x's device and, outside autocast (which casts them), have its dtype."""
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name} must be on {first}'s device {x.device}, got {other.device}")
        if other.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name} must have {first}'s dtype {x.dtype}, got {other.dtype}")


def check_channel_bias(name: str, bias: Tensor, first: str, x: Tensor) -> None:
    """A bias must be ``(C,)`` on x's device, in x's dtype or float32."""
    if bias.shape != (x.shape[1],):
        raise ValueError(f"{name} must have shape ({x.shape[1]},), got {tuple(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"{name} must be on {first}'s device {x.device}, got {bias.device}")
    if bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{name} must be float32 or have {first}'s dtype {x.dtype}, got {bias.dtype}")


def check_no_gradient(operator: str, **tensors: Tensor | None) -> None:
    """No tensor may require a gradient where gradients are recorded: the operator records none."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name} must not require a gradient: {operator} records none; call it under torch.no_grad()")
