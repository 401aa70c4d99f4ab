"""Tensors that follow from parameters: kept while nothing needs their gradient, made again when a parameter changes, never saved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class Derived:
    """``make(*parameters)``, remembered for as long as the parameters stay what they were."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._key: tuple[Any, ...] | None = None
        self._value: Tensor | None = None

    def __call__(self, *parameters: Tensor, keep: bool = True) -> Tensor:
        """The derived tensor: part of the autograd graph where that is recorded, else from memory if ``keep``."""
        key = _key(parameters) if keep else None
        if key is None:
            return self._make(*parameters)
        value = self._value
        if value is None or self._key != key:
            with torch.no_grad():
                value = self._make(*parameters)
            if value.is_cuda:
                torch.cuda.current_stream(value.device).synchronize()  # once: other streams will read it
            self._key, self._value = None, value
            self._key = key
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived(self._make)

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, (self._make,)


_in_channels_last: WeakKeyDictionary[nn.Module, Derived] = WeakKeyDictionary()


def weight_for(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The layer's weight in the layout that its convolution of x is computed in, where it would else be copied into that in every call."""
    if not x.is_contiguous(memory_format=torch.channels_last) or layer.weight.is_contiguous(memory_format=torch.channels_last):
        return layer.weight
    if layer not in _in_channels_last:
        _in_channels_last[layer] = Derived(partial(torch.clone, memory_format=torch.channels_last))
    return _in_channels_last[layer](layer.weight, keep=not layer.training)


def _key(parameters: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
    """What the parameters are now, or None where what is made of them cannot be kept."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
        return None
    if _refills_parameters():
        return None
    if any(type(p) not in (Tensor, torch.nn.Parameter) or p.is_inference() or p.is_meta for p in parameters):  # no version, or no values
        return None
    if parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():  # what is made now has no values before the graph is replayed
        return None
    try:
        return tuple((id(p), p._version, p.data_ptr(), p.dtype, p.device) for p in parameters)
    except RuntimeError:  # inside torch.func's transforms a tensor has no address
        return None


def _refills_parameters() -> bool:
    """Whether FSDP2 is in use: before a forward pass it fills the same parameters with values gathered anew, and has their versions kept."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and bool(fsdp.FSDPModule.__subclasses__())  # fully_shard makes one for each class that it wraps
