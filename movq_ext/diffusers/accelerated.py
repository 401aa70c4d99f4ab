"""The base of accelerated classes, the checks that they make on diffusers' modules before computing anything, and call counts.

Every check is repeated in every call: a layer that was replaced, patched or hooked since is called as diffusers calls it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..model.fusion import has_patched_convolution, is_unmodified
from ..ops.native import is_tracing

SPLITTING_CONVOLUTIONS = ("CogVideoXSafeConv3d", "KVAESafeConv3d", "Kandinsky6SRSafeConv3d")


class Accelerated(nn.Module):
    """First base of every accelerated class; the second is the diffusers class that it replaces. Adds no state.

    Another thread may restore a part while its forward runs, so a forward finds our methods through the class, not through self.
    """

    diffusers_class: ClassVar[type[nn.Module]]
    ranks: ClassVar[tuple[int, ...]] = (4,)  # of its inputs: 4 for images (B, C, H, W), 5 for clips (B, C, T, H, W)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        """Return why the module cannot be accelerated, or None if it can."""
        raise NotImplementedError


@dataclass
class CallCount:
    """Calls of one replaced part.

    Attributes:
        accelerated: calls that this package computed.
        original: calls that diffusers' own forward computed, since the part's inputs or layers did not allow ours.
    """

    accelerated: int = 0
    original: int = 0


# Kept outside the parts, so that they carry no extra state.
_call_counts: WeakKeyDictionary[nn.Module, CallCount] = WeakKeyDictionary()


def call_count(part: nn.Module) -> CallCount:
    """Return the part's count, which later calls change."""
    return _call_counts.setdefault(part, CallCount())


def count_call(part: nn.Module, accelerated: bool) -> bool:
    """Count a call of a replaced part, except while a program is traced. Returns ``accelerated``."""
    if isinstance(part, Accelerated) and not is_tracing():
        count = call_count(part)
        count.accelerated += accelerated
        count.original += not accelerated
    return accelerated


def forget_calls(part: nn.Module) -> None:
    """Start a new count for the part, if it is accelerated again."""
    _call_counts.pop(part, None)


def original_class(module: nn.Module) -> Any:
    """Return the module's diffusers class, whether the module is accelerated or not."""
    kind = type(module)  # read once: another thread may change it
    return kind.diffusers_class if issubclass(kind, Accelerated) else kind


def own_class(module: Any) -> Any:
    """Return the module's class, or its diffusers class if `accelerate` replaced it; a user's subclass of either is itself."""
    kind = type(module)
    return kind.diffusers_class if "diffusers_class" in vars(kind) else kind


def can_compute(module: nn.Module, x: Tensor) -> bool:
    """True if the module is accelerated and x is a feature map or a clip that it and the operators take.

    A restored module may get here too: a wrapper of its forward (from offloading, say) may still hold ours.
    """
    kind = type(module)  # read once: another thread may change it
    return issubclass(kind, Accelerated) and is_computable(x, kind.ranks)


def is_computable(x: Tensor, ranks: Container[int]) -> bool:
    """True if the operators take x, whose rank must be one of these."""
    return x.dim() in ranks and x.numel() > 0 and x.is_floating_point()


def is_plain_instance(module: Any, expected: type[nn.Module]) -> bool:
    """True if calling the module runs the expected class's forward and nothing else."""
    return type(module) is expected and is_unmodified(module)


def is_plain_conv3d(layer: Any, padding_mode: str = "zeros") -> TypeGuard[nn.Conv3d]:
    """True if calling the layer convolves with its weight and bias alone, padded in this mode in space and not in time.

    The classes of diffusers only split large inputs.
    """
    if not (type(layer) is nn.Conv3d or is_diffusers_class(type(layer), *SPLITTING_CONVOLUTIONS)):
        return False
    if not is_unmodified(layer) or has_patched_convolution(layer, nn.Conv3d):
        return False
    dense = layer.stride == layer.dilation == (1, 1, 1) and layer.groups == 1
    return bool(dense and layer.padding_mode == padding_mode and layer.padding[0] == 0)


def patched_forward_reason(module: nn.Module) -> str | None:
    # A wrapper around an accelerated forward calls it, so it may stay.
    patched = "forward" in module.__dict__ and not isinstance(module, Accelerated)
    return "its forward was replaced (by offloading, or a patch)" if patched else None


def child_reason(name: str, child: Any, expected: type[nn.Module] | str) -> str | None:
    """Return why a child module does not do what the expected class does, or None if it does.

    expected: the class, or the name of one of diffusers.
    """
    kind = own_class(child)
    if not (is_diffusers_class(kind, expected) if isinstance(expected, str) else kind is expected):
        return f"its {name} is {type(child).__name__}, not {expected if isinstance(expected, str) else expected.__name__}"
    return None if is_unmodified(child) else f"its {name} is hooked or patched"


def is_diffusers_class(kind: type, *names: str) -> bool:
    """True for the classes of diffusers with these names, without importing them: torch.compile cannot trace an import."""
    return kind.__name__ in names and kind.__module__.startswith("diffusers.")
