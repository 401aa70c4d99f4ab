"""Which path an operator takes, and why: the CUDA kernels, PyTorch's matrix products or PyTorch's own operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import attention_backends, native, upsampling
from .extension import device_reason, dtype_name, dtype_reason, warn_once
from .options import NormOptions
from .self_test import self_test_failure

SELF_TESTS = {"hopper": "hopper_attention", "tile": "attention", "cublas": "chunked_attention"}  # of attention's backends
MAX_MAP_PIXELS = 2**31 - 1 - 2**16  # of one feature map; the same in csrc/kernels/spatial_norm.h


def explain(x: Tensor, operator: str = "spatial_norm") -> str:
    """Return the path that an operator takes for x, ``native``, ``cuda`` or ``cublas``, and why.

    Attention has two kinds of kernels, ``hopper`` and ``tile``; the text names the one that runs.

    Args:
        x: ``(B, C, H, W)`` for ``"spatial_norm"``, which also takes clips ``(B, C, T, H, W)``, ``"spatial_attention"`` and
            ``"upsample_conv"`` (the small map, convolved to C channels by a weight in x's dtype, or in float32 under autocast);
            ``(B, heads, tokens, C)`` for ``"attention"`` and ``"shared_kv_attention"``.
        operator: name of the operator.

    Returns:
        ``native: <reason>``, ``cuda: <reason>`` or ``cublas: <reason>``.

    Raises:
        ValueError: the operator is unknown, or the environment variable MOVQ_EXT_ATTENTION or MOVQ_EXT_SELF_TEST is invalid.
    """
    head_dim = {"spatial_norm": None, "upsample_conv": None, "spatial_attention": 1, "attention": 3, "shared_kv_attention": 3}
    if operator not in head_dim:
        raise ValueError(f"operator must be one of {', '.join(head_dim)}, got {operator!r}")
    if not x.is_cuda:
        return f"native: the CUDA kernels do not run on {x.device.type} tensors"
    if (dim := head_dim[operator]) is not None:
        return _explain_attention(x, operator == "shared_kv_attention", dim)
    if reason := why_native(x) or failed_self_test(operator, x):
        return f"native: {reason}"
    details = f"; {_explain_upsampling(x)}" if operator == "upsample_conv" else ""
    if x.dim() == 5:
        details = "; the kernels resize a clip's latent along time"
    return f"cuda: compiled for {torch.cuda.get_device_name(x.device)}{details}"


def _explain_attention(x: Tensor, shared_kv: bool, head_dim: int) -> str:
    gradient = torch.is_grad_enabled() and x.requires_grad
    backend, reason, _ = _choose_attention(x, native.compute_dtype(x), shared_kv, gradient, head_dim)
    if backend in ("native", "cublas"):
        return f"{backend}: {reason}"
    return f"cuda: compiled for {torch.cuda.get_device_name(x.device)}; {backend} kernels: {reason}"


def _explain_upsampling(x: Tensor) -> str:
    channels, dtype = x.shape[1], native.compute_dtype(x)
    weight_dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype  # as a trained model has under autocast
    costs = upsampling.count_costs(x, channels, True, dtype, weight_dtype)
    counted = ", ".join(f"{name} {cost.operations / 1e9:.3g} GFLOP and {cost.bytes / 1e6:.3g} MB" for name, cost in costs.items())
    method = upsampling_method(x, channels, True, native.is_inference(x), weight_dtype)
    return f"method {method} with a weight in {dtype_name(weight_dtype)} ({counted})"


def why_native(x: Tensor) -> str | None:
    """Return why the kernels cannot take x, a CUDA tensor, or None if they can."""
    if no_kernels := _why_no_kernels():
        return no_kernels
    if reason := dtype_reason(x.dtype):
        return reason
    if x.dim() in (4, 5) and math.prod(x.shape[2:]) > MAX_MAP_PIXELS:
        return f"the CUDA kernels take at most {MAX_MAP_PIXELS} pixels, got shape {tuple(x.shape)}"
    return device_reason(x.device.index)


def _why_no_kernels() -> str | None:
    """Return why no operator may run kernels, whatever its tensors, or None if it may."""
    if native.traces_plain_operators():
        return "torch.jit.trace and torch.onnx.export trace PyTorch's operators only"
    if native.is_transformed():
        return "the CUDA kernels have no rules for vmap, jvp and forward-mode differentiation"
    return None


def why_native_parameters(f: Tensor, options: NormOptions) -> str | None:
    """Return why the kernels cannot take a norm's weight and bias beside f, or None if they can."""
    weight, bias = options.weight, options.bias
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype not in (torch.float32, f.dtype):
            return f"the CUDA kernels take {name} in float32 or f's {dtype_name(f.dtype)}, got {dtype_name(parameter.dtype)}"
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"the CUDA kernels take weight and bias of one dtype, got {dtype_name(weight.dtype)} and {dtype_name(bias.dtype)}"
    return None


def failed_self_test(operator: str, x: Tensor) -> str | None:
    """Return how the kernels of an operator on maps differ from the native path for maps like x, or None if they agree."""
    failure: str | None = self_test_failure(operator, x.device, x.dtype, not x.is_contiguous())
    return failure


def attention_backend(*inputs: Tensor) -> str:
    """Return the backend for q, k and v, or q and kv, on a GPU. Warn once if it is not the one that was asked for or chosen."""
    q, gradient = inputs[0], torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    choice = _choose_attention(q, q.dtype, len(inputs) == 2, gradient)
    if choice.is_fallback:
        if choice.reason.startswith(attention_backends.VARIABLE):
            attention_backends.warn_of_request_once(choice.reason, choice.backend)
        else:
            warn_once(choice.reason)
    return choice.backend


def _choose_attention(
    q: Tensor, dtype: torch.dtype, shared_kv: bool, gradient: bool, head_dim: int = 3
) -> attention_backends.Choice:
    """Return the backend for q cast to a dtype, whose kernels agree with the native path, and why it runs."""
    if reason := _why_no_kernels():
        return attention_backends.Choice("native", reason, is_fallback=True)
    tokens = None if native.is_tracing() else q.shape[2] if head_dim == 3 else q.shape[2] * q.shape[3]
    problem = attention_backends.Problem(
        q.device.index, dtype, q.shape[head_dim], tokens, shared_kv, gradient, native.is_exporting()
    )
    choice = attention_backends.choose(problem)
    if choice.backend != "native" and (failure := self_test_failure(SELF_TESTS[choice.backend], q.device, dtype, False)):
        return attention_backends.Choice("native", failure, True)
    return choice


def upsampling_method(x: Tensor, out_channels: int, has_bias: bool, in_inference: bool, weight_dtype: torch.dtype) -> str:
    """Return the method of `upsample_conv` that takes the least counted time for x on a GPU."""
    if native.is_tracing():  # the program must work for other sizes
        return "transposed"
    dtype = native.compute_dtype(x)
    methods = upsampling.METHODS if in_inference else ("transposed", "direct")
    costs = upsampling.count_costs(x, out_channels, has_bias, dtype, weight_dtype)
    return min(methods, key=lambda method: costs[method].equivalent_bytes(dtype))
