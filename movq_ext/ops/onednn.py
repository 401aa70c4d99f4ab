"""Convolutions of many strips on a CPU: the weight is rearranged for oneDNN once, and the result is added to what is there.

These are the operators that Inductor's programs for CPUs call. Where a PyTorch has none or oneDNN is switched off, its public
functions do the same, a little slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

ONES = [1, 1]


class Convolution:
    """``out += convolution(x)``, stride 1, with out and x of one image in channels_last.

    Args:
        weight: ``(out, in, rows, columns)``.
        bias: ``(out,)`` or None.
        padding: rows and columns of zeros on either side.
        size: of an x, which the weight is rearranged for; others can be convolved too.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, padding: Sequence[int], size: Sequence[int]) -> None:
        self.weight, self.bias, self.padding = weight, bias, list(padding)
        self.packed: Tensor | None = None
        if weight.is_cuda:  # cuDNN would copy it to the layout of x for every strip
            self.weight = weight.contiguous(memory_format=torch.channels_last)
        if _takes(weight):
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, self.padding, ONES, ONES, 1, list(size))

    def add_to(self, out: Tensor, x: Tensor) -> None:
        if self.packed is None or x.dtype != self.weight.dtype:  # which autocast sees to
            out.add_(F.conv2d(x, self.weight, self.bias, padding=self.padding))
            return
        add = torch.ops.mkldnn._convolution_pointwise_.binary
        add(out, x, self.packed, self.bias, self.padding, ONES, ONES, 1, "add", None, None, [], None)


def _takes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise_")):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


if hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):  # for FlopCounterMode, which knows the public convolutions

    @register_flop_formula(torch.ops.mkldnn._convolution_pointwise_)
    def _operations(out: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
        return conv_flop_count(list(x), list(weight), list(out))
