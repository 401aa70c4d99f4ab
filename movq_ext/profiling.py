"""Named profiler ranges, which show the layer that each part of a timeline belongs to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

NO_RANGE = contextlib.nullcontext()


class FusedModule:
    """Marks a module that may compute its child layers without calling them."""


class Range:
    """A named range in torch.profiler and, with ``nvtx``, in NVTX (for Nsight Systems)."""

    def __init__(self, name: str, nvtx: bool) -> None:
        self._name, self._nvtx = name, nvtx

    def __enter__(self) -> None:
        self._record = torch.profiler.record_function(self._name)
        self._record.__enter__()
        if self._nvtx:
            torch.cuda.nvtx.range_push(self._name)

    def __exit__(self, *error: object) -> None:
        if self._nvtx:
            torch.cuda.nvtx.range_pop()
        self._record.__exit__(None, None, None)


@dataclass
class AnnotatedModule:
    """A module inside `annotate`: its name, its hooks, and the number of contexts it is in."""

    name: str
    nvtx: bool
    handles: list[RemovableHandle]
    contexts: int = 0


class OpenRanges(threading.local):
    """The open ranges of this thread and their modules, innermost last."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, Range]] = []

    def close_down_to(self, depth: int) -> None:
        """Close all ranges except the outermost ``depth``."""
        while len(self.stack) > depth:
            _, range_ = self.stack.pop()
            range_.__exit__()


_lock = threading.Lock()
_annotated: dict[nn.Module, AnnotatedModule] = {}
_open_ranges = OpenRanges()


@contextlib.contextmanager
def annotate(model: nn.Module) -> Iterator[None]:
    """Context manager: make every layer's forward a profiler range with its dotted name, such as ``decoder.mid.attn_1``. ::

        with movq_ext.annotate(model), torch.profiler.profile() as profiler, torch.inference_mode():
            model.decode(quantised)

    The ranges appear in torch.profiler and, where there is a GPU, as NVTX ranges in Nsight Systems. The model's own range has its
    class's name. There are no ranges for:

    - convolutions inside this package's blocks, because hooks would turn off their fused kernels. Their time is in the block's
      range. Decoding in strips, as on a CPU without gradients, does give them ranges;
    - the backward pass;
    - code compiled by torch.compile. Run it for the first time outside the context: torch guards on hooks, so a program compiled
      inside would be compiled again outside.

    Contexts may be nested and used by several threads at once: a module keeps the name it got first. A thread must have finished
    running the model before the last context exits. Outside the context, no hooks are installed.

    Args:
        model: any module. Layers added to it inside the context have no range.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    depth = len(_open_ranges.stack)
    modules = _install(model)
    try:
        yield
    finally:
        _remove(modules)
        _open_ranges.close_down_to(depth)  # torch does not run the hooks after a KeyboardInterrupt


def layer_range(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return the module's range, for code that computes a layer without calling it. Outside `annotate`, it does nothing."""
    if torch.compiler.is_compiling() or (found := _annotated.get(module)) is None:
        return NO_RANGE
    return Range(found.name, found.nvtx)


def _install(model: nn.Module) -> list[nn.Module]:
    """Install hooks on the modules that have none yet, and return all modules."""
    named = {module: f"{name}.".replace("_orig_mod.", "").rstrip(".") for name, module in model.named_modules()}
    bypassed, nvtx = _bypassed(model), torch.cuda.is_available()
    with _lock:
        for module, name in named.items():
            found = _annotated.get(module)
            if found is None:
                found = _annotated[module] = AnnotatedModule(name or type(module).__name__, nvtx, [])
                if module not in bypassed:
                    found.handles.append(module.register_forward_pre_hook(_open_range, prepend=True))
                    found.handles.append(module.register_forward_hook(_close_range, always_call=True))
            found.contexts += 1
    return list(named)


def _remove(modules: list[nn.Module]) -> None:
    with _lock:
        for module in modules:
            found = _annotated[module]
            found.contexts -= 1
            if found.contexts == 0:
                del _annotated[module]
                for handle in found.handles:
                    handle.remove()


def _bypassed(model: nn.Module) -> set[nn.Module]:
    """Return the layers that a block computes without calling them, unless they have hooks."""
    blocks = [block for block in model.modules() if isinstance(block, FusedModule)]
    leaves = (nn.Conv2d, nn.Linear, nn.Dropout, nn.GroupNorm)
    return {layer for block in blocks for layer in block.children() if type(layer) in leaves}


# The hooks are module-level functions, so that a model can be copied and pickled inside the context. A copy is not in
# `_annotated`: its hooks do nothing.
def _open_range(module: nn.Module, inputs: Any) -> None:
    if torch.compiler.is_compiling() or (found := _annotated.get(module)) is None:
        return
    range_ = Range(found.name, found.nvtx)
    range_.__enter__()
    _open_ranges.stack.append((module, range_))


def _close_range(module: nn.Module, inputs: Any, output: Any) -> None:
    """Close the module's range, which is missing if an earlier hook raised, and those that an exception left open inside it."""
    if torch.compiler.is_compiling():
        return
    for depth in reversed(range(len(_open_ranges.stack))):
        if _open_ranges.stack[depth][0] is module:
            return _open_ranges.close_down_to(depth)


def is_range_hook(hook: object) -> bool:
    """Return True for the hooks that `annotate` installs."""
    return hook is _open_range or hook is _close_range
