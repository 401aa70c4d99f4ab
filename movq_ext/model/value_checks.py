"""Checks of tensors' values. Reading a value waits for the GPU, and a program that is compiled or captured cannot do it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..ops.native import is_tracing


def can_read_values(x: Tensor) -> bool:
    """True if a check may read x's values.

    False for meta and fake tensors, inside functorch transforms, and while a program is compiled, exported, traced or captured in
    a CUDA graph.
    """
    if is_tracing() or torch._C._are_functorch_transforms_active() or x.is_meta or is_fake(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def runs_training_step(module: nn.Module) -> bool:
    """True in training mode with gradients enabled: a check would make every step wait for the GPU."""
    return module.training and torch.is_grad_enabled()


def is_finite(x: Tensor) -> bool:
    """True if x has neither NaN nor infinity. Waits for the GPU."""
    return bool(x.isfinite().all())
