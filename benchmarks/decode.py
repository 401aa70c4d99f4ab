"""Time and memory of a whole decode and of a training step: ours against every peer.

    python benchmarks/decode.py --out benchmarks/results/decode
    python benchmarks/decode.py --plan cpu --compile-only  # fills the compiler's cache: the next lines take less time
    python benchmarks/decode.py --plan cpu --out benchmarks/results/decode_cpu --minutes 20
    python benchmarks/decode.py --plan cpu --out benchmarks/results/decode_cpu --minutes 20 --resume  # repeat this

A model is "kandinsky", Kandinsky 2.x's decoder (52.8 million parameters) with random weights, or "shipped", the small one in this
package. The weights are the same in every peer; diffusers cannot read the shipped ones. Each peer runs in a separate process. Its
result is checked against the published decoder in float32 first, for up to 512x512 pixels in a batch; then the peers are timed in
turns, for several rounds. A turn has at least one call. If a call of any peer takes less than 1.5 s, all turns of that case start
with an untimed call, since another peer's process leaves the caches cold. "ms" is the median of the rounds and "spread" their
``(largest - smallest) / median``. A training step is a forward and a backward pass, with gradients for the latents and for all
parameters of the decoder.

"MB" is the peak memory of a second call beyond what was in use before it. On a CPU it is measured in a process that returns
freed memory at once. A plan's case with one round times the second call. "kept MB" counts the tensors that the first call left
behind, such as packed weights, but not weights and latents. "of roofline" divides a lower bound of the time by the measured time:
the operations of the published convolutions at the faster of two measured rates (a matrix product and a 3x3 convolution in that
dtype), plus the bytes of the norms at the rate of a copy. It may exceed 1, since ours takes fewer operations.

The results are written after every case, so an interrupted run keeps its finished cases. ``--resume`` adds to the results in
``--out``, on the same machine with the same versions, ``--seconds`` and ``--quick``. It measures the cases in which a peer is
missing or ran out of time. A new row replaces the same peer's row, unless the new one has fewer rounds. "failed" says why a peer
stopped early; the rounds before that count. Each row has its own date and commit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from decode_plan import PLANS, Case, Measurement, readable_shipped
from peer_process import NO_TIME, TOLERANCE, PeerProcess, take_turns
from peers import KINDS, save_random
from plots import draw
from tables import CASE, compared_cases
from timing import convolution_rate, copy_bandwidth, environment, matmul_rate, summary, write
from work import work

import movq_ext
from movq_ext.demo import SMALL_MODEL_PATH

MEASURED = ("ms", "spread", "rounds", "failed", "MB", "kept MB", "images/s", "of roofline", "date", "commit")
MODELS = ("kandinsky", "shipped")
COMPARISON = "ours against the best peer"


def chosen_measurements(options: argparse.Namespace) -> list[Measurement]:
    """Return what to measure: a plan's cases or every combination of the options. `changed` applies the other options."""
    if options.plan:
        plan = PLANS[options.plan]
        chosen = [plan[number - 1] for number in options.cases or range(1, len(plan) + 1)]
    else:
        chosen = [Measurement(case, default_peers(case), options.rounds) for case in combinations(options)]
    return list(dict.fromkeys(changed(measurement, options) for measurement in chosen))


def combinations(options: argparse.Namespace) -> Iterator[Case]:
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


def default_peers(case: Case) -> tuple[str, ...]:
    variants = ["", " nhwc", " compiled", " compiled nhwc"]
    if case.mode == "decode" and case.device == "cpu":
        variants.append(" frozen nhwc")
    return tuple(f"{kind}{variant}" for variant in variants for kind in KINDS)


def changed(measurement: Measurement, options: argparse.Namespace) -> Measurement:
    """Apply --quick, --peers and --rounds to a measurement: a small case, the given peers and at most so many rounds."""
    case, peers, rounds = measurement
    if options.quick:
        # With one thread: two would wait for each other on a busy machine.
        size = min(case.size, 64) + 32 * (case.size > 256)
        case, peers, rounds = case._replace(threads=1, size=size, batch=min(case.batch, 2)), KINDS, options.rounds
    peers = tuple(options.peers or peers)
    return Measurement(case, readable_shipped(peers) if case.model == "shipped" else peers, min(rounds, options.rounds))


def measure_peers(
    measurement: Measurement, options: argparse.Namespace, folder: Path, deadline: float
) -> dict[str, dict[str, Any]]:
    """Return the results of each peer. Peers are prepared one after the other, and then take turns."""
    case, peers, rounds = measurement
    arguments = case._asdict()
    weights = folder if arguments.pop("model") == "kandinsky" else SMALL_MODEL_PATH
    expected = folder / f"expected-{case.device}-{case.model}-{case.mode}-{case.size}-{case.batch}.pt"
    if options.compile_only:
        peers = tuple(name for name in peers if {"compiled", "frozen"} & set(name.split()))
    processes: list[PeerProcess] = []
    try:
        # The first writes the expected result. On a GPU, whose time is short, the others are prepared at once.
        for names in [peers[:1], peers[1:]] if case.device == "cuda" else [(name,) for name in peers]:
            prepared = len(processes)
            for name in names:
                processes.append(PeerProcess(name, weights, expected, options.seconds, **arguments))
            for one in processes[prepared:]:
                one.receive(deadline)
                print(case, one.name, one.found, file=sys.stderr)
        if options.plan and rounds == 1:
            for one in processes:
                one.found["ms"] = [one.found["second call ms"]] if "second call ms" in one.found else []
        elif not options.compile_only:
            take_turns(processes, rounds, deadline)
    finally:
        for one in processes:
            one.close()
    return {one.name: one.found for one in processes}


def rows_of(case: Case, results: dict[str, dict[str, Any]], seconds: float, dated: dict[str, str]) -> list[dict[str, Any]]:
    """Return a row for every decoder.

    Args:
        case: what was measured.
        results: of `measure_peers`.
        seconds: lower bound of the time for one image.
        dated: date and commit.
    """
    rows = []
    for name, result in results.items():
        row = {**case._asdict(), "decoder": name, **dict.fromkeys(MEASURED, "-"), "rounds": len(result["ms"]), **dated}
        row |= {key: result[key] for key in ("failed", "MB", "kept MB") if key in result}
        if result["ms"]:
            ms, spread = summary(result["ms"])
            row |= {"ms": ms, "spread": spread, "images/s": 1e3 * case.batch / ms}
            row["of roofline"] = 1e3 * case.batch * seconds / ms
        rows.append(row)
    return rows


class Limits:
    """Measured rates of the devices and counted work of the models: the lower bounds of the times.

    Args:
        weights: of each model.
        head, work: those of the run that this one resumes.
    """

    def __init__(self, weights: dict[str, Path], head: dict[str, Any], work: dict[str, Any]) -> None:
        self.weights, self.head, self.work = weights, head, work
        self.dated: dict[str, str] = {}  # date and commit, once `seconds` was called

    def seconds(self, case: Case) -> float:
        """Return the lower bound for one image, and add the rates to the head and the work of this size."""
        device, cuda = torch.device(case.device), case.device == "cuda"
        where = case.device if cuda else f"{case.device}, {case.threads} threads"
        if not cuda:
            torch.set_num_threads(case.threads)
        found = json.loads(json.dumps(environment(device), default=str))
        found.pop("threads", None)
        self.dated = {key: found.pop(key) for key in ("date", "commit")}
        for key, value in found.items():
            record(self.head, key if key in ("torch", "movq_ext") else f"{case.device}: {key}", value)
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


def record(head: dict[str, Any], name: str, value: Any) -> None:
    """Add a value to the head. Raises SystemExit if the resumed run had another value."""
    if (before := head.setdefault(name, value)) != value:
        raise SystemExit(f"--resume needs the environment and settings of the earlier run: expected {name} {before}, got {value}")


def earlier_report(path: Path) -> dict[str, Any]:
    """Return the report to resume, or an empty one if there is none. Raises SystemExit if an older version wrote it."""
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": [], "work": {}}
    columns = [*CASE, "decoder", *MEASURED]
    for row in report["rows"]:
        if list(row) != columns:
            raise SystemExit(f"--resume cannot add to the older report {path}: expected the columns {columns}, got {list(row)}")
    return report


def main() -> None:
    options = parsed_options()
    deadline = time.monotonic() + 60 * options.minutes
    earlier = earlier_report(options.out / "decode.json") if options.resume else {"rows": [], "work": {}}
    rows, work = earlier.pop("rows"), earlier.pop("work")
    head = {key: value for key, value in earlier.items() if not key.endswith(COMPARISON)}
    record(head, "rehearsal (--quick)", options.quick)
    record(head, "seconds of a turn (--seconds)", options.seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random(folder, small=options.quick)
        limits = Limits({"kandinsky": folder, "shipped": SMALL_MODEL_PATH}, head, work)
        for measurement in chosen_measurements(options):
            case = measurement.case
            if is_finished(measurement, rows):
                continue
            if case.device == "cuda" and not torch.cuda.is_available():
                missing = {**dict.fromkeys((*CASE, "decoder", *MEASURED), "-"), "device": case.device, "failed": "no GPU"}
                rows = merged(rows, [missing])
            elif options.compile_only:
                measure_peers(measurement, options, folder, deadline)
            elif time.monotonic() < deadline:
                seconds = limits.seconds(case)
                found = rows_of(case, measure_peers(measurement, options, folder, deadline), seconds, limits.dated)
                rows = merged(rows, found)
                save(options.out, limits, rows)
    if not options.compile_only:
        save(options.out, limits, rows)
        print(f"figures: {draw(options.out)}")


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = ("cuda", "cpu")
    parser.add_argument("--plan", choices=PLANS, help="measure a list of cases instead of every combination of the options below")
    parser.add_argument("--cases", type=int, nargs="+", metavar="N", help="of the plan, from 1 on; all if none is given")
    parser.add_argument("--device", nargs="+", choices=devices, default=devices, help="a missing GPU gets a row that says so")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:1], help="kandinsky")
    parser.add_argument("--threads", type=int, nargs="+", help="of operators on a CPU; PyTorch's default")
    parser.add_argument("--sizes", type=int, nargs="+", help="of the image; 256 on a CPU, 256 to 2048 on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, help="float32 on a CPU, all on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", help="1 on a CPU, 1 and 8 on a GPU")
    parser.add_argument("--modes", nargs="+", choices=("decode", "train"), help="both on a GPU, decode on a CPU")
    parser.add_argument("--peers", nargs="+", help="such as 'published compiled nhwc'; see peers.py")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each peer; a plan's large images get fewer")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn; it has at least one call")
    parser.add_argument("--minutes", type=float, default=60.0, help="end after this long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode"), help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="keep the results in --out, and measure what they lack")
    parser.add_argument("--compile-only", action="store_true", help="run every compiled peer of every case, and write nothing")
    parser.add_argument("--quick", action="store_true", help="rehearse: small decoders, images and batches, and few peers")
    options = parser.parse_args()
    if options.cases and (not options.plan or not set(options.cases) <= set(range(1, len(PLANS[options.plan]) + 1))):
        parser.error(f"--cases needs numbers of a plan's cases (cpu has 1 to {len(PLANS['cpu'])}), got {options.cases}")
    return options


def is_finished(measurement: Measurement, rows: Sequence[dict[str, Any]]) -> bool:
    """True if every peer has all its rounds or failed. A failure in any round is final, except for a lack of time."""
    found = {row["decoder"]: row for row in rows if case_of(row) == measurement.case}
    of_peers = [found.get(name) for name in measurement.peers]
    return all(row and (row["rounds"] >= measurement.rounds or row["failed"] not in ("-", NO_TIME)) for row in of_peers)


def merged(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows in the order of the plans, since documents and figures show the first case. Other cases follow.

    A found row replaces the row of the same case and decoder, unless it has fewer rounds or only says that there was no time.
    """
    kept = {(case_of(row), row["decoder"]): row for row in rows}
    for row in found:
        before = kept.setdefault((case_of(row), row["decoder"]), row)
        if (row["rounds"], row["failed"] != NO_TIME) >= (before["rounds"], before["failed"] != NO_TIME):
            kept[case_of(row), row["decoder"]] = row
    order = {measurement.case: number for plan in PLANS.values() for number, measurement in enumerate(plan)}
    return sorted(kept.values(), key=lambda row: order.get(case_of(row), len(order)))


def case_of(row: dict[str, Any]) -> Case:
    return Case(*(row[key] for key in CASE))


def save(folder: Path, limits: Limits, rows: Sequence[dict[str, Any]]) -> None:
    head = {**limits.head, **ratios(rows), "work": limits.work}
    write(folder, "decode", "Decoding and training steps", head, rows)


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Compare our fastest decoder with the fastest peer, for every case."""
    found = {}
    for case, (ours, peer) in compared_cases(rows).items():
        text = [f"{peer['ms'] / ours['ms']:.2f}x the speed"]
        if ours["MB"] > 0:
            text.append(f"{100 * ours['MB'] / peer['MB']:.0f}% of the memory")
        device, model, threads, mode, dtype, size, batch = case
        where = f"{device}, {threads} threads" if device == "cpu" else device
        name = f"{model}, {where}, {mode}, {dtype}, {size}x{size}, batch {batch}, {COMPARISON}"
        found[name] = ", ".join(text)
    return found


if __name__ == "__main__":
    main()
