"""Meta tensors that take a GPU's path, to count and time what Python and PyTorch's dispatcher do for a decode."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from movq_ext.ops import attention_backends, extension, paths, registration, self_test

# Kernels behind one operator, at most. cuDNN may launch more than one for a convolution.
KERNELS = {
    "spatial_norm_forward": 3,
    "norm with statistics": 2,
    "attention_forward": 2,
    "shared_kv_attention_forward": 2,
    "baddbmm": 2,  # PyTorch copies the biases into the result first
    "constant_pad_nd": 2,  # fills the result, and copies the input into it
}


def counted_name(operator: str, arguments: tuple[Any, ...]) -> str:
    """Return the name by which an operator is counted: norms that are given statistics launch one kernel less."""
    takes_statistics = operator == "spatial_norm_forward" and arguments[10:11] not in ((), (None,))
    return "norm with statistics" if takes_statistics else operator


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel, all but views and allocations, on a GPU or in ``meta_gpu(launches)``.

    Count under no_grad: in inference mode, convolutions and linear layers are not taken apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if not func.is_view and "empty" not in name and name != "_unsafe_view":
            self.operators[counted_name(name, args)] += 1
        if name == "convolution" and args[2] is not None:  # PyTorch adds it in a kernel of its own
            self.operators["bias of a convolution"] += 1
        return func(*args, **(kwargs or {}))

    def kernels(self) -> int:
        return sum(count * KERNELS.get(name, 1) for name, count in self.operators.items())


@contextlib.contextmanager
def meta_gpu(launches: Launches | None = None) -> Iterator[None]:
    """While entered, meta tensors pass for a GPU's, with fake implementations of our kernels, which launches counts."""

    def counted(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            assert launches is not None
            launches.operators[counted_name(name, arguments)] += 1
            with _disable_current_modes():
                return fake(*arguments)

        return kernel

    environment = {name: value for name, value in os.environ.items() if name != attention_backends.VARIABLE}
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        for name, fake in registration.FAKE_IMPLEMENTATIONS.items():
            patch(torch.ops.movq_ext, name, fake if launches is None else counted(name, fake))
        for name in ("conv2d", "conv_transpose2d"):
            patch(F, name, _in_layout_of_x(getattr(F, name)))
        patch(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "meta"))
        for module in (paths, attention_backends):
            patch(module, "device_reason", lambda index: None)
        patch(attention_backends, "device_capability", lambda index: None)  # chooses the backend "tile"
        patch(self_test, "_results", {})
        environment[self_test.VARIABLE] = "0"
        stack.enter_context(mock.patch.dict(os.environ, environment, clear=True))
        extension.warn_once.cache_clear()
        yield


def _in_layout_of_x(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the convolution with results in x's layout, as on a GPU. On the meta device they are contiguous."""

    def convolve_in_layout(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        out = convolve(x, *arguments, **options)
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return out
        _, channels, height, width = out.shape
        return out.as_strided(out.shape, (channels * height * width, 1, width * channels, channels))

    return convolve_in_layout
