"""Shared by the benchmarks: the environment, timing, the device's measured rates, and the result files.

One protocol for every comparison: the candidates take turns for several rounds, in one script on an otherwise idle machine.
The result is the median over the rounds, and the spread is ``(largest - smallest) / median`` of the rounds' medians.

A candidate leaves cold caches to the next: a call of 0.9 s took 8 % longer just after another process. So where a call of any
candidate is short (`needs_warm_up`), every candidate's turn starts with an untimed call.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import torch

import movq_ext

# For a process that measures memory: glibc returns every freed block of at least 128 KiB to the system. Its usual threshold grows
# with the blocks that are freed, and what an earlier call left behind hides a part of the peak.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
SHORT_CALL_MS = 1500.0  # longer calls do not notice what the caches held before


def environment(device: torch.device) -> dict[str, Any]:
    """Return date, device, driver, versions and commit. A commit ends in ``+`` if files other than results had changes.

    The environment variable MOVQ_EXT_COMMIT names the commit of a copy of the tree without its .git.
    """
    commit = _output("git", "rev-parse", "--short", "HEAD") or os.environ.get("MOVQ_EXT_COMMIT", "")
    changes = _output("git", "status", "--porcelain", "-uno", "--", ":(top)", ":(top,exclude)benchmarks/results")
    info: dict[str, Any] = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "movq_ext": movq_ext.build_info(),
        "device": "cpu",
        "commit": commit + ("+" if changes else ""),
    }
    if device.type == "cuda":
        info["device"] = torch.cuda.get_device_name(device)
        info["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        info["processor"] = processor()
        info["threads"] = torch.get_num_threads()
    return info


def processor() -> str:
    """Return the CPU's model and the vector instructions that PyTorch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    name = fields.get("model name") or platform.processor() or "unknown"
    family = f", family {fields['cpu family']} model {fields['model']}" if {"cpu family", "model"} <= fields.keys() else ""
    return f"{name}{family}, {torch.backends.cpu.get_cpu_capability()}"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except FileNotFoundError:
        return ""


def summary(rounds: Sequence[float]) -> tuple[float, float]:
    """Return the median of the rounds and their spread, ``(largest - smallest) / median``."""
    middle = median(rounds)
    return middle, (max(rounds) - min(rounds)) / middle


def arguments(
    description: str | None, name: str, minutes: float, rehearsal: str, flags: Mapping[str, str] = MappingProxyType({})
) -> tuple[argparse.Namespace, torch.device]:
    """Return the options of an operator's benchmark (``out``, ``quick``, ``minutes``, flags) and its device, a GPU with an index.

    flags maps further options to their help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{name}"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help=f"rehearse: {rehearsal}")
    parser.add_argument("--minutes", type=float, default=minutes, help="start no measurement after this long")
    for flag, text in flags.items():
        parser.add_argument(flag, action="store_true", help=text)
    options = parser.parse_args()
    device = torch.device(options.device)
    return options, torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def needs_warm_up(call_ms: Iterable[float]) -> bool:
    """True if a call of one candidate is short, from the time of a call of each: then every turn starts with an untimed call."""
    return min(call_ms, default=SHORT_CALL_MS) < SHORT_CALL_MS


def milliseconds(
    run: Callable[[], object], device: torch.device, seconds: float = 0.3, *, min_calls: int = 3, warm_up: bool = True
) -> float:
    """Return the median time of a call; on a GPU the L2 cache is cold.

    Args:
        run: the call.
        device: where it computes.
        seconds: calls start within this time.
        min_calls: on a CPU, the fewest calls to time.
        warm_up: on a CPU, start with an untimed call. A GPU always does.
    """
    if warm_up or device.type == "cuda":
        run()
    if device.type != "cuda":
        times, end = [], time.perf_counter() + seconds
        while len(times) < min_calls or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return median(times)
    flush = torch.empty(1 << 30, dtype=torch.int8, device=device)  # takes 0.3 ms at 3.35 TB/s
    run()
    events, end = [], time.perf_counter() + seconds
    while len(events) < 5 or (time.perf_counter() < end and len(events) < 100):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # clears the cache, and hides the launch overhead of the call
        started.record()
        run()
        ended.record()
        events.append((started, ended))
        if len(events) % 10 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return median(started.elapsed_time(ended) for started, ended in events)


def peak_megabytes(run: Callable[[], object], device: torch.device) -> float:
    """Return the peak memory of a call beyond what was in use before it. On a CPU, best in a process with EXACT_MALLOC."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6 - before
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of VmRSS
    before = resident_megabytes("VmRSS")
    run()
    return resident_megabytes("VmHWM") - before


def release_memory() -> None:
    """Return freed memory to the system: the allocator would serve the next call from it, and its peak would look smaller."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def resident_megabytes(what: str) -> float:
    """Return VmRSS or VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(what))


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Return bytes per second of a large copy; reads and writes both count."""
    size = size if device.type == "cuda" else size // 16
    source, target = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size / (milliseconds(lambda: target.copy_(source), device) * 1e-3)


def matmul_rate(device: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return operations per second of a product of square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: a @ b, device) * 1e-3)


def convolution_rate(device: torch.device, size: int = 64, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return operations per second of a 3x3 convolution, ``(1, 512, size, size)`` to itself in channels_last."""
    with torch.no_grad():
        x = torch.randn(1, 512, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(512, 512, 3, padding=1, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        return 2 * 9 * 512**2 * size**2 / (milliseconds(lambda: conv(x), device) * 1e-3)


def write(folder: Path, name: str, title: str, head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write name.json and name.md, each atomically. There is one row for each measurement, and all rows have the same keys."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = list(rows[0]) if rows else []
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in head.items() if key not in ("movq_ext", "work")), ""]
    lines += [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    lines += [
        "| " + " | ".join(f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in keys) + " |" for row in rows
    ]
    texts = {"json": json.dumps({**head, "rows": rows}, indent=1, default=str), "md": "\n".join(lines) + "\n"}
    for kind, text in texts.items():
        temporary = folder / f"{name}.{kind}.tmp"
        temporary.write_text(text)
        os.replace(temporary, folder / f"{name}.{kind}")
