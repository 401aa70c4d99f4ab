"""Encoders and decoders that end with a norm, SiLU and a convolution: norm and SiLU as one operator."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..model.fusion import is_unmodified
from ..ops.native import is_tracing
from .accelerated import Accelerated, child_reason, count_call, is_diffusers_class, is_plain_instance, original_class
from .frame_norms import MochiChunkedGroupNorm3D
from .norms import GroupNorm
from .video_norms import CogVideoXSpatialNorm3D

NORM_NAMES = ("conv_norm_out", "norm_out")
ACTIVATION_NAMES = ("conv_act", "nonlinearity")
NORMS: dict[str, Any] = {norm.__name__: norm for norm in (GroupNorm, CogVideoXSpatialNorm3D, MochiChunkedGroupNorm3D)}


class OutputNorm(Accelerated):
    """An encoder or decoder of clips, with ``silu(norm_out(h))`` before its last layer.

    Its forward is diffusers'. It runs on a shallow copy of the module in which the norm computes SiLU too, and the activation
    returns its input. In a compiled program the compiler fuses the two.
    """

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        norm, activation = _layer_names(module)
        return child_reason("activation", getattr(module, activation), nn.SiLU) or _norm_reason(norm, getattr(module, norm))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = original_class(self)
        if not count_call(self, not is_tracing() and OutputNorm.can_fuse(self)):
            return original.forward(self, *args, **kwargs)
        norm_name, activation_name = _layer_names(self)
        norm = getattr(self, norm_name)
        fused = partial(NORMS[original_class(norm).__name__].forward_with_silu, norm)
        stand_in = original.__new__(original)
        stand_in.__dict__.update(self.__dict__, _modules={**self._modules, norm_name: fused, activation_name: lambda x: x})
        return original.forward(stand_in, *args, **kwargs)

    def can_fuse(self: Any) -> bool:
        norm, activation = _layer_names(self)
        return is_plain_instance(getattr(self, activation), nn.SiLU) and not _norm_reason(norm, getattr(self, norm))


def _layer_names(module: nn.Module) -> tuple[str, str]:
    """Return the names of the last norm and of its activation."""
    norms, activations = ([name for name in names if name in module._modules] for names in (NORM_NAMES, ACTIVATION_NAMES))
    return norms[0], activations[0]


def _norm_reason(name: str, norm: Any) -> str | None:
    kind = original_class(norm)
    if kind is not nn.GroupNorm and not is_diffusers_class(kind, *NORMS):
        return f"its {name} is {type(norm).__name__}, which has no operator"
    if not is_unmodified(norm):
        return f"its {name} is hooked or patched"
    reason: str | None = NORMS[kind.__name__].unsupported_reason(norm)
    return reason
