"""The base of accelerated classes, and the checks that they make on diffusers' modules before computing anything.

Every check is repeated in every call: a layer that was replaced, patched or hooked since is called as diffusers calls it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..model.fusion import is_unmodified


class Accelerated(nn.Module):
    """First base of every accelerated class; the second is the diffusers class that it replaces. Adds no state."""

    diffusers_class: ClassVar[type[nn.Module]]

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        """Return why the module cannot be accelerated, or None if it can."""
        raise NotImplementedError


def original_class(module: nn.Module) -> Any:
    """Return the module's diffusers class, whether the module is accelerated or not."""
    return module.diffusers_class if isinstance(module, Accelerated) else type(module)


def can_compute(module: nn.Module, x: Tensor) -> bool:
    """True if the module is accelerated and x is a feature map that the operators take.

    A restored module may get here too: a wrapper of its forward (from offloading, say) may still hold ours.
    """
    return isinstance(module, Accelerated) and x.dim() == 4 and x.numel() > 0 and x.is_floating_point()


def is_plain_instance(module: Any, expected: type[nn.Module]) -> bool:
    """True if calling the module runs the expected class's forward and nothing else."""
    return type(module) is expected and is_unmodified(module)


def patched_forward_reason(module: nn.Module) -> str | None:
    # A wrapper around an accelerated forward calls it, so it may stay.
    patched = "forward" in module.__dict__ and not isinstance(module, Accelerated)
    return "its forward was replaced (by offloading, or a patch)" if patched else None


def child_reason(name: str, child: Any, expected: type[nn.Module]) -> str | None:
    """Return why a child module does not do what the expected class does, or None if it does."""
    if original_class(child) is not expected:
        return f"its {name} is {type(child).__name__}, not {expected.__name__}"
    return None if is_unmodified(child) else f"its {name} is hooked or patched"
