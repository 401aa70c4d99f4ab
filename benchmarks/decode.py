"""Time and memory of a whole decode and of a training step: ours against every peer.

    python benchmarks/decode.py --out benchmarks/results/decode

The decoder is Kandinsky 2.x's (52.8 million parameters) with random weights, the same in every peer. Each peer runs in a separate
process. Its result is checked against the published decoder in float32 first; then the peers are timed in turns, for several
rounds. "ms" is the median of the rounds and "spread" their ``(largest - smallest) / median``. A training step is a forward and a
backward pass, with gradients for the latents and for all parameters of the decoder.

"MB" is the peak memory of the second call beyond what was in use before it. "kept MB" is what the first call left behind in
tensors besides weights and latents, such as packed weights. "of roofline" divides a lower bound of the time by the measured time:
the operations of the published convolutions at the faster of two measured rates (a matrix product and a 3x3 convolution in that
dtype), plus the bytes of the norms at the rate of a copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import KINDS, peer, save_random
from plots import draw
from timing import convolution_rate, copy_bandwidth, environment, matmul_rate, milliseconds, peak_megabytes, summary, write
from torch import Tensor, nn
from work import Work, work

import movq_ext

TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2, "float16": 1e-2}
CASE = ("device", "mode", "dtype", "size", "batch")
MEASURED = ("ms", "spread", "MB", "kept MB", "images/s", "of roofline")


def measured_function(mode: str, model: nn.Module, decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function to measure. It maps the latents to the image or, in training, to their gradient."""
    if mode == "decode":
        return decode
    parameters = [p for name, p in model.named_parameters() if name.split(".")[0] in ("decoder", "post_quant_conv")]

    def train(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(decode(z).float().square().mean(), [z, *parameters])[0]

    return train


def run_peer(options: argparse.Namespace) -> None:
    """Check one peer, then time it once for every line on stdin. Runs in a separate process, and answers in JSON lines."""
    device, dtype = torch.device(options.device[0]), getattr(torch, options.dtype)
    torch.set_grad_enabled(options.mode == "train")
    torch.manual_seed(0)
    z = torch.randn(options.batch, 4, options.size // 8, options.size // 8)
    expected = None
    if options.size <= 512:
        model, decode = peer("published", options.folder, device, torch.float32)
        expected = measured_function(options.mode, model, decode)(z.to(device)).cpu()
        del model, decode
    z = z.to(device, dtype)
    model, decode = peer(options.peer, options.folder, device, dtype)
    model.train(options.mode == "train")
    step = measured_function(options.mode, model, decode)
    loaded = tensor_megabytes(device)
    out = step(z)
    if expected is not None:
        error = float((out.float().cpu() - expected).norm() / expected.norm())
        # TF32 has float16's 10 bits of mantissa.
        by_tf32 = options.dtype == "float32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
        tolerance = TOLERANCE["float16" if by_tf32 else options.dtype] * (3 if options.mode == "train" else 1)
        if not error < tolerance:
            answer({"failed": f"wrong: {error:.1e}"})
            return
    del out
    kept = tensor_megabytes(device) - loaded
    del expected
    answer({"MB": peak_megabytes(lambda: step(z), device), "kept MB": kept})
    for _ in sys.stdin:
        answer({"ms": milliseconds(lambda: step(z), device, options.seconds)})
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the other peers share the GPU


def answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def tensor_megabytes(device: torch.device) -> float:
    """Return the memory of tensors: on a GPU all allocations, on a CPU the tensors that Python can reach."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 1e6
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.device == device]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.layout == torch.strided}
    # Tensors in a layout of oneDNN have no storage.
    packed: float = sum(x.numel() * x.element_size() for x in tensors if x.layout != torch.strided)
    return (float(sum(storages.values())) + packed) / 1e6


class PeerProcess:
    """A peer in a separate process, which is ready once it has checked its result.

    Attributes:
        found: ``MB``, ``kept MB`` and the ``ms`` of every round; or why it ``failed``.
    """

    def __init__(self, name: str, options: argparse.Namespace, **case: Any) -> None:
        self.name, self.found = name, {"ms": []}
        arguments = [f"--peer={name}", f"--folder={options.folder}", f"--seconds={options.seconds}"]
        arguments += [f"--{key}={value}" for key, value in case.items()]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def receive(self, deadline: float) -> None:
        """Wait for the next answer, at most 10 minutes and not past the deadline."""
        assert self._process.stdout is not None
        limit = min(600.0, deadline - time.monotonic())
        if limit <= 0 or not select.select([self._process.stdout], [], [], limit)[0]:
            self._fail("no time" if limit <= 0 else f"over {limit:.0f} s")
        elif line := self._process.stdout.readline():
            message = json.loads(line)
            if "ms" in message:
                self.found["ms"].append(message["ms"])
            else:
                self.found |= message
        else:
            self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["died"])[-1]
            self._fail("out of memory" if "OutOfMemory" in last or (self._process.returncode or 0) < 0 else last[:60])

    def measure(self, deadline: float) -> None:
        """Time one round, unless the peer has failed."""
        if "failed" not in self.found:
            assert self._process.stdin is not None
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            self.receive(deadline)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _fail(self, reason: str) -> None:
        if not self.found["ms"]:  # keep the rounds measured so far
            self.found["failed"] = reason
        self._process.kill()


def measure_case(names: Sequence[str], options: argparse.Namespace, deadline: float, **case: Any) -> dict[str, dict[str, Any]]:
    """Return the results of each peer. Peers are prepared one after the other, and then take turns."""
    peers = []
    try:
        for name in names:
            peers.append(PeerProcess(name, options, **case))
            peers[-1].receive(deadline)
        for _ in range(options.rounds):
            for one in peers:
                one.measure(deadline)
    finally:
        for one in peers:
            one.close()
    return {one.name: one.found for one in peers}


def peers_of(options: argparse.Namespace, mode: str, cuda: bool) -> list[str]:
    if options.peers or options.quick:
        return options.peers or list(KINDS)
    variants = ["", " nhwc", " compiled", " compiled nhwc", *([" frozen nhwc"] if mode == "decode" and not cuda else [])]
    return [f"{kind}{variant}" for variant in variants for kind in KINDS]


def measure_device(
    device: torch.device, options: argparse.Namespace, deadline: float, rows: list[dict[str, Any]], works: dict[str, Work]
) -> dict[str, Any]:
    """Add a row for every decoder and case, and the work of every size. Returns the head's entries for the device."""
    cuda = device.type == "cuda"
    bandwidth = copy_bandwidth(device)
    head = {**environment(device), "copy bandwidth, GB/s": bandwidth / 1e9, "rounds": options.rounds}
    for dtype in options.dtypes or (["bfloat16", "float16", "float32"] if cuda else ["float32"]):
        kind = getattr(torch, dtype)
        rates = {"matmul": matmul_rate(device, 8192 if cuda else 2048, kind)}
        rates["convolution"] = convolution_rate(device, 128 if cuda else 64, kind)
        head |= {f"{dtype} {name}, TFLOP/s": rate / 1e12 for name, rate in rates.items()}
        for size in options.sizes or ([64] if options.quick else [256, 512, 768, 1024, 2048] if cuda else [256]):
            found = works[str(size)] = work(movq_ext.from_pretrained(options.folder).decoder, size)
            operations = sum(found[part]["operations"] for part in ("convolution", "attention"))
            moved = found["norm"]["elements"] / 3
            for batch in options.batches or ([1, 8] if cuda and not options.quick else [1]):
                for mode in options.modes or (["decode", "train"] if cuda or options.quick else ["decode"]):
                    passes, maps = (1, 3) if mode == "decode" else (3, 8)
                    seconds = passes * operations / max(rates.values()) + maps * moved * kind.itemsize / bandwidth
                    case = dict(device=device, mode=mode, dtype=dtype, size=size, batch=batch)
                    names = peers_of(options, mode, cuda)
                    for name, result in measure_case(names, options, deadline, **case).items():
                        row = {**case, "device": device.type, "decoder": name, **dict.fromkeys(MEASURED, "-")}
                        row |= {key: result[key] for key in ("MB", "kept MB") if key in result}
                        if result["ms"]:
                            ms, spread = summary(result["ms"])
                            row |= {"ms": ms, "spread": spread, "images/s": 1e3 * batch / ms}
                            row["of roofline"] = 1e3 * batch * seconds / ms
                        else:
                            row["ms"] = result["failed"]
                        rows.append(row)
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = ("cuda", "cpu")
    parser.add_argument("--device", nargs="+", choices=devices, default=devices, help="a missing GPU gets a row that says so")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode"), help="folder for the results")
    parser.add_argument("--sizes", type=int, nargs="+", help="of the image; 256 on a CPU, 256 to 2048 on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, help="float32 on a CPU, all on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", help="1 on a CPU, 1 and 8 on a GPU")
    parser.add_argument("--modes", nargs="+", choices=("decode", "train"), help="both on a GPU, decode on a CPU")
    parser.add_argument("--peers", nargs="+", help="such as 'published compiled nhwc'; see peers.py")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each peer")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn; it has at least 3 calls")
    parser.add_argument("--minutes", type=float, default=60.0, help="end after this long")
    parser.add_argument("--quick", action="store_true", help="rehearse: a small decoder and few peers")
    for name, kind in (("peer", str), ("folder", Path), ("size", int), ("batch", int), ("dtype", str), ("mode", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        run_peer(options)
        return
    deadline = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    head: dict[str, Any] = {}
    works: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        save_random(options.folder, small=options.quick)
        for device in options.device:
            if device == "cuda" and not torch.cuda.is_available():
                missing: dict[str, Any] = dict.fromkeys((*CASE, "decoder", *MEASURED), "-")
                rows.append({**missing, "device": device, "ms": "missing: no GPU"})
                continue
            found = measure_device(torch.device(device), options, deadline, rows, works)
            shared = ("date", "torch", "movq_ext", "commit")
            head |= {key if key in shared else f"{device}: {key}": value for key, value in found.items()}
    head |= ratios(rows)
    head["work"] = works
    write(options.out, "decode", "Decoding and training steps", head, rows)
    print(f"figures: {draw(options.out)}")


def ratios(rows: list[dict[str, Any]]) -> dict[str, str]:
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
            device, mode, dtype, size, batch = case
            found[f"{device}, {mode}, {dtype}, {size}x{size}, batch {batch}, ours against the best peer"] = ", ".join(text)
    return found


if __name__ == "__main__":
    main()
