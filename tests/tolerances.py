"""Tolerances per dtype: the largest ``||a - b|| / ||b||`` against a float64 reference."""

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def assert_close(actual: Tensor, expected: Tensor, slack: float = 1.0) -> None:
    """Assert that actual is within its dtype's tolerance. ``slack`` widens it for long chains of operations."""
    error, allowed = relative_error(actual, expected), slack * RELATIVE[actual.dtype]
    assert error <= allowed, f"relative error {error:.2e} > {allowed:.2e} ({actual.dtype})"
