"""A whole decode and a training step, ours against every peer: time and memory.

    python benchmarks/decode.py --out benchmarks/results/decode

The decoder is Kandinsky 2.x's (52.8 million parameters) with random weights, the same in every peer. Every peer runs in a process
of its own, and its result is compared with the published one in float32 before it is timed. A training step is a forward and a
backward pass, with gradients of the latents and of all the decoder's parameters.

"MB" is the peak of a later call beyond what was there before it; "kept MB" is what the first call left in tensors beyond weights
and latents: weights that were derived or packed. "of roofline" is the published convolutions' operations at the better rate of a
matrix product and a 3x3 convolution of the dtype, plus the norms' bytes at the copy rate, as a share of the time.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import KINDS, peer, save_random
from plots import draw
from timing import convolution_rate, copy_bandwidth, environment, matmul_rate, milliseconds, write
from torch import Tensor, nn
from work import Work, work

import movq_ext

TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2, "float16": 1e-2}
CASE = ("device", "mode", "dtype", "size", "batch")


def step_of(mode: str, model: nn.Module, decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What is measured, a function of the latents: the image, or the latents' gradient."""
    if mode == "decode":
        return decode
    parameters = [p for name, p in model.named_parameters() if name.split(".")[0] in ("decoder", "post_quant_conv")]

    def train(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(decode(z).float().square().mean(), [z, *parameters])[0]

    return train


def measure_one(options: argparse.Namespace) -> dict[str, Any]:
    """Runs in its own process: ms and MB of one peer, or why there are none."""
    device, dtype = torch.device(options.device[0]), getattr(torch, options.dtype)
    torch.set_grad_enabled(options.mode == "train")
    torch.manual_seed(0)
    z = torch.randn(options.batch, 4, options.size // 8, options.size // 8)
    wanted = None
    if options.size <= 512:
        model, decode = peer("published", options.folder, device, torch.float32)
        wanted = step_of(options.mode, model, decode)(z.to(device)).cpu()
        del model, decode
    z = z.to(device, dtype)
    model, decode = peer(options.peer, options.folder, device, dtype)
    model.train(options.mode == "train")
    step = step_of(options.mode, model, decode)
    loaded = held(device)
    out = step(z)
    if wanted is not None:
        error = float((out.float().cpu() - wanted).norm() / wanted.norm())
        by_tf32 = options.dtype == "float32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32  # of float16's 10 bits
        if not error < TOLERANCE["float16" if by_tf32 else options.dtype] * (3 if options.mode == "train" else 1):
            return {"failed": f"wrong: {error:.1e}"}
    del out
    kept = held(device) - loaded
    del wanted
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
        step(z)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM again
        before = resident("VmRSS")
        step(z)
        peak = resident("VmHWM")
    return {"ms": milliseconds(lambda: step(z), device, options.seconds), "MB": peak - before, "kept MB": kept}


def held(device: torch.device) -> float:
    """MB of tensors: all that the allocator gave on a GPU; on a CPU those that Python can reach."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 1e6
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.device == device]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.layout == torch.strided}
    packed: float = sum(x.numel() * x.element_size() for x in tensors if x.layout != torch.strided)  # oneDNN's have no storage
    return (float(sum(storages.values())) + packed) / 1e6


def resident(what: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(what))


def run(name: str, options: argparse.Namespace, seconds_left: float, **case: Any) -> dict[str, Any]:
    arguments = [f"--{key}={value}" for key, value in case.items()]
    command = [sys.executable, __file__, f"--peer={name}", f"--folder={options.folder}", f"--seconds={options.seconds}"]
    limit = min(600.0, seconds_left)
    if limit <= 0:
        return {"failed": "no time"}
    try:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"over {limit:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["died"])[-1]
        return {"failed": "out of memory" if "OutOfMemory" in last or done.returncode < 0 else last[:60]}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def peers_of(options: argparse.Namespace, mode: str, cuda: bool) -> list[str]:
    if options.peers or options.quick:
        return options.peers or list(KINDS)
    hows = ["", " nhwc", " compiled", " compiled nhwc", *([" frozen nhwc"] if mode == "decode" and not cuda else [])]
    return [f"{kind}{how}" for how in hows for kind in KINDS]


def measure_device(
    device: torch.device, options: argparse.Namespace, end: float, rows: list[dict[str, Any]], works: dict[str, Work]
) -> dict[str, Any]:
    """Adds a row for every decoder and case, and the work of every size; returns what there is to say of the device."""
    cuda = device.type == "cuda"
    bandwidth = copy_bandwidth(device)
    said = {**environment(device), "copy bandwidth, GB/s": bandwidth / 1e9, "threads": torch.get_num_threads()}
    for dtype in options.dtypes or (["bfloat16", "float16", "float32"] if cuda else ["float32"]):
        kind = getattr(torch, dtype)
        rates = {"matmul": matmul_rate(device, 8192 if cuda else 2048, kind)}
        rates["convolution"] = convolution_rate(device, 128 if cuda else 64, kind)
        said |= {f"{dtype} {name}, TFLOP/s": rate / 1e12 for name, rate in rates.items()}
        for size in options.sizes or ([64] if options.quick else [256, 512, 768, 1024, 2048] if cuda else [256]):
            found = works[str(size)] = work(movq_ext.from_pretrained(options.folder).decoder, size)
            operations = sum(found[part]["operations"] for part in ("convolution", "attention"))
            moved = found["norm"]["elements"] / 3
            for batch in options.batches or ([1, 8] if cuda and not options.quick else [1]):
                for mode in options.modes or (["decode", "train"] if cuda or options.quick else ["decode"]):
                    passes, maps = (1, 3) if mode == "decode" else (3, 8)
                    seconds = passes * operations / max(rates.values()) + maps * moved * kind.itemsize / bandwidth
                    for name in peers_of(options, mode, cuda):
                        case = dict(device=device, mode=mode, dtype=dtype, size=size, batch=batch)
                        result = run(name, options, end - time.monotonic(), **case)
                        ms = result.get("ms")
                        row = {**case, "device": device.type, "decoder": name, "ms": ms or result["failed"]}
                        row |= {key: result.get(key, "-") for key in ("MB", "kept MB")}
                        row["images/s"] = 1e3 * batch / ms if ms else "-"
                        row["of roofline"] = 1e3 * batch * seconds / ms if ms else "-"
                        rows.append(row)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = ("cuda", "cpu")
    parser.add_argument("--device", nargs="+", choices=devices, default=devices, help="a missing one gets a row that says so")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode"), help="folder for the results")
    parser.add_argument("--sizes", type=int, nargs="+", help="of the image; 256 on a CPU, 256 to 2048 on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, help="float32 on a CPU, all on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", help="1 on a CPU, 1 and 8 on a GPU")
    parser.add_argument("--modes", nargs="+", choices=("decode", "train"), help="both on a GPU, decode on a CPU")
    parser.add_argument("--peers", nargs="+", help="as in `published compiled nhwc`, quoted; see peers.py")
    parser.add_argument("--seconds", type=float, default=0.5, help="to measure each for, and 3 calls at least")
    parser.add_argument("--minutes", type=float, default=60.0, help="end after this long")
    parser.add_argument("--quick", action="store_true", help="a small decoder and few peers, to rehearse")
    for name, kind in (("peer", str), ("folder", Path), ("size", int), ("batch", int), ("dtype", str), ("mode", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(measure_one(options)))
        return
    end = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    head: dict[str, Any] = {}
    works: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        save_random(options.folder, small=options.quick)
        for device in options.device:
            if device == "cuda" and not torch.cuda.is_available():
                missing: dict[str, Any] = dict.fromkeys((*CASE, "decoder", "ms", "MB", "kept MB", "images/s", "of roofline"), "-")
                rows.append({**missing, "device": device, "ms": "missing: no GPU"})
                continue
            said = measure_device(torch.device(device), options, end, rows, works)
            shared = ("date", "torch", "movq_ext", "commit")
            head |= {key if key in shared else f"{device}: {key}": value for key, value in said.items()}
    head |= ratios(rows)
    head["work"] = works
    write(options.out, "decode", "Decoding and training steps", head, rows)
    print(f"figures: {draw(options.out)}")


def ratios(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Our best against the peers' best, for every case."""
    found = {}
    measured = [row for row in rows if isinstance(row["ms"], float)]
    for case in dict.fromkeys(tuple(row[key] for key in CASE) for row in measured):
        those = [row for row in measured if tuple(row[key] for key in CASE) == case]
        ours, theirs = ([row for row in those if row["decoder"].startswith("ours") == mine] for mine in (True, False))
        if ours and theirs:
            text = [f"{min(r[key] for r in theirs) / min(r[key] for r in ours):.2f}x {what}"
                    for key, what in (("ms", "the speed"), ("MB", "less memory"))
                    if min(r[key] for r in ours) > 0]  # fmt: skip
            device, mode, dtype, size, batch = case
            found[f"{device}, {mode}, {dtype}, {size}x{size}, batch {batch}, ours against the best peer"] = ", ".join(text)
    return found


if __name__ == "__main__":
    main()
