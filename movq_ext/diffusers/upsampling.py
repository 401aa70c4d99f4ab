"""diffusers' nearest upsampling with a convolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..model.fusion import fold_upsampling, is_plain_conv3x3
from .accelerated import Accelerated, can_compute, original_class


class Upsample2D(Accelerated):
    """``conv(upsample(x))``, nearest 2x and 3x3, as one transposed convolution of x."""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        nearest = not module.use_conv_transpose and module.norm is None and getattr(module, "interpolate", True)
        if not nearest or not module.use_conv:
            return "it is not a nearest upsampling and a convolution"
        return None if is_plain_conv3x3(_conv_of(module)) else "its convolution is replaced, hooked or not a padded 3x3"

    def forward(self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        x, conv = hidden_states, _conv_of(self)
        if args or kwargs or output_size is not None or not can_compute(self, x) or not is_plain_conv3x3(conv):
            return original_class(self).forward(self, x, output_size, *args, **kwargs)  # type: ignore[no-any-return]
        return F.conv_transpose2d(x, fold_upsampling(conv.weight), conv.bias, stride=2, padding=1)


def _conv_of(upsample: Any) -> Any:
    return upsample.conv if upsample.name == "conv" else upsample.Conv2d_0
