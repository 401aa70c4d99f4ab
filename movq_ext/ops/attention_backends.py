"""Which implementation of attention runs on a GPU.

- ``hopper``: kernels for compute capability 9.0, keys and values in one tensor (csrc/kernels/shared_kv_*.cu);
- ``tile``: kernels for 8.0 and later (csrc/kernels/attention_*.cu);
- ``cublas``: PyTorch's matrix products on chunks of the scores (chunked_attention.py);
- ``native``: ``scaled_dot_product_attention``.

``benchmarks/attention.py --tune`` measures them on a GPU and writes attention_table.json. Devices that it does not list take
ON_PAPER, which never has ``hopper``: those kernels run only where they were measured to be right and faster, or on request.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .extension import arch_list, cached_constant, device_reason, dtype_reason

BACKENDS = ("hopper", "tile", "cublas", "native")
VARIABLE = "MOVQ_EXT_ATTENTION"
MEASURED = Path(__file__).with_name("attention_table.json")
MAX_HEAD_SIZE = 512  # of the kernels; the same in csrc/kernels/attention.h
LARGER = 1 << 30  # stands for all head sizes beyond that
HOPPER_HEAD_SIZES = (128, 256, 512)


class Choice(NamedTuple):
    backend: str
    reason: str  # why this one; if it is native for lack of another, why not the other
    is_fallback: bool = False  # True if the reason must be a warning


# Limits for a forward pass with a head of 512 in 16-bit types, at the rates in attention_tile.cuh and the bytes in
# chunked_attention.py. cublas adds its products at the peak and its bytes at L2's rate:
#   A100  tile 90% of 312 TFLOP/s: 281. cublas 312 TFLOP/s and 26 bytes at 7.2 TB/s (5120 bytes a cycle: NVIDIA's whitepaper): 201
#   H100  tile 352 (L2). cublas 989 TFLOP/s and 26 bytes at 5.5 TB/s: 301. An H200 reached 246 and 37
#   10.x  has tensor-core instructions (tcgen05) that mma.sync does not reach, and cuBLAS uses them. But on the H200 cublas was
#         far from its limit, and tile close to it. 12.x has mma.sync alone
# In float32, tile has 3xTF32, an A100 156 / 3 = 52 TFLOP/s, and cuBLAS 19.5 without TF32 (NVIDIA's data sheets).
ON_PAPER = Choice("tile", "on paper it is faster than cuBLAS, or as fast with less memory")


class Problem(NamedTuple):
    """What the choice depends on. tokens is None while a program for all sizes is traced."""

    device: int | None  # its index
    dtype: torch.dtype
    head_size: int
    tokens: int | None
    shared_kv: bool
    gradient: bool  # True if backward follows
    exporting: bool = False


def choose(problem: Problem) -> Choice:
    """Return the backend for a problem, without testing it.

    Raises:
        ValueError: the environment variable MOVQ_EXT_ATTENTION is neither a backend nor empty.
    """
    # Traced sizes must not reach the lookup, which is constant for a compiler. These comparisons are guards.
    given = problem.head_size
    size = 128 if given <= 128 else 256 if given <= 256 else 512 if given <= MAX_HEAD_SIZE else LARGER
    is_padded = True
    if given == size:
        is_padded = False
    unsupported = f"the CUDA kernels of attention take heads of up to {MAX_HEAD_SIZE}, got {given}" if size == LARGER else None
    arguments = problem.dtype, size, is_padded, unsupported, problem.tokens, problem.shared_kv, problem.gradient
    choice: Choice = _choose(problem.device, *arguments, problem.exporting)
    return choice


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(
    device: int | None, dtype: torch.dtype, size: int, is_padded: bool, unsupported: str | None,
    tokens: int | None, shared_kv: bool, gradient: bool, exporting: bool,
) -> Choice:  # fmt: skip
    capability = device_capability(device)

    def why_not(backend: str) -> str | None:
        if backend == "native":
            return None
        if reason := dtype_reason(dtype):
            return reason
        if backend == "cublas":
            return "a program that is exported may run without Python, which chunked attention needs" if exporting else None
        reason = device_reason(device) or unsupported
        return reason or (_why_not_hopper(capability, dtype, size, is_padded, shared_kv) if backend == "hopper" else None)

    found = _measured_choice(capability, dtype, size, tokens, shared_kv, gradient) or ON_PAPER
    table = found
    for backend in (found.backend, "tile", "native"):
        if why_not(backend) is None:
            if backend != found.backend:
                reason = why_not(found.backend) if backend == "tile" else why_not("tile")
                table = Choice(backend, reason or "", is_fallback=backend == "native")
            break
    requested = requested_backend()
    if requested is None:
        return table
    reason = why_not(requested)
    if reason is None:
        return Choice(requested, f"{VARIABLE}={requested}")
    return Choice(table.backend, f"{VARIABLE}={requested} cannot be followed: {reason}", is_fallback=True)


def requested_backend() -> str | None:
    """Return the backend that the environment variable names, or None. Raises ValueError for another name."""
    requested = os.environ.get(VARIABLE, "")
    if requested and requested not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, or unset, got {requested!r}")
    return requested or None


def _why_not_hopper(
    capability: tuple[int, int] | None, dtype: torch.dtype, size: int, is_padded: bool, shared_kv: bool
) -> str | None:
    if capability != (9, 0):
        return f"the Hopper kernels need compute capability 9.0, got {_dotted(capability)}"
    if "9.0a" not in arch_list():
        return f"movq_ext._C was compiled for {arch_list() or 'an unknown GPU'}, without the Hopper kernels' 9.0a"
    if dtype == torch.float32:
        return "the Hopper kernels take float16 and bfloat16, got float32"
    if is_padded:
        return f"the Hopper kernels take heads of {', '.join(map(str, HOPPER_HEAD_SIZES))}, got another size"
    return None if shared_kv else "the Hopper kernels take keys and values as one tensor (shared_kv_attention)"


def _measured_choice(
    capability: tuple[int, int] | None, dtype: torch.dtype, size: int, tokens: int | None, shared_kv: bool, gradient: bool
) -> Choice | None:
    """Return the row of attention_table.json for at most this many tokens, the largest if tokens is None."""
    device = read_measured(MEASURED).get(_dotted(capability))
    if device is None:
        return None
    # float16 has bfloat16's rate on every GPU that the kernels run on.
    key = {"dtype": "float32" if dtype == torch.float32 else "bfloat16", "head_size": size}
    key |= {"shared_kv": shared_kv, "gradient": gradient}
    rows = sorted((row for row in device["rows"] if key.items() <= row.items()), key=lambda row: row["tokens"])
    if not rows:
        return None
    row = max((row for row in rows if tokens is None or row["tokens"] <= tokens), key=lambda row: row["tokens"], default=rows[0])
    times = ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(row["ms"].items(), key=lambda item: item[1]))
    return Choice(row["backend"], f"the fastest on {device['device']} for {row['tokens']} tokens, in ms: {times}")


@functools.cache
def read_measured(path: Path) -> dict[str, Any]:
    """Return the measured table: for each compute capability the device, driver, torch, commit and rows."""
    table: dict[str, Any] = json.loads(path.read_text())
    return table


@functools.cache
def device_capability(index: int | None) -> tuple[int, int] | None:
    """Return a device's compute capability, or None where there is no GPU: a program for one may be traced without it."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@cached_constant
def warn_of_request_once(reason: str, backend: str) -> None:
    """Warn that MOVQ_EXT_ATTENTION cannot be followed, once for each reason."""
    warnings.warn(f"{reason}; {backend} runs instead", RuntimeWarning, stacklevel=4)


def _dotted(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else f"{capability[0]}.{capability[1]}"
