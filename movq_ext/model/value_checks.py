"""Checks of tensors' values. Reading a value waits for the GPU, and a program that is compiled or captured cannot do it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake


def can_read_values(*tensors: Tensor) -> bool:
    """True if a check may read these tensors' values.

    False for meta and fake tensors, inside functorch transforms, and while a program is compiled, exported, traced or captured in
    a CUDA graph.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if any(x.is_meta or is_fake(x) for x in tensors):
        return False
    return not (any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing())


def runs_training_step(module: nn.Module) -> bool:
    """True in training mode with gradients enabled: a check would make every step wait for the GPU."""
    return module.training and torch.is_grad_enabled()


def is_finite(x: Tensor) -> bool:
    """True if x has neither NaN nor infinity. Waits for the GPU."""
    return bool(x.isfinite().all())
