"""Time and memory of a whole decode and of a training step: ours against every peer.

    python benchmarks/decode.py --out benchmarks/results/decode
    python benchmarks/decode.py --plan cpu --compile-only  # fills the compiler's cache: the next line takes less time
    python benchmarks/decode.py --plan cpu --out benchmarks/results/decode_cpu --minutes 20

A model is "kandinsky", Kandinsky 2.x's decoder (52.8 million parameters) with random weights, or "shipped", the small one in this
package. The weights are the same in every peer; diffusers cannot read the shipped ones. Each peer runs in a separate process. Its
result is checked against the published decoder in float32 first, for up to 512x512 pixels in a batch; then the peers are timed in
turns, for several rounds. "ms" is the median of the rounds and "spread" their ``(largest - smallest) / median``. A training step
is a forward and a backward pass, with gradients for the latents and for all parameters of the decoder.

"MB" is the peak memory of the second call beyond what was in use before it. "kept MB" is what the first call left behind in
tensors besides weights and latents, such as packed weights. "of roofline" divides a lower bound of the time by the measured time:
the operations of the published convolutions at the faster of two measured rates (a matrix product and a 3x3 convolution in that
dtype), plus the bytes of the norms at the rate of a copy. It may exceed 1, since ours takes fewer operations.

The results are written after every case, so an interrupted run keeps its finished cases.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peer_process import TOLERANCE, PeerProcess
from peers import KINDS, save_random
from plots import draw
from tables import CASE
from timing import convolution_rate, copy_bandwidth, environment, matmul_rate, summary, write
from work import work

import movq_ext
from movq_ext.demo import SMALL_MODEL_PATH

MEASURED = ("ms", "spread", "rounds", "MB", "kept MB", "images/s", "of roofline")
MODELS = ("kandinsky", "shipped")


class Case(NamedTuple):
    """What the peers compute; see the keys of plots.CASE."""

    device: str
    model: str
    threads: int
    mode: str
    dtype: str
    size: int
    batch: int


def cpu_case(dtype: str = "float32", size: int = 256, batch: int = 1, threads: int = 2, model: str = "kandinsky") -> Case:
    return Case("cpu", model, threads, "decode", dtype, size, batch)


# The most important first, since the time may end.
PLANS = {
    "cpu": (
        cpu_case(),
        cpu_case("bfloat16"),
        cpu_case(model="shipped"),
        cpu_case(size=128),
        cpu_case(threads=1),
        cpu_case(size=512),
        cpu_case(size=128, batch=8),
        cpu_case("bfloat16", size=512),
        cpu_case("bfloat16", model="shipped"),
        cpu_case("bfloat16", size=128),
        cpu_case(model="shipped", threads=1),
        cpu_case("bfloat16", threads=1),
        cpu_case(size=1024),
        cpu_case("bfloat16", size=1024),
    )
}
PLAN_PEERS = ("ours", "published compiled nhwc", "diffusers compiled nhwc", "diffusers nhwc")


def chosen_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the plan's cases, or every combination of the options."""
    if options.plan:
        yield from PLANS[options.plan]
        return
    for device in options.device:
        cuda = device == "cuda"
        sizes = [64] if options.quick else [256, 512, 768, 1024, 2048] if cuda else [256]
        for model in options.models:
            for threads in options.threads or [torch.get_num_threads()]:
                for dtype in options.dtypes or (["bfloat16", "float16", "float32"] if cuda else ["float32"]):
                    for size in options.sizes or sizes:
                        for batch in options.batches or ([1, 8] if cuda and not options.quick else [1]):
                            for mode in options.modes or (["decode", "train"] if cuda or options.quick else ["decode"]):
                                yield Case(device, model, threads, mode, dtype, size, batch)


def peers_of(case: Case, options: argparse.Namespace) -> list[str]:
    variants = ["", " nhwc", " compiled", " compiled nhwc"]
    if case.mode == "decode" and case.device == "cpu":
        variants.append(" frozen nhwc")
    names = list(KINDS) if options.quick else [f"{kind}{variant}" for variant in variants for kind in KINDS]
    if options.plan and not options.quick:
        names = [*PLAN_PEERS, *(["published nhwc"] if case == PLANS[options.plan][0] else [])]
    names = options.peers or names
    if case.model == "shipped":
        names = list(dict.fromkeys(name.replace("diffusers", "published") for name in names))
    return names


def measure_case(case: Case, options: argparse.Namespace, folder: Path, deadline: float) -> dict[str, dict[str, Any]]:
    """Return the results of each peer. Peers are prepared one after the other, and then take turns."""
    arguments = case._asdict()
    weights = folder if arguments.pop("model") == "kandinsky" else SMALL_MODEL_PATH
    expected = folder / f"expected-{case.device}-{case.model}-{case.mode}-{case.size}-{case.batch}.pt"
    peers = []
    try:
        for name in peers_of(case, options):
            peers.append(PeerProcess(name, weights, expected, options.seconds, **arguments))
            peers[-1].receive(deadline)
            print(case, name, peers[-1].found, file=sys.stderr)
        for _ in range(0 if options.compile_only else options.rounds):
            for one in peers:
                one.measure(deadline)
    finally:
        for one in peers:
            one.close()
    return {one.name: one.found for one in peers}


def rows_of(case: Case, results: dict[str, dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Return a row for every decoder.

    Args:
        case: what was measured.
        results: of `measure_case`.
        seconds: lower bound of the time for one image.
    """
    rows = []
    for name, result in results.items():
        row = {**case._asdict(), "decoder": name, **dict.fromkeys(MEASURED, "-")}
        row |= {key: result[key] for key in ("MB", "kept MB") if key in result}
        if result["ms"]:
            ms, spread = summary(result["ms"])
            row |= {"ms": ms, "spread": spread, "rounds": len(result["ms"]), "images/s": 1e3 * case.batch / ms}
            row["of roofline"] = 1e3 * case.batch * seconds / ms
        else:
            row["ms"] = result.get("failed", "not timed")
        rows.append(row)
    return rows


class Limits:
    """Measured rates of the devices and counted work of the models: the lower bounds of the times.

    Args:
        weights: of each model.
    """

    def __init__(self, weights: dict[str, Path]) -> None:
        self.weights = weights
        self.head: dict[str, Any] = {}
        self.work: dict[str, Any] = {}

    def seconds(self, case: Case) -> float:
        """Return the lower bound for one image, and add the rates to the head and the work of this size."""
        device, cuda = torch.device(case.device), case.device == "cuda"
        where = case.device if cuda else f"{case.device}, {case.threads} threads"
        if not cuda:
            torch.set_num_threads(case.threads)
        if f"{case.device}: device" not in self.head:
            shared = ("date", "torch", "movq_ext", "commit")
            found = environment(device)
            found.pop("threads", None)
            self.head |= {key if key in shared else f"{case.device}: {key}": value for key, value in found.items()}
        if f"{where}: copy bandwidth, GB/s" not in self.head:
            self.head[f"{where}: copy bandwidth, GB/s"] = copy_bandwidth(device) / 1e9
        dtype = getattr(torch, case.dtype)
        sizes = (8192, 128) if cuda else (2048, 64)
        for name, rate, size in zip(("matmul", "convolution"), (matmul_rate, convolution_rate), sizes, strict=True):
            if (key := f"{where}: {case.dtype} {name}, TFLOP/s") not in self.head:
                self.head[key] = rate(device, size, dtype) / 1e12
        if (key := f"{case.model} {case.size}") not in self.work:
            self.work[key] = work(movq_ext.from_pretrained(self.weights[case.model]).decoder, case.size)
        found = self.work[key]
        operations = sum(found[part]["operations"] for part in ("convolution", "attention"))
        passes, maps = (1, 3) if case.mode == "decode" else (3, 8)
        peak = 1e12 * max(self.head[f"{where}: {case.dtype} {name}, TFLOP/s"] for name in ("matmul", "convolution"))
        moved = maps * found["norm"]["elements"] / 3 * dtype.itemsize
        return float(passes * operations / peak + moved / (1e9 * self.head[f"{where}: copy bandwidth, GB/s"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = ("cuda", "cpu")
    parser.add_argument("--plan", choices=PLANS, help="measure a list of cases instead of every combination of the options below")
    parser.add_argument("--device", nargs="+", choices=devices, default=devices, help="a missing GPU gets a row that says so")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:1], help="kandinsky")
    parser.add_argument("--threads", type=int, nargs="+", help="of operators on a CPU; PyTorch's default")
    parser.add_argument("--sizes", type=int, nargs="+", help="of the image; 256 on a CPU, 256 to 2048 on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, help="float32 on a CPU, all on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", help="1 on a CPU, 1 and 8 on a GPU")
    parser.add_argument("--modes", nargs="+", choices=("decode", "train"), help="both on a GPU, decode on a CPU")
    parser.add_argument("--peers", nargs="+", help="such as 'published compiled nhwc'; see peers.py")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each peer")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn; it has at least one call")
    parser.add_argument("--minutes", type=float, default=60.0, help="end after this long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode"), help="folder for the results")
    parser.add_argument("--compile-only", action="store_true", help="run every peer of every case once, and write nothing")
    parser.add_argument("--quick", action="store_true", help="rehearse: small decoders, images and batches, and few peers")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random(folder, small=options.quick)
        limits = Limits({"kandinsky": folder, "shipped": SMALL_MODEL_PATH})
        for case in dict.fromkeys(quick(case) if options.quick else case for case in chosen_cases(options)):
            if case.device == "cuda" and not torch.cuda.is_available():
                missing: dict[str, Any] = dict.fromkeys((*CASE, "decoder", *MEASURED), "-")
                rows.append({**missing, "device": case.device, "ms": "missing: no GPU"})
            elif options.compile_only:
                measure_case(case, options, folder, deadline)
            elif time.monotonic() < deadline:
                seconds = limits.seconds(case)
                rows += rows_of(case, measure_case(case, options, folder, deadline), seconds)
                save(options, limits, rows)
    if not options.compile_only:
        save(options, limits, rows)
        print(f"figures: {draw(options.out)}")


def quick(case: Case) -> Case:
    """Return a smaller case, with one thread: two would wait for each other on a busy machine."""
    return case._replace(threads=1, size=min(case.size, 64) + 32 * (case.size > 256), batch=min(case.batch, 2))


def save(options: argparse.Namespace, limits: Limits, rows: Sequence[dict[str, Any]]) -> None:
    head = {**limits.head, "rounds": options.rounds, **ratios(rows), "work": limits.work}
    write(options.out, "decode", "Decoding and training steps", head, rows)


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Compare our best with the peers' best, for every case."""
    found = {}
    measured = [row for row in rows if isinstance(row["ms"], float)]
    for case in dict.fromkeys(tuple(row[key] for key in CASE) for row in measured):
        of_case = [row for row in measured if tuple(row[key] for key in CASE) == case]
        ours, theirs = ([row for row in of_case if row["decoder"].startswith("ours") == is_ours] for is_ours in (True, False))
        if ours and theirs:
            best = {key: [min(row[key] for row in side) for side in (theirs, ours)] for key in ("ms", "MB")}
            text = [f"{best['ms'][0] / best['ms'][1]:.2f}x the speed"]
            if best["MB"][1] > 0:
                text.append(f"{100 * best['MB'][1] / best['MB'][0]:.0f}% of the memory")
            device, model, threads, mode, dtype, size, batch = case
            where = f"{device}, {threads} threads" if device == "cpu" else device
            name = f"{model}, {where}, {mode}, {dtype}, {size}x{size}, batch {batch}, ours against the best peer"
            found[name] = ", ".join(text)
    return found


if __name__ == "__main__":
    main()
