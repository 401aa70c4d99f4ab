"""What "equal" means, per dtype: the largest ``||a - b|| / ||b||`` against a float64 result, in one place."""

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def assert_close(actual: Tensor, expected: Tensor, slack: float = 1.0) -> None:
    """``slack`` is for chains of many operations, where rounding adds up."""
    error, allowed = relative_error(actual, expected), slack * RELATIVE[actual.dtype]
    assert error <= allowed, f"relative error {error:.2e} > {allowed:.2e} ({actual.dtype})"
