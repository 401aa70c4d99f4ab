"""diffusers' nearest upsampling with a convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..model.fusion import is_plain_conv3x3
from ..ops.cpu_upsampling import takes_nine_products
from ..ops.functional import upsample_conv
from ..ops.native import compute_dtype, is_exporting, is_inference, traces_plain_operators
from ..ops.upsampling import folding_pays_on_cpu
from .accelerated import Accelerated, can_compute, count_call, original_class


class Upsample2D(Accelerated):
    """``conv(upsample(x))``, nearest 2x and 3x3, computed from x."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        nearest = not module.use_conv_transpose and module.norm is None and getattr(module, "interpolate", True)
        if not nearest or not module.use_conv:
            return "it is not a nearest upsampling and a convolution"
        return None if is_plain_conv3x3(_conv_of(module)) else "its convolution is replaced, hooked or not a padded 3x3"

    def forward(self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        x, conv = hidden_states, _conv_of(self)
        is_doubling = not args and not kwargs and output_size is None
        if not count_call(self, is_doubling and can_compute(self, x) and is_plain_conv3x3(conv) and folding_pays(x, conv.weight)):
            return original_class(self).forward(self, x, output_size, *args, **kwargs)  # type: ignore[no-any-return]
        return upsample_conv(x, conv.weight, conv.bias)


def folding_pays(x: Tensor, weight: Tensor) -> bool:
    """True if `upsample_conv` is faster than the convolution of the doubled map ``(B, C, H, W)`` or clip.

    Always True on a GPU, where `upsample_conv` decides by counted costs. On a CPU the map needs many pixels, unless it takes nine
    products for four pixels.
    """
    if traces_plain_operators() or is_exporting():  # the program may be given maps of any size
        return True
    dtype, pixels = compute_dtype(x), x.numel() // x.shape[1]
    if x.is_cuda or (is_inference(x, weight) and takes_nine_products(weight, dtype, pixels)):
        return True
    return folding_pays_on_cpu(pixels, dtype)


def _conv_of(upsample: Any) -> Any:
    return upsample.conv if upsample.name == "conv" else upsample.Conv2d_0
