"""The compiled operators as differentiable functions, with what PyTorch needs to know of them: shapes, and a CPU version.

The CPU version is the native path. It lets a program that was exported with these operators run anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import native
from .extension import extension_available

Optionals = tuple[Tensor | None, ...]
MAX_HEAD_SIZE = 512


def spatial_norm(
    f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float,
    silu: bool, f_bias: Tensor | None = None, bordered: bool = False,
) -> Tensor:  # fmt: skip
    """functional.spatial_norm by kernels: the arguments are checked, and zq_y and zq_b have f's dtype."""
    out: Tensor
    if f_bias is not None or bordered:  # for inference: the function below does not know them
        out, _, _ = torch.ops.movq_ext.spatial_norm_forward(f, zq_y, zq_b, weight, bias, groups, eps, silu, f_bias, bordered)
        return out
    out = SpatialNormFunction.apply(f, zq_y, zq_b, weight, bias, groups, eps, silu)[0]  # type: ignore[no-untyped-call]
    return out


class SpatialNormFunction(torch.autograd.Function):
    """Saves f, the small inputs and the statistics; what lies between f and the output is computed again."""

    @staticmethod
    def forward(
        f: Tensor,
        zq_y: Tensor | None,
        zq_b: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.movq_ext.spatial_norm_forward(f, zq_y, zq_b, weight, bias, groups, eps, silu)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.groups, ctx.eps, ctx.silu = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(*tensors, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        f, zq_y, zq_b, weight, bias, mean, rstd = ctx.saved_tensors
        inputs = (f, zq_y, zq_b, weight, bias)
        wanted = ctx.needs_input_grad[:5]
        # create_graph=True: the gradient's own gradient is native.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _native_gradients(dout, inputs, wanted, ctx.groups, ctx.eps, ctx.silu)
        else:
            grads = torch.ops.movq_ext.spatial_norm_backward(dout.to(f.dtype), *inputs, mean, rstd, ctx.groups, ctx.silu)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None


def _native_gradients(
    dout: Tensor,
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    wanted: tuple[bool, ...],
    groups: int,
    eps: float,
    silu: bool,
) -> Optionals:
    out = native.spatial_norm(*inputs, groups, eps, "silu" if silu else None)
    sources = [x for x, want in zip(inputs, wanted, strict=True) if want and x is not None]
    grads = iter(torch.autograd.grad(out, sources, dout, create_graph=True))
    return tuple(next(grads) if want else None for want in wanted)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """functional.attention by kernels: the arguments are checked, and heads are no larger than MAX_HEAD_SIZE."""
    out: Tensor = AttentionFunction.apply(q, k, v, scale)[0]  # type: ignore[no-untyped-call]
    return out


class AttentionFunction(torch.autograd.Function):
    """Saves q, k, v, the output and the log-sum-exp of each row of scores; the scores are computed again, a tile at a time."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return torch.ops.movq_ext.attention_forward(q, k, v, scale)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, ctx.scale = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        # create_graph=True: the gradient's own gradient is native.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _native_attention_gradients(dout, (q, k, v), ctx.needs_input_grad[:3], ctx.scale)
        else:
            grads = torch.ops.movq_ext.attention_backward(dout.to(q.dtype), q, k, v, out, lse, ctx.scale)
        return *(grad if want else None for grad, want in zip(grads, ctx.needs_input_grad[:3], strict=True)), None


def _native_attention_gradients(
    dout: Tensor, inputs: tuple[Tensor, Tensor, Tensor], wanted: tuple[bool, ...], scale: float
) -> Optionals:
    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
        out = native.attention(*inputs, scale)
        sources = [x for x, want in zip(inputs, wanted, strict=True) if want]
        grads = iter(torch.autograd.grad(out, sources, dout, create_graph=True))
    return tuple(next(grads) if want else None for want in wanted)


def add_bias_residual_(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """functional.add_bias_residual_ by a kernel: the arguments are checked, and nothing records a gradient."""
    torch.ops.movq_ext.add_bias_residual_(x, bias, residual)
    return x


def _statistics(f: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    grouped = f.float().reshape(f.shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    return mean, (variance + eps).rsqrt()


def _forward_cpu(
    f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float,
    silu: bool, f_bias: Tensor | None = None, bordered: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = torch.empty_like(_like(f, f))
    if f_bias is not None:
        f = f.float() + f_bias.float()[:, None, None]
        zq_y, zq_b, weight, bias = (None if x is None else x.float() for x in (zq_y, zq_b, weight, bias))
    activation = "silu" if silu else None
    out.copy_(native.spatial_norm(f, zq_y, zq_b, weight, bias, groups, eps, activation, bordered=bordered))
    return out, *_statistics(f, groups, eps)


def _backward_cpu(
    dout: Tensor, f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, groups: int, silu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    size = f.shape
    mean, rstd = (x.repeat_interleave(size[1] // groups, dim=1)[:, :, None, None] for x in (mean, rstd))
    n = (f.float() - mean) * rstd
    w, c = (None if x is None else x.float()[None, :, None, None] for x in (weight, bias))
    v = n if w is None else n * w
    v = v if c is None else v + c
    h, y = dout.float(), None
    dy, db = f.new_empty(0), f.new_empty(0)
    if zq_y is not None and zq_b is not None:
        y, b = (F.interpolate(x.float(), size=size[2:], mode="nearest") for x in (zq_y, zq_b))
    if silu:
        slope = torch.sigmoid(u := v if y is None else v * y + b)
        h = h * slope * (1 + u * (1 - slope))
    if zq_y is not None:
        shrink = torch.ops.aten.upsample_nearest2d_backward
        dy, db = (torch.empty_like(_like(f, zq_y)).copy_(shrink(x.contiguous(), size[2:], zq_y.shape)) for x in (h * v, h))
    dv = h if y is None else h * y
    dweight = f.new_empty(0) if weight is None else (dv * n).sum((0, 2, 3)).to(weight.dtype)
    dbias = f.new_empty(0) if bias is None else dv.sum((0, 2, 3)).to(bias.dtype)
    dn = dv if w is None else dv * w
    means = (
        x.reshape(size[0], groups, -1).mean(2).repeat_interleave(size[1] // groups, dim=1)[:, :, None, None] for x in (dn, dn * n)
    )
    df = rstd * (dn - next(means) - n * next(means))
    return torch.empty_like(_like(f, f)).copy_(df), dy, db, dweight, dbias


def _like(f: Tensor, x: Tensor) -> Tensor:
    """x in the layout that the kernels use for f and what goes with it: f's own where that is dense NCHW or NHWC."""
    if f.is_contiguous():
        return x.contiguous()
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(f))


def _forward_fake(
    f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float,
    silu: bool, f_bias: Tensor | None = None, bordered: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = [f.new_empty(f.shape[0], groups, dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(_like(f, f)), statistics[0], statistics[1]


def _backward_fake(
    dout: Tensor, f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, groups: int, silu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    maps = [None if x is None else _like(f, x) for x in (f, zq_y, zq_b)]
    return tuple(f.new_empty(0) if x is None else torch.empty_like(x) for x in (*maps, weight, bias))


def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = q.float() @ k.float().mT * scale
    lse = scores.logsumexp(3)
    return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def _attention_backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    p = (q @ k.mT * scale - lse[..., None]).exp()
    ds = p * (dout @ v.mT - (dout * out).sum(3, keepdim=True)) * scale
    return (ds @ k).to(dtype), (ds.mT @ q).to(dtype), (p.mT @ dout).to(dtype)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attention_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _add_bias_residual_cpu(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    out = x.float()
    out = out if bias is None else out + bias.float()[:, None, None]
    x.copy_(out if residual is None else out + residual.float())


def _add_bias_residual_fake(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """x is changed in place, and nothing is made."""


if extension_available():
    torch.library.register_fake("movq_ext::add_bias_residual_", _add_bias_residual_fake)
    torch.library.register_kernel("movq_ext::add_bias_residual_", "cpu", _add_bias_residual_cpu)
    torch.library.register_fake("movq_ext::attention_forward", _attention_fake)
    torch.library.register_fake("movq_ext::attention_backward", _attention_backward_fake)
    torch.library.register_kernel("movq_ext::attention_forward", "cpu", _attention_cpu)
    torch.library.register_kernel("movq_ext::attention_backward", "cpu", _attention_backward_cpu)
    torch.library.register_fake("movq_ext::spatial_norm_forward", _forward_fake)
    torch.library.register_fake("movq_ext::spatial_norm_backward", _backward_fake)
    torch.library.register_kernel("movq_ext::spatial_norm_forward", "cpu", _forward_cpu)
    torch.library.register_kernel("movq_ext::spatial_norm_backward", "cpu", _backward_cpu)
