"""Convolutions of many strips on a CPU, with weights packed for oneDNN once and results accumulated in place.

They call the operators of Inductor's CPU programs. Without these (another PyTorch, or oneDNN switched off) PyTorch's public
convolution gives the same result, a little slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

ONES = [1, 1]


class Convolution:
    """``out += conv2d(x, weight, bias, padding=padding)`` for images in channels_last.

    Args:
        weight: ``(out, in, rows, columns)``.
        bias: ``(out,)`` or None.
        padding: rows and columns of zeros on either side.
        input_shape: typical input ``(B, in, H, W)``, used to pack the weight. Other sizes work too.
        keep_weight: False frees a weight that was packed. Then inputs must have its dtype.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        padding: Sequence[int],
        input_shape: Sequence[int],
        *,
        keep_weight: bool = True,
    ) -> None:
        self.weight: Tensor | None = weight
        self.bias, self.padding = bias, list(padding)
        self.packed: Tensor | None = None
        if weight.is_cuda:  # otherwise cuDNN would copy it to the layout of x for every strip
            self.weight = weight.contiguous(memory_format=torch.channels_last)
        if _can_pack(weight):
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, self.padding, ONES, ONES, 1, list(input_shape))
            if not keep_weight:
                self.weight = None

    def write_to(self, out: Tensor, x: Tensor) -> None:
        """Write the convolution of x ``(B, in, H, W)`` to out."""
        self.add_to(out.zero_(), x)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the convolution of x ``(B, in, H, W)`` to out, in place."""
        # Autocast casts in the public convolution only.
        if self.weight is not None and (self.packed is None or x.dtype != self.weight.dtype):
            out.add_(F.conv2d(x, self.weight, self.bias, padding=self.padding))
            return
        convolve_and_add = torch.ops.mkldnn._convolution_pointwise_.binary
        convolve_and_add(out, x, self.packed, self.bias, self.padding, ONES, ONES, 1, "add", None, None, [], None)


def _can_pack(weight: Tensor) -> bool:
    if type(weight) not in (Tensor, nn.Parameter):  # a subclass (a quantised weight) has its own convolution
        return False
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise_")):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


if hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):  # FlopCounterMode knows only the public convolutions

    @register_flop_formula(torch.ops.mkldnn._convolution_pointwise_)
    def _flop_count(out: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
        return conv_flop_count(list(x), list(weight), list(out))
