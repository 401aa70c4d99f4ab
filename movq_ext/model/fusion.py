"""Fusing layers: which may be fused, deferred biases, keys absorbed into queries.

Eager, compiled, exported and traced programs all fold upsampling and join convolutions that share an input, but eager ones on a
CPU take `WinogradUpsampling` in wide layers without gradients. On one CPU core (medians of interleaved runs, quartiles in
brackets) folding takes 0.4 to 0.6 times as long as the two layers, both eager and compiled, 0.55 (0.49 to 0.64) in a compiled
training step, and 0.7 in onnxruntime; a whole compiled decode takes 0.87 (0.78 to 0.99). Joining makes no difference to a
compiled decode: 1.05 (0.90 to 1.19).
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..ops.functional import add_bias_residual_, add_bias_residual_with_statistics_
from ..ops.native import PLAIN_TENSORS, compute_dtype, is_inference, multiply_pixels
from ..ops.statistics import MeasuredMap
from ..profiling import is_range_hook, layer_range

# The functions below run for every layer in every call, while a GPU may wait: loops rather than generators in all().
CONVOLUTION_METHODS = {kind: (kind.forward, kind._conv_forward) for kind in (nn.Conv2d, nn.Conv3d)}
KERNELS_AND_PADDINGS = (((1, 1), (0, 0)), ((3, 3), (1, 1)))  # that keep a map's size
PLAIN_PARAMETERS = (*PLAIN_TENSORS, FakeTensor, FunctionalTensor)  # the last two stand for plain ones in torch.export
# In these types attention may use its input as keys and values, see `absorb_keys`. A block's error against float64 is at most
# 1.05 times the published order's; in float32 it would be up to 1.25 times.
SHARED_KV_DTYPES = (torch.float16, torch.bfloat16)
GLOBAL_HOOKS = [
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def is_unmodified(module: nn.Module) -> bool:
    """True if calling the module runs its class's forward on plain parameters and nothing else.

    False with hooks (except those of `annotate`), a forward set on the instance, ``module.compile()``, or parameters that are
    tensor subclasses (quantised weights).
    """
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return False
    if not has_plain_parameters(module):
        return False
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        if hooks and not all(is_range_hook(hook) for hook in hooks.values()):
            return False
    for hooks in GLOBAL_HOOKS:  # torch's own (FlopCounterMode) only observe
        if hooks and not all(str(hook.__module__).startswith("torch.") for hook in hooks.values()):
            return False
    return True


def has_plain_parameters(module: nn.Module) -> bool:
    """False if the module's own parameters include a tensor subclass (quantised weights)."""
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) not in PLAIN_PARAMETERS:
            return False
    return True


def submodules(module: nn.Module) -> list[nn.Module]:
    """Return the module and all modules inside it, level by level; unlike ``modules()`` a shared one as often as it appears.

    Takes a fifth of the time of ``modules()``, which builds every module's name.
    """
    found = [module]
    for parent in found:  # the list grows meanwhile
        for child in parent._modules.values():
            if child is not None:
                found.append(child)
    return found


def is_plain_conv(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """True if the layer is an unmodified ``nn.Conv2d``: dense, 1x1 or 3x3, zero-padded to keep the map's size.

    False for adapters (LoRA), quantised layers, patched methods (circular padding) and hooked layers.
    """
    if type(layer) is not nn.Conv2d or not is_unmodified(layer) or has_patched_convolution(layer, nn.Conv2d):
        return False
    is_dense = layer.stride == layer.dilation == (1, 1) and layer.groups == 1
    return is_dense and layer.padding_mode == "zeros" and (layer.kernel_size, layer.padding) in KERNELS_AND_PADDINGS


def has_patched_convolution(layer: nn.Module, kind: type[nn.Conv2d] | type[nn.Conv3d]) -> bool:
    """True if the layer's ``_conv_forward`` was replaced, or a method of its class ``nn.Conv2d`` or ``nn.Conv3d``."""
    # Under torch.compile the bound method's __func__ is never the class's function.
    forward, conv_forward = CONVOLUTION_METHODS[kind]
    return "_conv_forward" in layer.__dict__ or kind.forward is not forward or kind._conv_forward is not conv_forward


def is_plain_conv1x1(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return is_plain_conv(layer) and layer.kernel_size == (1, 1)


def is_plain_conv3x3(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return is_plain_conv(layer) and layer.kernel_size == (3, 3)


def is_plain_group_norm(layer: nn.Module) -> TypeGuard[nn.GroupNorm]:
    return type(layer) is nn.GroupNorm and is_unmodified(layer)


def plain_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight of an unmodified convolution or embedding, or None: other layers may take other dtypes and devices."""
    if type(layer) not in (nn.Conv2d, nn.Embedding) or type(layer.weight) not in PLAIN_PARAMETERS:
        return None
    # Reading hooks while compiling would compile again whenever one comes or goes.
    return cast(Tensor, layer.weight) if torch.compiler.is_compiling() or is_unmodified(layer) else None


def runs_inference(layer: nn.Module, *inputs: Tensor | None) -> bool:
    """True if no gradient is recorded for the layer's parameters or these inputs, and plain tensors run eagerly.

    Test this before `is_unmodified`: while compiling it is False, and hooks that are never read need no guards.
    """
    if not is_inference(*[x for x in inputs if x is not None]):
        return False
    parameters = [parameter for module in submodules(layer) for parameter in module._parameters.values()]
    return is_inference(*[parameter for parameter in parameters if parameter is not None])


def run_fused(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a layer's ``_forward_fused`` inside its profiler range, which a call of the layer would open."""
    with layer_range(layer):
        return layer._forward_fused(*args, **kwargs)


def conv_deferring_bias(conv: nn.Module, x: Tensor, deferred: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Apply a convolution, leaving its bias to a later kernel where one adds it for free: in inference on a GPU.

    Args:
        conv: any layer; one that is not a plain convolution is called and defers nothing.
        x: ``(B, C, H, W)``.
        deferred: another convolution's deferred bias, added to this one's.

    Returns:
        The map, and the bias ``(C,)`` still to be added to it, or None.
    """
    if not (runs_kernels(x) and is_plain_conv(conv)):
        return conv(x), deferred
    weight, bias = conv.weight, conv.bias
    if bias is None or not is_inference(x, weight, bias):
        return conv(x), deferred
    h = F.conv2d(x, weight, padding=conv.padding)
    if bias.dtype not in (h.dtype, torch.float32):  # weights of one half precision under autocast to the other
        return h.add_(bias[:, None, None]), deferred
    return h, bias if deferred is None else bias + deferred


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``F.conv2d(x, weight, bias)`` for a 1x1 kernel; in 16-bit inference on a GPU as a matrix product.

    The product's kernel adds the bias and takes a transposed weight. cuDNN's convolution leaves the bias to another kernel, which
    reads and writes the map once more, and copies such a weight. The product follows ``torch.backends.cuda.matmul``: set its
    ``allow_bf16_reduced_precision_reduction`` and ``allow_fp16_reduced_precision_reduction`` to False for float32 accumulation
    throughout.
    """
    return multiply_pixels(x, weight, bias) if _is_product(x, weight, bias) else F.conv2d(x, weight, bias)


def _is_product(x: Tensor, *parameters: Tensor | None) -> bool:
    """True if `conv1x1` computes a matrix product. float32 stays with cuDNN, which has its own TF32 setting."""
    in_16_bits = runs_kernels(x) and compute_dtype(x) in SHARED_KV_DTYPES
    if not in_16_bits or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return is_inference(x, *[parameter for parameter in parameters if parameter is not None])


def run_conv1x1(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute `conv1x1` of a plain layer in inference; call any other."""
    if runs_inference(layer, x) and is_plain_conv1x1(layer):
        return conv1x1(x, layer.weight, layer.bias)
    return cast(Tensor, layer(x))


def convolve_shortcut(shortcut: nn.Module, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ``shortcut(x)``, and the bias still to be added for the bias that the block's last convolution deferred."""
    if bias is None:
        return cast(Tensor, shortcut(x)), None
    if is_plain_conv1x1(shortcut) and _is_product(x, shortcut.weight, shortcut.bias):
        return conv1x1(x, shortcut.weight, shortcut.bias), bias
    return conv_deferring_bias(shortcut, x, bias)


def add_residual(h: Tensor, bias: Tensor | None, x: Tensor, conv: nn.Module) -> Tensor:
    """Return ``x + h + bias[c]`` for the h and bias of ``conv_deferring_bias(conv, ...)``; in inference the sum overwrites h."""
    if _may_overwrite(h, x, conv):
        return h.add_(x) if bias is None else add_bias_residual_(h, bias, x)
    return x + (h if bias is None else h + bias.to(torch.promote_types(h.dtype, x.dtype))[:, None, None])


def add_residual_with_statistics(h: Tensor, bias: Tensor | None, x: Tensor, conv: nn.Module, groups: int) -> MeasuredMap:
    """`add_residual`, with the statistics of the sum for a norm of `groups` groups if its kernel leaves them."""
    if groups and bias is not None and _may_overwrite(h, x, conv):
        return add_bias_residual_with_statistics_(h, bias, x, groups)
    return MeasuredMap(add_residual(h, bias, x, conv))


def _may_overwrite(h: Tensor, x: Tensor, conv: nn.Module) -> bool:
    """True if the sum with x may overwrite h, the result of conv: the h of a hooked one may be held elsewhere."""
    return h.dtype == x.dtype and is_inference(h, x) and is_plain_conv(conv)


def runs_kernels(x: Tensor) -> bool:
    """True on a device that has this package's kernels."""
    return x.is_cuda


def absorb_keys(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the projection that makes queries for keys ``k(n)`` into queries for n itself, and the scale of their scores.

    ``q . k(n) = q . (weight @ n + bias) = (weight.T @ q) . n + q . bias``. The last term is the same for all keys of a query, so
    it cancels in the softmax.

    The projected queries can be larger than q. In float16 the projection therefore includes the power of two in ``C ** -0.5``,
    which rounds only subnormal weights: the queries are finite up to ``weight.T @ q * C ** -0.5`` of about 65504.

    Args:
        weight: of k, ``(C, in)`` or ``(C, in, 1, 1)``.
        bias: of k, or None.
        dtype: of the queries.

    Returns:
        The projection's weight, ``(in, C)`` or ``(in, C, 1, 1)``, and the scale.
    """
    scale = weight.shape[0] ** -0.5
    power_of_two = 2.0 ** math.floor(math.log2(scale)) if dtype == torch.float16 else 1.0
    projection = weight.transpose(0, 1)
    if power_of_two != 1:
        projection = projection * power_of_two
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        projection = projection + bias[:0].sum()  # zero: a part in the graph, for DDP, and a gradient of exactly zero
    return projection, scale / power_of_two
