"""The compiled operators, and chunked attention, as differentiable functions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import clips, native, upsampling
from .extension import extension_available
from .options import NormOptions
from .registration import register_implementations
from .statistics import MeasuredMap, chunk_columns, chunk_pixels

Gradients = tuple[Tensor | None, ...]

if extension_available():
    register_implementations()


def _call(name: str, *arguments: Any) -> Any:
    """Call a compiled operator; raise torch.OutOfMemoryError, which the stable ABI cannot, if it runs out of GPU memory."""
    try:
        return getattr(torch.ops.movq_ext, name)(*arguments)
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from None


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call an autograd function: its forward alone if nothing is recorded, and ``function.apply`` only where that is needed.

    ``apply`` inspects the signature of a forward with a setup_context in every call. That takes 100 us, longer than most kernels.
    """
    if native.is_tracing() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    if torch.is_grad_enabled():
        for x in arguments:
            if isinstance(x, Tensor) and x.requires_grad:
                return _with_context(function).apply(*arguments)
    return function.forward(*arguments)


@functools.cache
def _with_context(function: Any) -> type[torch.autograd.Function]:
    """Return the function as ``forward(ctx, ...)``, without a setup_context: functorch and torch.compile cannot take it."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    methods = {"forward": forward, "setup_context": torch.autograd.Function.setup_context}
    return type(function.__name__, (function,), {name: staticmethod(method) for name, method in methods.items()})


def spatial_norm(
    f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions, clip: clips.ClipShape = clips.IMAGE
) -> Tensor:
    """functional.fused_spatial_norm with CUDA kernels. Arguments are checked; zq_y and zq_b have f's dtype. A clip is a map."""
    arguments = (f, zq_y, zq_b, *_unpacked(options))
    out: Tensor
    if options.f_bias is not None or options.bordered or options.statistics is not None:
        # Inference only: the autograd function does not take them.
        out, _, _ = _call("spatial_norm_forward", *arguments, options.f_bias, options.bordered, options.statistics, *clip)
    else:
        out, _, _ = _apply(SpatialNormFunction, *arguments, *clip)
    return out


def spatial_norm_into(
    out: Tensor, f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions, clip: clips.ClipShape
) -> None:
    """`spatial_norm` written to out, which may be part of a larger map with f's memory format. No gradient is recorded."""
    _call("spatial_norm_into", out, f, zq_y, zq_b, *_unpacked(options), *clip)


def _unpacked(options: NormOptions) -> tuple[Tensor | None, Tensor | None, int, float, bool]:
    """Return what autograd and torch.library take of the options: tensors and numbers only."""
    return options.weight, options.bias, options.groups, options.eps, options.activation == "silu"


class SpatialNormFunction(torch.autograd.Function):
    """Saves f, the small inputs and the statistics; backward recomputes everything between f and the output."""

    @staticmethod
    def forward(  # not *arguments: torch.compile counts the parameters to tell whether the first is ctx
        f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        groups: int, eps: float, silu: bool, frames: int, latent_frames: int, split_first_frame: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        arguments = f, zq_y, zq_b, weight, bias, groups, eps, silu, None, False, None, frames, latent_frames, split_first_frame
        return _call("spatial_norm_forward", *arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        tensors, (ctx.groups, ctx.eps, ctx.silu, *ctx.clip) = inputs[:5], inputs[5:]
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(*tensors, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> Gradients:
        f, zq_y, zq_b, weight, bias, mean, rstd = ctx.saved_tensors
        inputs = (f, zq_y, zq_b, weight, bias)
        needed = ctx.needs_input_grad[:5]
        grads: Sequence[Tensor | None]
        if _records_gradient():
            options = NormOptions(weight, bias, ctx.groups, ctx.eps, "silu" if ctx.silu else None)
            out = clips.native_spatial_norm(f, zq_y, zq_b, options, clips.ClipShape(*ctx.clip))
            grads = _native_gradients(out, inputs, needed, dout)
        else:
            grads = _call("spatial_norm_backward", dout.to(f.dtype), *inputs, mean, rstd, ctx.groups, ctx.silu, *ctx.clip)
        return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * 6


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str = "tile") -> Tensor:
    """functional.attention with the backend "tile" or "cublas". Arguments are checked, and the backend takes their head size."""
    out: Tensor
    out, _ = _apply(AttentionFunction, q, k, v, scale, backend)
    return out


class AttentionFunction(torch.autograd.Function):
    """Saves q, k, v, the output and the log-sum-exp of each row of scores; backward recomputes the scores, tile by tile."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
        if backend == "cublas":
            return _call("chunked_attention_forward", q, k, v, scale)  # type: ignore[no-any-return]
        return _call("attention_forward", q, k, v, scale)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, ctx.scale, ctx.backend = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> Gradients:
        q, k, v, out, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        grads: Sequence[Tensor | None]
        if _records_gradient():
            with sdpa_kernel(SDPBackend.MATH):  # the only backend that can be differentiated twice
                grads = _native_gradients(native.attention(q, k, v, ctx.scale), (q, k, v), needed, dout)
        elif ctx.backend == "cublas":
            grads = _call("chunked_attention_backward", dout.to(q.dtype), q, k, v, out, lse, ctx.scale)
        else:
            grads = _call("attention_backward", dout.to(q.dtype), q, k, v, out, lse, ctx.scale)
        return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None


def shared_kv_attention(q: Tensor, kv: Tensor, scale: float, backend: str = "tile") -> Tensor:
    """functional.shared_kv_attention with the backend "hopper", "tile" or "cublas", see `attention`."""
    out: Tensor
    out, _ = _apply(SharedKVAttentionFunction, q, kv, scale, backend)
    return out


class SharedKVAttentionFunction(torch.autograd.Function):
    """AttentionFunction with one tensor and one gradient for keys and values."""

    @staticmethod
    def forward(q: Tensor, kv: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
        if backend == "cublas":
            return _call("chunked_shared_kv_attention_forward", q, kv, scale)  # type: ignore[no-any-return]
        return _call("shared_kv_attention_forward", q, kv, scale, backend == "hopper")  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, kv, ctx.scale, ctx.backend = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, kv, out, lse)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> Gradients:
        q, kv, out, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        arguments = dout.to(q.dtype), q, kv, out, lse, ctx.scale
        grads: Sequence[Tensor | None]
        if _records_gradient():
            with sdpa_kernel(SDPBackend.MATH):  # the only backend that can be differentiated twice
                grads = _native_gradients(native.shared_kv_attention(q, kv, ctx.scale), (q, kv), needed, dout)
        elif ctx.backend == "cublas":
            grads = _call("chunked_shared_kv_attention_backward", *arguments)
        else:
            grads = _call("shared_kv_attention_backward", *arguments, ctx.backend == "hopper")
        return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None


def fold_upsampling(weight: Tensor) -> Tensor:
    """upsampling.fold_upsampling with a CUDA kernel: sums in float32, rounded once."""
    folded: Tensor = _apply(FoldUpsamplingFunction, weight)
    return folded


class FoldUpsamplingFunction(torch.autograd.Function):
    """Saves the weight for its layout, and for second derivatives."""

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return _call("fold_upsampling", weight, False)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dfolded: Tensor) -> Tensor | None:
        (weight,) = ctx.saved_tensors
        if _records_gradient():
            return _native_gradients(upsampling.fold_upsampling(weight), (weight,), (True,), dfolded)[0]
        channels_last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        return _call("fold_upsampling_backward", dfolded, channels_last)  # type: ignore[no-any-return]


def upsample_by_windows(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 0) -> MeasuredMap:
    """upsampling.upsample_conv(..., "windows") with CUDA kernels around the convolution. No gradient is recorded.

    Leaves statistics for a norm of `groups` groups where that pays.
    """
    windows = F.conv2d(x, _call("fold_upsampling", weight, True), padding=1)
    if columns := chunk_columns(windows, groups, bias):
        return MeasuredMap(*_call("interleave_windows_statistics", windows, bias, groups, columns))
    return MeasuredMap(_call("interleave_windows", windows, bias))


def _records_gradient() -> bool:
    """True if the gradient itself is recorded (create_graph=True); the native path computes it then."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _native_gradients(out: Tensor, inputs: Sequence[Tensor | None], needed: Sequence[bool], dout: Tensor) -> Gradients:
    """Return the recorded gradient of each input that needs one, None for the others."""
    sources = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
    grads = iter(torch.autograd.grad(out, sources, dout, create_graph=True))
    return tuple(next(grads) if need else None for need in needed)


def add_bias_residual_(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """functional.add_bias_residual_ with a CUDA kernel. Arguments are checked, and no gradient is recorded."""
    _call("add_bias_residual_", x, bias, residual)
    return x


def add_bias_residual_with_statistics_(x: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int) -> MeasuredMap:
    """functional.add_bias_residual_with_statistics_ with a CUDA kernel. Arguments are checked; no gradient is recorded."""
    if pixels := chunk_pixels(x, groups, bias, residual):
        return MeasuredMap(x, _call("add_bias_residual_statistics_", x, bias, residual, groups, pixels))
    return MeasuredMap(add_bias_residual_(x, bias, residual))
