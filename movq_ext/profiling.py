"""Named ranges for profilers: which layer of a model a piece of a timeline belongs to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

OFF = contextlib.nullcontext()


class ComputesOwnLayers:
    """Marks a module that may compute its child layers without calling them."""


class Range:
    """A range of a name: of torch.profiler, and of NVTX (for Nsight Systems) where there is a GPU."""

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
class Annotated:
    """A module inside `annotate`: its name, its hooks, and how many contexts want them."""

    name: str
    nvtx: bool
    handles: list[RemovableHandle]
    users: int = 0


class Opened(threading.local):
    """This thread's ranges whose modules are running, the innermost last."""

    def __init__(self) -> None:
        self.ranges: list[tuple[nn.Module, Range]] = []

    def close(self, depth: int) -> None:
        """All but the first ``depth``."""
        while len(self.ranges) > depth:
            self.ranges.pop()[1].__exit__()


_lock = threading.Lock()
_annotated: dict[nn.Module, Annotated] = {}
_opened = Opened()


@contextlib.contextmanager
def annotate(model: nn.Module) -> Iterator[None]:
    """Context manager inside which every layer's forward is a range of its dotted name, as ``decoder.up.3.block.0.norm1``.

    Ranges show in torch.profiler and, where there is a GPU, as NVTX ranges in Nsight Systems. The model itself has its class's
    name. Convolutions inside this package's blocks, which hooks would send another way, have none of their own: they are part of
    their block's. Backward has none, nor has what torch.compile compiled (outside the context: it guards on the hooks inside).
    Outside the context nothing is installed.

    Contexts nest, and several threads may be inside at once: a module keeps the name that it got first. A thread that runs the
    model should be done with it before the last context is left.

    Args:
        model: any module; layers that are put into it inside the context have no range.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    depth = len(_opened.ranges)
    modules = _install(model)
    try:
        yield
    finally:
        _remove(modules)
        _opened.close(depth)  # what an exception that is no Exception, such as KeyboardInterrupt, left open


def layer_range(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The module's range, for code that computes a layer without calling it; does nothing outside `annotate`."""
    if torch.compiler.is_compiling() or (found := _annotated.get(module)) is None:
        return OFF
    return Range(found.name, found.nvtx)


def _install(model: nn.Module) -> list[nn.Module]:
    """Hooks on the modules that have none yet; returns all modules."""
    named = {module: f"{name}.".replace("_orig_mod.", "").rstrip(".") for name, module in model.named_modules()}
    bypassed, nvtx = _bypassed(model), torch.cuda.is_available()
    with _lock:
        for module, name in named.items():
            found = _annotated.get(module)
            if found is None:
                found = _annotated[module] = Annotated(name or type(module).__name__, nvtx, [])
                if module not in bypassed:
                    found.handles.append(module.register_forward_pre_hook(_enter, prepend=True))
                    found.handles.append(module.register_forward_hook(_exit, always_call=True))
            found.users += 1
    return list(named)


def _remove(modules: list[nn.Module]) -> None:
    with _lock:
        for module in modules:
            found = _annotated[module]
            found.users -= 1
            if found.users == 0:
                del _annotated[module]
                for handle in found.handles:
                    handle.remove()


def _bypassed(model: nn.Module) -> set[nn.Module]:
    """Layers that their block computes by itself unless someone has hooked on to them."""
    blocks = [block for block in model.modules() if isinstance(block, ComputesOwnLayers)]
    leaves = (nn.Conv2d, nn.Linear, nn.Dropout, nn.GroupNorm)
    return {layer for block in blocks for layer in block.children() if type(layer) in leaves}


# Hooks are functions of this file, so that a model can be copied and pickled inside the context. A copy is not in `_annotated`:
# in it they do nothing.
def _enter(module: nn.Module, inputs: Any) -> None:
    if torch.compiler.is_compiling() or (found := _annotated.get(module)) is None:
        return
    range_ = Range(found.name, found.nvtx)
    range_.__enter__()
    _opened.ranges.append((module, range_))


def _exit(module: nn.Module, inputs: Any, output: Any) -> None:
    """Closes the module's range and what an exception left open inside it. There is none if an earlier hook raised."""
    if torch.compiler.is_compiling():
        return
    for depth in reversed(range(len(_opened.ranges))):
        if _opened.ranges[depth][0] is module:
            return _opened.close(depth)


def is_range_hook(hook: object) -> bool:
    """True for the hooks that `annotate` installs."""
    return hook is _enter or hook is _exit
