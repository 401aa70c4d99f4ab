"""In which order AttnBlock trains: published (q, k, v, attention, proj_out) or absorbed (keys and values are its input).

Counts for N tokens of C channels, forward and backward. A map has N C elements.

                             published                            absorbed
    convolutions             24 N C^2 operations                  24 N C^2: k moves to the queries, v to the result
    attention, tile kernels  20 N^2 C (2 products, then 8)        18 N^2 C (2, then 7: dk and dv are one sum)
    attention, cublas        14 N^2 C (2 products, then 5)        14 N^2 C
    kept for backward        5 maps: n, q, k, v, their result     5 maps: n, q, W_k^T q, the result, v of it
    maps read or written     10 forward, 20 backward              11 forward, 25 backward

With the tile kernels, absorbed saves 2 N^2 C operations for 6 more maps of 2 bytes: on an H100, at 352 TFLOP/s and 3.35 TB/s,
from N = 631 on. With cublas it costs 6 maps: 2% of a step at N = 4096. The Hopper kernels have the absorbed order only. So
AttnBlock trains in the order in which it decodes. This script times both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timing import milliseconds, peak_megabytes

import movq_ext
from movq_ext.model import layers


@contextmanager
def order(absorbed: bool, dtype: torch.dtype) -> Iterator[None]:
    """Context manager: blocks in this dtype absorb their projections, or do not."""
    before = layers.SHARED_KV_DTYPES
    layers.SHARED_KV_DTYPES = (dtype,) if absorbed else ()
    try:
        yield
    finally:
        layers.SHARED_KV_DTYPES = before


def counts(tokens: int, channels: int, absorbed: bool) -> dict[str, float]:
    """Return a training step's operations with the tile kernels, and the bytes of maps in 16 bits that it reads and writes."""
    attention = (18 if absorbed else 20) * tokens**2 * channels
    maps = 11 + 25 if absorbed else 10 + 20
    return {"TFLOP": (24 * tokens * channels**2 + attention) / 1e12, "maps, MB": 2 * maps * tokens * channels / 1e6}


def compare_orders(device: torch.device, tokens: Iterable[int], channels: int) -> list[dict[str, Any]]:
    """Return a row for each number of tokens: operations, time and memory of a training step in both orders, in bfloat16."""
    dtype, rows = torch.bfloat16, []
    for n in tokens:
        side = round(n**0.5)
        torch.manual_seed(0)
        block = movq_ext.AttnBlock(channels).to(device, dtype)
        maps = (torch.randn(1, channels, side, side, device=device, dtype=dtype) for _ in range(2))
        x, dout = (x.to(memory_format=torch.channels_last) for x in maps)
        inputs = [x.requires_grad_(), *block.parameters()]
        row: dict[str, Any] = {"N": side * side}
        for absorbed in (False, True):
            name = "absorbed" if absorbed else "published"
            with order(absorbed, dtype):
                run = lambda: torch.autograd.grad(block(x), inputs, dout)  # noqa: B023  (called before the next turn)
                row[f"{name} ms"] = milliseconds(run, device)
                row[f"{name} MB"] = peak_megabytes(run, device)
            row |= {f"{name} {key}": value for key, value in counts(side * side, channels, absorbed).items()}
        rows.append({**row, "absorbed / published": row["absorbed ms"] / row["published ms"]})
    return rows
