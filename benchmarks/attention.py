"""Attention with one head of 512: our backends against every implementation in PyTorch.

    python benchmarks/attention.py --out benchmarks/results/attention
    python benchmarks/attention.py --tune      # writes the table that chooses the backend, see attention_tune.py

Before it is timed, every result is checked against the formula in float64: 64 rows, and all gradients up to 4096 tokens. TFLOP/s
count 4 N^2 C operations for the forward pass and 10 N^2 C more for the backward pass, without recomputation. "of matmul" is that
rate divided by the rate of an 8192^3 product in bfloat16. "MB" is the peak memory beyond the inputs. In the columns with "kv",
keys and values are one tensor. A second table compares AttnBlock's two orders of projections (see attention_order.py).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_order import compare_orders
from attention_tune import Case, candidates, tune, write_table
from timing import arguments, environment, matmul_rate, milliseconds, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import movq_ext
from movq_ext.ops import cuda
from movq_ext.ops.attention_backends import requested_backend

SIZE = 512
TOKENS = (1024, 4096, 9216, 16384, 36864)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MAX_SCORES = 6 << 30  # for peers that hold all scores in memory: about 40 GB in bfloat16 with gradients
MAX_CHECKED_TOKENS = 4096  # of gradients in float64
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[3] ** -0.5).softmax(3) @ v


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three library calls: the product scales the scores, so no pass is lost to that. Scores have q's dtype."""
    size = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = q.new_empty(len(q), q.shape[1], k.shape[1])
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return (torch.baddbmm(scores, q, k.mT, beta=0, alpha=size[3] ** -0.5).softmax(2) @ v).view(size)
    torch.baddbmm(scores, q, k.mT, beta=0, alpha=size[3] ** -0.5, out=scores)
    return torch.bmm(torch.softmax(scores, 2, out=scores), v).view(size)


def sdpa_with(backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


@functools.cache
def runs(backend: str, case: Case, device: torch.device) -> bool:
    return backend in candidates(case, device)


def ours_with(backend: str, shared_kv: bool) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda and not runs(backend, Case(shared_kv, q.dtype, q.shape[3], q.requires_grad, q.shape[2]), q.device):
            raise NotImplementedError(f"{backend} does not take these tensors")
        scale = q.shape[3] ** -0.5
        return cuda.shared_kv_attention(q, k, scale, backend) if shared_kv else cuda.attention(q, k, v, scale, backend)

    return attention


def peers(quick: bool) -> dict[str, Attention | None]:
    """Return the implementations; None for one that is not installed. Those named N^2 store all scores."""
    # The slowest last: with little time, those are left out.
    found: dict[str, Attention | None] = {
        "ours": movq_ext.attention,
        "ours kv": lambda q, k, v: movq_ext.shared_kv_attention(q, k),
        "efficient": sdpa_with(SDPBackend.EFFICIENT_ATTENTION),
        "baddbmm N^2": baddbmm,
    }
    if torch.cuda.is_available():
        found |= {"tile": ours_with("tile", False), "tile kv": ours_with("tile", True), "hopper kv": ours_with("hopper", True)}
    found |= {
        "math N^2": sdpa_with(SDPBackend.MATH),
        "cudnn": sdpa_with(SDPBackend.CUDNN_ATTENTION),
        "flash": sdpa_with(SDPBackend.FLASH_ATTENTION),
        "cublas": ours_with("cublas", False),
        "cublas kv": ours_with("cublas", True),
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


def errors(attention: Attention, inputs: list[Tensor], dout: Tensor, backward: bool) -> float:
    """Return the largest relative error against the formula in float64: of 64 rows, and of gradients if there are few tokens."""
    q, k, v = (*inputs, inputs[-1])[:3]
    out = attention(q, k, v)
    rows = torch.arange(0, q.shape[2], max(1, q.shape[2] // 64), device=q.device)
    pairs = [(out[:1, :, rows], formula(q[:1, :, rows].double(), k[:1].double(), v[:1].double()))]
    if backward and q.shape[2] <= MAX_CHECKED_TOKENS:
        doubles = [x[:1].detach().double().requires_grad_() for x in inputs]
        exact = torch.autograd.grad(formula(*(*doubles, doubles[-1])[:3]), doubles, dout[:1].double())
        pairs += [(grad[:1], want) for grad, want in zip(torch.autograd.grad(out, inputs, dout), exact, strict=True)]
    return max(float((actual - expected).detach().norm() / expected.detach().norm()) for actual, expected in pairs)


def measure(
    attention: Attention, inputs: list[Tensor], dout: Tensor, backward: bool, seconds: float = 0.15
) -> dict[str, float] | str:
    """Return ms and MB, or the reason for a failure. inputs are q, k and v, or q and kv. Calls start for so many seconds."""
    q, k, v = (*inputs, inputs[-1])[:3]
    cuda = q.is_cuda
    try:
        error = errors(attention, inputs, dout, backward)
        if not error < TOLERANCE[q.dtype]:
            return f"wrong: {error:.1e}"
        run = (lambda: torch.autograd.grad(attention(q, k, v), inputs, dout)) if backward else (lambda: attention(q, k, v))
        megabytes = float("nan")
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            megabytes = (torch.cuda.max_memory_allocated() - before) / 1e6
        return {"ms": milliseconds(run, q.device, seconds), "MB": megabytes}
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # each backend refuses heads of 512 with its own error
        return f"refused ({type(error).__name__})"
    finally:
        if cuda:
            torch.cuda.empty_cache()


def draw(count: int, batch: int, tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, 1, tokens, size, device=device, dtype=dtype) for _ in range(count)]


def write_tuned_table(device: torch.device, minutes: float) -> None:
    """Measure every backend and write attention_table.json."""
    if device.type != "cuda":
        raise SystemExit("--tune measures GPU backends, but there is no GPU here (torch.cuda.is_available() is False)")
    start = time.monotonic()

    def measure_case(case: Case) -> float | str:
        *inputs, dout = draw(3 if case.shared_kv else 4, 1, case.tokens, case.head_size, case.dtype, device)
        inputs = [x.requires_grad_(case.gradient) for x in inputs]
        attention = (lambda q, k, v: movq_ext.shared_kv_attention(q, k)) if case.shared_kv else movq_ext.attention
        result = measure(attention, inputs, dout, case.gradient, seconds=0.05)
        print(case, requested_backend(), result, flush=True)
        return result if isinstance(result, str) else result["ms"]

    rows: list[dict[str, Any]] = []
    try:
        for row in tune(measure_case, device, lambda: time.monotonic() - start < 60 * minutes):
            rows.append(row)
    finally:  # a lease may end before the last case
        if rows:
            write_table(rows, torch.cuda.get_device_capability(device), environment(device))


def main() -> None:
    flags = {
        "--tune": "measure our backends and write movq_ext/ops/attention_table.json; needs a GPU",
        "--batch-1": "no batches of 8",
    }
    options, device = arguments(__doc__, "attention", 3.0, "tiny sizes and nothing compiled", flags)
    if options.tune:
        return write_tuned_table(device, options.minutes)
    start = time.monotonic()
    rate = matmul_rate(device, 256 if options.quick else 8192)
    found = peers(options.quick)
    cases = [
        (dtype, batch, tokens, backward)
        for dtype in (torch.bfloat16, torch.float32)
        for backward in (False, True)
        for batch in ((1,) if options.batch_1 else (1, 8))
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
                *inputs, dout = draw(3 if name.endswith("kv") else 4, batch, tokens, SIZE, dtype, device)
                result = measure(attention, [x.requires_grad_(backward) for x in inputs], dout, backward)
                row[f"{name} ms"] = result if isinstance(result, str) else result["ms"]
                row[f"{name} MB"] = "-" if isinstance(result, str) else result["MB"]
                torch._dynamo.reset()
    for (_, batch, tokens, backward), row in zip(cases, rows, strict=True):
        times = {name: row[f"{name} ms"] for name in found if isinstance(row[f"{name} ms"], float)}
        operations = (14 if backward else 4) * batch * tokens**2 * SIZE
        row["TFLOP/s"] = operations / times["ours"] / 1e9 if "ours" in times else "-"
        row["of matmul"] = row["TFLOP/s"] * 1e12 / rate if "ours" in times else "-"
        theirs = {name: ms for name, ms in times.items() if not name.startswith(("ours", "cublas", "tile", "hopper"))}
        best = min((ms, name) for name, ms in {"-": float("inf"), **theirs}.items())
        row["best peer"] = best[1]
        row["x best peer"] = best[0] / times["ours"] if "ours" in times and best[1] != "-" else "-"
    head = {
        **environment(device),
        "matmul, TFLOP/s": rate / 1e12,
        "path": movq_ext.explain(torch.empty(1, 1, 1, SIZE, device=device).expand(-1, -1, 4096, -1), "attention"),
    }
    write(options.out, "attention", f"Attention, one head of {SIZE}", head, rows)
    orders = compare_orders(device, (100,), 64) if options.quick else compare_orders(device, TOKENS[:4], SIZE)
    title = "A training step of AttnBlock, by the order of its projections"
    write(options.out, "attention_order", title, environment(device), orders)
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
