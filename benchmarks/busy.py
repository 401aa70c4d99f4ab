"""Time of a decode on a CPU beside other busy processes: ours against diffusers'.

    python benchmarks/busy.py --out benchmarks/results/busy_cpu

0, 1 and 3 other processes multiply matrices with one thread each. Beside them, these decoders take turns, each in a process of
its own: ours, in which a thread computes whole strips; ours with threads inside every operator; and diffusers' VQModel in
channels_last, eager and compiled. With --shipped they decode with the shipped model, whose small maps ours computes inside
operators. The peers are then those of the published code, since diffusers cannot read it.

"ms" is the median of the rounds, "spread" their ``(largest - smallest) / median``, and "slowdown" divides the median by the
decoder's own without other processes. The results are written after each number of processes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peer_process import PeerProcess, take_turns
from peers import save_random
from timing import environment, summary, write

from movq_ext.demo import SMALL_MODEL_PATH

PEERS = ("ours", "ours in-operators", "diffusers nhwc", "diffusers compiled nhwc")
SHIPPED_PEERS = ("ours", "published nhwc", "published compiled nhwc")
BUSY = (0, 1, 3)
SPIN = """
import torch
torch.set_num_threads(1)
a = torch.ones(256, 256)
print(flush=True)
while True:
    a @ a
"""


class BusyProcesses:
    """Context manager: this many processes that keep one core busy each."""

    def __init__(self, count: int) -> None:
        self.count, self._processes = count, list[subprocess.Popen[str]]()

    def __enter__(self) -> None:
        for _ in range(self.count):
            self._processes.append(subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE, text=True))
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()  # it has started to multiply

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def rows_of(busy: int, results: dict[str, dict[str, Any]], idle: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row for every decoder.

    Args:
        busy: number of busy processes.
        results: what each decoder's process found.
        idle: median of each decoder without busy processes. The first call fills it.
    """
    rows = []
    for name, found in results.items():
        row: dict[str, Any] = {"busy processes": busy, "decoder": name, "ms": found.get("failed", "not timed"), "spread": "-",
                               "rounds": len(found["ms"]), "slowdown": "-"}  # fmt: skip
        if found["ms"]:
            row["ms"], row["spread"] = summary(found["ms"])
            if busy == 0:
                idle[name] = row["ms"]
            if name in idle:
                row["slowdown"] = row["ms"] / idle[name]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/busy_cpu"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="rehearse: a small model and one round")
    parser.add_argument("--shipped", action="store_true", help="decode with the shipped model, not a random Kandinsky 2.x")
    parser.add_argument("--peers", nargs="+", help="decoders, see peers.py")
    parser.add_argument("--busy", type=int, nargs="+", default=BUSY, help="numbers of busy processes; 0 first, for the slowdown")
    parser.add_argument("--size", type=int, default=128, help="height and width of the image")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each decoder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0, help="start no measurement after this long")
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds = 64, 1
    deadline = time.monotonic() + 60 * options.minutes
    model = "shipped" if options.shipped else "kandinsky"
    settings = {"model": model, "dtype": options.dtype, "size": options.size, "threads": options.threads}
    head = {**environment(torch.device("cpu")), **settings}
    rows: list[dict[str, Any]] = []
    idle: dict[str, float] = {}
    peers: list[PeerProcess] = []
    with tempfile.TemporaryDirectory() as temporary:
        weights = SMALL_MODEL_PATH if options.shipped else Path(temporary) / "model"
        if not options.shipped:
            save_random(weights, small=options.quick)
        case = {"device": "cpu", "mode": "decode", "dtype": options.dtype, "size": options.size, "batch": 1}
        try:
            for name in options.peers or (SHIPPED_PEERS if options.shipped else PEERS):
                peers.append(PeerProcess(name, weights, Path(temporary) / "expected.pt", 0.0, options.threads, **case))
                peers[-1].receive(deadline)
            for busy in options.busy:
                for peer in peers:
                    peer.found["ms"] = []
                with BusyProcesses(busy):
                    take_turns(peers, options.rounds, deadline)
                rows += rows_of(busy, {peer.name: peer.found for peer in peers}, idle)
                write(options.out, "busy", "Decodes beside busy processes", head, rows)
        finally:
            for peer in peers:
                peer.close()
    print((options.out / "busy.md").read_text())


if __name__ == "__main__":
    main()
