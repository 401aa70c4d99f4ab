"""Attention with one head of 512: our kernels against every implementation in PyTorch.

    python benchmarks/attention.py --out benchmarks/results/attention

Before it is timed, every result is checked against the formula in float64 on 64 of its rows. TFLOP/s count 4 N^2 C operations for
the forward pass and 10 N^2 C more for the backward pass, without recomputation. "of matmul" is that rate divided by the rate of
an 8192^3 product in bfloat16. "MB" is the peak memory beyond the inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import arguments, environment, matmul_rate, milliseconds, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import movq_ext

SIZE = 512
TOKENS = (1024, 4096, 9216, 16384, 36864)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MAX_SCORES = 6 << 30  # for peers that hold all scores in memory: about 40 GB in bfloat16 with gradients
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SIZE**-0.5).softmax(3) @ v


def sdpa_with(backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def peers(quick: bool) -> dict[str, Attention | None]:
    """Return the implementations; None for one that is not installed. Those named N^2 store all scores."""
    found: dict[str, Attention | None] = {"ours": movq_ext.attention, "math N^2": sdpa_with(SDPBackend.MATH), "bmm N^2": formula}
    found |= {
        "efficient": sdpa_with(SDPBackend.EFFICIENT_ATTENTION),
        "cudnn": sdpa_with(SDPBackend.CUDNN_ATTENTION),
        "flash": sdpa_with(SDPBackend.FLASH_ATTENTION),
    }
    if quick:
        return found
    try:
        from xformers.ops import memory_efficient_attention

        found["xformers"] = lambda q, k, v: memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    except ImportError:
        found["xformers"] = None
    from torch.nn.attention.flex_attention import flex_attention

    found["flex"] = torch.compile(flex_attention, dynamic=False)
    found["compile N^2"] = torch.compile(formula, dynamic=False)
    return found


def measure(attention: Attention, inputs: list[Tensor], dout: Tensor, backward: bool) -> dict[str, float] | str:
    """Return ms and MB, or the reason for a failure."""
    q, k, v = inputs
    cuda = q.is_cuda
    try:
        out = attention(q, k, v)
        rows = torch.arange(0, q.shape[2], max(1, q.shape[2] // 64), device=q.device)
        expected = formula(q[:1, :, rows].double(), k[:1].double(), v[:1].double())
        error = float((out[:1, :, rows] - expected).norm() / expected.norm())
        if not error < TOLERANCE[q.dtype]:
            return f"wrong: {error:.1e}"
        del out, expected
        run = (lambda: torch.autograd.grad(attention(q, k, v), inputs, dout)) if backward else (lambda: attention(q, k, v))
        megabytes = float("nan")
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            megabytes = (torch.cuda.max_memory_allocated() - before) / 1e6
        return {"ms": milliseconds(run, q.device, 0.15), "MB": megabytes}
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # each backend refuses heads of 512 with its own error
        return f"refused ({type(error).__name__})"
    finally:
        if cuda:
            torch.cuda.empty_cache()


def main() -> None:
    options, device = arguments(__doc__, "attention", 3.0, "tiny sizes and nothing compiled")
    start = time.monotonic()
    rate = matmul_rate(device, 256 if options.quick else 8192)
    found = peers(options.quick)
    cases = [
        (dtype, batch, tokens, backward)
        for dtype in (torch.bfloat16, torch.float32)
        for backward in (False, True)
        for batch in (1, 8)
        for tokens in TOKENS
        if dtype == torch.bfloat16 or tokens <= 4096
    ]
    if options.quick:
        cases = [(torch.float32, 1, 100, False), (torch.float32, 1, 100, True)]
    rows = [
        {
            "pass": "forward+backward" if backward else "forward",
            "dtype": str(dtype)[6:],
            "N": tokens,
            "batch": batch,
            **{f"{name} {what}": value for name in found for what, value in (("ms", "no time"), ("MB", "-"))},
        }
        for dtype, batch, tokens, backward in cases
    ]
    for name, attention in found.items():  # the outer loop, so that a lack of time affects the last peer only
        for (dtype, batch, tokens, backward), row in zip(cases, rows, strict=True):
            if time.monotonic() - start > 60 * options.minutes:
                break
            if attention is None:
                row[f"{name} ms"] = "missing"
            elif name.endswith("N^2") and batch * tokens**2 > MAX_SCORES:
                row[f"{name} ms"] = "too large"
            else:
                torch.manual_seed(0)
                *inputs, dout = (torch.randn(batch, 1, tokens, SIZE, device=device, dtype=dtype) for _ in range(4))
                result = measure(attention, [x.requires_grad_(backward) for x in inputs], dout, backward)
                row[f"{name} ms"] = result if isinstance(result, str) else result["ms"]
                row[f"{name} MB"] = "-" if isinstance(result, str) else result["MB"]
                torch._dynamo.reset()
    for (_, batch, tokens, backward), row in zip(cases, rows, strict=True):
        times = {name: row[f"{name} ms"] for name in found if isinstance(row[f"{name} ms"], float)}
        operations = (14 if backward else 4) * batch * tokens**2 * SIZE
        row["TFLOP/s"] = operations / times["ours"] / 1e9 if "ours" in times else "-"
        row["of matmul"] = row["TFLOP/s"] * 1e12 / rate if "ours" in times else "-"
        best = min((ms, name) for name, ms in {"-": float("inf"), **times}.items() if name != "ours")
        row["best peer"] = best[1]
        row["x best peer"] = best[0] / times["ours"] if "ours" in times and best[1] != "-" else "-"
    head = {
        **environment(device),
        "matmul, TFLOP/s": rate / 1e12,
        "path": movq_ext.explain(torch.empty(1, 1, 1, SIZE, device=device), "attention"),
    }
    write(options.out, "attention", f"Attention, one head of {SIZE}", head, rows)
    plot(options.out / "attention.png", rows, list(found), head["device"])


def plot(path: Path, rows: list[dict[str, Any]], names: list[str], device: str) -> None:
    """Plot TFLOP/s over tokens at batch 1, forward and with backward. Does nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, pair = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    for axes, kind, factor in zip(pair, ("forward", "forward+backward"), (4, 14), strict=True):
        for name in names:
            points = [
                (row["N"], factor * row["N"] ** 2 * SIZE / row[f"{name} ms"] / 1e9)
                for row in rows
                if row["pass"] == kind
                and row["batch"] == 1
                and row["dtype"] == rows[0]["dtype"]
                and isinstance(row[f"{name} ms"], float)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=3 if name == "ours" else 1)
        axes.set(title=f"{kind}, {rows[0]['dtype']}, batch 1", xlabel="tokens", xscale="log", ylim=0)
        axes.legend(fontsize=8)
    pair[0].set_ylabel("TFLOP/s")
    figure.suptitle(f"Attention, one head of {SIZE}, on {device}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
