"""Layers computed together: which may be, convolutions without their bias, and upsampling folded into its convolution."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.functional import add_bias_residual_
from ..ops.native import is_inference
from ..profiling import is_range_hook


def is_plain_conv(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether the layer does no more than a dense ``nn.Conv2d`` of 1x1 or 3x3 that keeps a map's size: nobody put in his own
    (LoRA, quantised ones), patched it (circular padding) or hooked on to it."""
    if type(layer) is not nn.Conv2d or not is_unmodified(layer):
        return False
    if any(getattr(getattr(layer, name), "__func__", None) is not function for name, function in CONV_FUNCTIONS.items()):
        return False
    same = layer.kernel_size in ((1, 1), (3, 3)) and layer.padding == tuple(k // 2 for k in layer.kernel_size)
    return same and layer.padding_mode == "zeros" and layer.stride == layer.dilation == (1, 1) and layer.groups == 1


CONV_FUNCTIONS = {name: getattr(nn.Conv2d, name) for name in ("forward", "_conv_forward")}


def is_plain_conv3x3(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return is_plain_conv(layer) and layer.kernel_size == (3, 3)


def is_unmodified(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward: no hooks (but those of `annotate`), no forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "forward" in module.__dict__ or not all(is_range_hook(hook) for kind in hooks for hook in kind.values()):
        return False
    return all(str(hook.__module__).startswith("torch.") for kind in GLOBAL_HOOKS for hook in kind.values())


# Those of torch itself (FlopCounterMode) only look on.
GLOBAL_HOOKS = [
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def conv_deferring_bias(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """conv(x), or, where a kernel that comes later adds it in passing, conv(x) without its bias, and that."""
    if not (runs_kernels(x) and is_plain_conv(conv) and conv.bias is not None and is_inference(x, conv.weight, conv.bias)):
        return conv(x), None
    h, bias = F.conv2d(x, conv.weight, padding=conv.padding), conv.bias
    if bias.dtype in (h.dtype, torch.float32):
        return h, bias
    return h.add_(bias[:, None, None]), None  # under autocast h has a dtype of its own


def add_residual(h: Tensor, bias: Tensor | None, x: Tensor, made_by: nn.Module) -> Tensor:
    """``x + h`` for what conv_deferring_bias(made_by, ...) made: into h where nothing else holds that."""
    if h.dtype == x.dtype and is_inference(h, x) and is_plain_conv(made_by):
        return h.add_(x) if bias is None else add_bias_residual_(h, bias, x)
    return x + (h if bias is None else h + bias[:, None, None])


def runs_kernels(x: Tensor) -> bool:
    """Whether x is where the kernels are."""
    return x.is_cuda


def fold_upsampling(weight: Tensor) -> Tensor:
    """The kernel ``(in, out, 4, 4)`` of the transposed convolution (stride 2, padding 1) that a nearest 2x upsampling and a
    convolution by ``weight`` ``(out, in, 3, 3)`` are together.

    Each pixel of the large map sees 2x2 pixels of the small one, by one of four kernels that hold sums of neighbouring weights:
    16 multiplications for what takes 36 on the large map.
    """
    weight = weight.flip(2, 3)
    weight = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
    weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
    # On a GPU in the layout of the maps, which cuDNN would copy it to; oneDNN rearranges either.
    return weight.transpose(0, 1).contiguous(memory_format=torch.channels_last if weight.is_cuda else torch.contiguous_format)


def fold_windows(weight: Tensor) -> Tensor:
    """The same as ``(4 * out, in, 2, 2)``, a convolution of windows of 2x2 pixels: it makes the four pixels of the large map
    around the middle of a window, upper left, upper right, lower left and lower right."""
    by_pixel_row_tap = [[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]]
    taps = torch.tensor(by_pixel_row_tap, dtype=weight.dtype, device=weight.device)
    kernels = torch.einsum("dyi,rxj->drijyx", taps, taps).reshape(4, 9, 4)  # for each of the four pixels
    return (weight.reshape(-1, 9) @ kernels).view(-1, weight.shape[1], 2, 2)
