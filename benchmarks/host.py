"""What a decode of a small image costs the host: the kernels that it launches, and the microseconds of Python and PyTorch.

    python benchmarks/host.py --out benchmarks/results/host

On a GPU, "host us" is the time until the call returns, without a synchronisation: the launches are queued by then. If it is more
than "decode ms", the GPU waits for Python. A CUDA graph replays all launches at once.

Without a GPU, meta tensors take a GPU's path. "host us" is then the dispatch cost on this CPU: Python, PyTorch's dispatcher and
its functions of shapes, some of them in Python, but neither the CUDA driver nor cuDNN. It compares decoders; it does not predict
a GPU's times. diffusers' attention is then several operators, where a GPU may have a fused kernel.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from meta_gpu import Launches, meta_gpu
from peers import DDCONFIG, SMALL, SMALL_DDCONFIG, VQ
from timing import arguments, environment, write
from torch import Tensor

import movq_ext

GRID = 32  # of the latent: images of 256x256
SECONDS = 2.0  # per decoder
Decode = Callable[[], Tensor]


def decoders(device: torch.device, dtype: torch.dtype, small: bool) -> dict[str, Decode]:
    """Return the decodes that are compared, of one latent."""
    with torch.device(device):
        ours = movq_ext.MOVQDecoder(**(SMALL_DDCONFIG if small else DDCONFIG))
        z = torch.zeros(1, 4, GRID, GRID, dtype=dtype)
    ours = ours.to(dtype).to(memory_format=torch.channels_last).eval()
    found: dict[str, Decode] = {"movq_ext": lambda: ours(z, z)}
    if device.type == "cuda":
        graphed = movq_ext.CUDAGraphDecoder(ours)
        found["movq_ext, CUDA graph"] = lambda: graphed(z, z)
    try:
        from diffusers import VQModel
    except ImportError:
        return found
    for name in ("diffusers", "diffusers, accelerated"):
        with torch.device(device):
            theirs: Any = VQModel(**(SMALL if small else VQ))
        theirs = theirs.to(dtype).eval()
        if name != "diffusers":
            movq_ext.accelerate(theirs)
        found[name] = lambda decoder=theirs.decoder: decoder(z, z)
    return found


def host_microseconds(decode: Decode, synchronize: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Return the median time until a call returns, and until its result is there, in microseconds."""
    launched, finished = [], []
    for _ in range(3):
        decode()
    end = time.perf_counter() + seconds
    while len(launched) < 3 or time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        decode()
        launched.append(1e6 * (time.perf_counter() - start))
        synchronize()
        finished.append(1e6 * (time.perf_counter() - start))
    return median(launched), median(finished)


def count_kernels(decode: Decode, pretends: bool) -> int:
    launches = Launches()
    with meta_gpu(launches) if pretends else contextlib.nullcontext(), launches:
        decode()
    return launches.kernels()


@torch.no_grad()
def main() -> None:
    options, device = arguments(__doc__, "host", 1.0, "a small model, and three decodes of each")
    start, on_gpu = time.monotonic(), device.type == "cuda"
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, decode in decoders(device if on_gpu else torch.device("meta"), dtype, options.quick).items():
            if time.monotonic() - start > 60 * options.minutes:
                break
            with contextlib.nullcontext() if on_gpu else meta_gpu():
                host, whole = host_microseconds(
                    decode, torch.cuda.synchronize if on_gpu else lambda: None, 0 if options.quick else SECONDS
                )
            kernels = "1 graph" if "graph" in name else count_kernels(decode, pretends=not on_gpu)
            row: dict[str, Any] = {"dtype": str(dtype)[6:], "decoder": name, "kernels": kernels, "host us": round(host)}
            row["us per kernel"] = host / kernels if isinstance(kernels, int) else "-"
            row["decode ms"] = whole / 1e3 if on_gpu else "-"
            rows.append(row)
            print(*(f"{value:.0f}" if isinstance(value, float) else value for value in row.values()), sep="  ", flush=True)
    kind = "until the call returns" if on_gpu else "dispatch cost on this CPU with meta tensors, without CUDA driver and cuDNN"
    head = {**environment(device), "image": f"{8 * GRID}x{8 * GRID}", "host us is": kind}
    write(options.out, "host", "Host time of a decode", head, rows)


if __name__ == "__main__":
    main()
