"""A first look at a GPU in about a minute: decodes and training steps of ours and eager peers, in turn, in one process.

    python benchmarks/gpu_overview.py --out benchmarks/results/gpu

decode.py compares more carefully, in turns and with compiled peers, but each of its peers starts a process, and that takes most
of a short lease. Times are medians of calls within 0.2 s, after a warm-up and with a cold L2 cache. "host ms" is the time until a
call returns, while the GPU still computes: if it is more than "ms", the GPU waits for Python. "MB" is the peak memory beyond what
was in use before the call. A graph keeps its maps between calls, so its memory is not shown. "to published" is the relative error
against the published decoder in the same dtype, which both round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers import peer, save_random
from timing import arguments, environment, milliseconds, peak_megabytes, write
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float32)
DECODERS = ("published", "published nhwc", "diffusers", "diffusers nhwc", "ours nhwc", "ours nhwc graph")
TRAINED = ("published nhwc", "diffusers nhwc", "ours nhwc")
SIZES, TRAINED_SIZES = (256, 512, 1024), (256, 512)
Model = tuple[nn.Module, Callable[[Tensor], Tensor]]


def cases(quick: bool) -> Iterator[tuple[str, torch.dtype, int, str]]:
    """Yield what is measured: "decode" or "train", the dtype, the size of the image and the decoder."""
    for dtype in DTYPES:
        for size in (64,) if quick else SIZES:
            for name in DECODERS:
                yield "decode", dtype, size, name
    for size in (64,) if quick else TRAINED_SIZES:
        for name in TRAINED:
            yield "train", torch.bfloat16, size, name


def decode_row(run: Callable[[], Tensor], device: torch.device, seconds: float, published: Tensor | None) -> dict[str, Any]:
    with torch.no_grad():
        out = run().float()
        ms = milliseconds(run, device, seconds)
        megabytes = peak_megabytes(run, device)
        start = time.perf_counter()
        run()
        host_ms = 1e3 * (time.perf_counter() - start)
    error = 0.0 if published is None else float((out - published).norm() / published.norm())
    return {"ms": ms, "host ms": host_ms, "MB": megabytes, "to published": error, "out": out}


def train_row(model: nn.Module, run: Callable[[], Tensor], device: torch.device, seconds: float) -> dict[str, Any]:
    parameters = [p for name, p in model.named_parameters() if name.split(".")[0] in ("decoder", "post_quant_conv")]
    step = lambda: torch.autograd.grad(run().float().square().mean(), parameters)
    return {"ms": milliseconds(step, device, seconds), "host ms": "-", "MB": peak_megabytes(step, device), "to published": "-"}


def measure(
    case: tuple[str, torch.dtype, int, str], found: Model, device: torch.device, seconds: float, published: Tensor | None
) -> dict[str, Any]:
    mode, dtype, size, name = case
    model, decode = found
    torch.manual_seed(1)
    z = torch.randn(1, 4, size // 8, size // 8, device=device, dtype=dtype)
    if mode == "train":
        return train_row(model, lambda: decode(z), device, seconds)
    row = decode_row(lambda: decode(z), device, seconds, published)
    return {**row, "MB": "-"} if "graph" in name else row


def main() -> None:
    options, device = arguments(__doc__, "gpu", 1.5, "a small model and image")
    start, rows = time.monotonic(), []
    models: dict[tuple[str, torch.dtype], Model] = {}
    published: dict[tuple[torch.dtype, int], Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), small=options.quick)
        for case in cases(options.quick):
            mode, dtype, size, name = case
            row: dict[str, Any] = {"mode": mode, "dtype": str(dtype)[6:], "size": size, "decoder": name}
            if time.monotonic() - start > 60 * options.minutes:
                rows.append({**row, "ms": "no time", "host ms": "-", "MB": "-", "to published": "-"})
                continue
            try:
                if (name, dtype) not in models:
                    models[name, dtype] = peer(name, Path(folder), device, dtype)
                row |= measure(case, models[name, dtype], device, 0.01 if options.quick else 0.2, published.get((dtype, size)))
            except (ImportError, torch.OutOfMemoryError) as error:
                row |= {"ms": type(error).__name__, "host ms": "-", "MB": "-", "to published": "-"}
            out = row.pop("out", None)
            if out is not None:
                published.setdefault((dtype, size), out)
            rows.append(row)
            print(*row.values(), flush=True)
    write(options.out, "overview", "Decodes and training steps, in one process", environment(device), rows)


if __name__ == "__main__":
    main()
