"""A peer of decode.py in a process of its own: it checks its result, then is timed for every line on stdin.

The line is ``warm`` if the turn starts with an untimed call, and else ``cold``. On a CPU another process measures the memory,
with settings of malloc that would change the times.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import peer
from timing import EXACT_MALLOC, milliseconds, needs_warm_up, peak_megabytes
from torch import Tensor, nn

TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2, "float16": 1e-2}
MAX_ANSWER_SECONDS = 1800.0  # for two calls here and two in the process that measures the memory
PR_SET_PDEATHSIG = 1  # of prctl, from linux/prctl.h
NO_TIME = "no time"


class PeerProcess:
    """A peer in a separate process, which is ready once it has checked its result.

    Args:
        name: of the peer, see peers.py.
        weights: of the model.
        expected: file of the published result, which the first peer of a case writes.
        seconds: length of a turn.
        threads: of its operators on a CPU.
        case: further options of `main`.

    Attributes:
        found: ``MB`` and ``second call ms``, ``kept MB``, and the ``ms`` of every round; or why it ``failed``.
    """

    def __init__(self, name: str, weights: Path, expected: Path, seconds: float, threads: int, **case: Any) -> None:
        self.name, self.found = name, {"ms": []}
        arguments = {"peer": name, "weights": weights, "expected": expected, "seconds": seconds, "threads": threads, **case}
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__, *(f"--{key}={value}" for key, value in arguments.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def receive(self, deadline: float) -> None:
        """Wait for the next answer, at most MAX_ANSWER_SECONDS and not past the deadline."""
        assert self._process.stdout is not None
        limit = min(MAX_ANSWER_SECONDS, deadline - time.monotonic())
        if limit <= 0 or not select.select([self._process.stdout], [], [], limit)[0]:
            self._fail(f"over {limit:.0f} s" if limit == MAX_ANSWER_SECONDS else NO_TIME)
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

    def measure(self, deadline: float, warm_up: bool) -> None:
        """Time one round, unless the peer has failed. warm_up: it starts with an untimed call."""
        if "failed" not in self.found:
            assert self._process.stdin is not None
            self._process.stdin.write("warm\n" if warm_up else "cold\n")
            self._process.stdin.flush()
            self.receive(deadline)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _fail(self, reason: str) -> None:
        self.found["failed"] = reason  # the rounds measured so far still count
        self._process.kill()


def take_turns(peers: Sequence[PeerProcess], rounds: int, deadline: float) -> None:
    """Time the peers in turns, once in every round."""
    warm_up = needs_warm_up(one.found["second call ms"] for one in peers if "second call ms" in one.found)
    for _ in range(rounds):
        for one in peers:
            one.measure(deadline, warm_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (
        *(("peer", str), ("weights", Path), ("expected", Path), ("device", str), ("dtype", str), ("mode", str)),
        *(("size", int), ("batch", int), ("threads", int), ("seconds", float)),
    ):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--peak", action="store_true", help="only measure the memory of a second call")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(options.mode == "train")
    torch.manual_seed(0)
    z = torch.randn(options.batch, 4, options.size // 8, options.size // 8)
    is_checked = options.batch * options.size**2 <= 512**2 and not options.peak
    expected = expected_result(options, z) if is_checked else None
    z = z.to(device, dtype)
    model, decode = peer(options.peer, options.weights, device, dtype)
    model.train(options.mode == "train")
    step = measured_function(options.mode, model, decode)
    loaded, reserved = tensor_megabytes(device), reserved_megabytes(device)
    out = step(z)
    if options.peak:
        del out
        answer({"MB": peak_megabytes(lambda: step(z), device)})
        return
    if expected is not None:
        error = float((out.float().cpu() - expected).norm() / expected.norm())
        # TF32 has float16's 10 bits of mantissa.
        by_tf32 = options.dtype == "float32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
        tolerance = TOLERANCE["float16" if by_tf32 else options.dtype] * (3 if options.mode == "train" else 1)
        if not error < tolerance:
            answer({"failed": f"wrong: {error:.1e}"})
            return
    del out, expected
    kept = tensor_megabytes(device) - loaded
    found = {} if device.type == "cuda" else peak_in_another_process()
    start = time.perf_counter()
    if device.type == "cuda":
        found["MB"] = peak_megabytes(lambda: step(z), device)
        if "graph" in options.peer.split():  # its maps stay reserved between calls
            found["MB"] += reserved_megabytes(device) - reserved
    else:
        step(z)
    answer({**found, "second call ms": 1e3 * (time.perf_counter() - start), "kept MB": kept})
    for line in sys.stdin:
        warm_up = line.strip() == "warm"
        answer({"ms": milliseconds(lambda: step(z), device, options.seconds, min_calls=1, warm_up=warm_up)})
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the other peers share the GPU


def peak_in_another_process() -> dict[str, Any]:
    """Return the answer of this program with its own arguments and ``--peak``, or why it failed. It ends with this process."""
    command, environment = [sys.executable, __file__, *sys.argv[1:], "--peak"], {**os.environ, **EXACT_MALLOC}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, preexec_fn=end_with_parent)
    if done.returncode:
        return {"failed": "out of memory" if done.returncode < 0 else "the memory was not measured"}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def end_with_parent() -> None:
    """On Linux, have this process killed when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def expected_result(options: argparse.Namespace, z: Tensor) -> Tensor:
    """Return the published decoder's result in float32. The first peer of a case computes it, and the others read its file."""
    if not options.expected.exists():
        model, decode = peer("published", options.weights, torch.device(options.device), torch.float32)
        torch.save(measured_function(options.mode, model, decode)(z.to(options.device)).cpu(), options.expected)
    expected: Tensor = torch.load(options.expected)
    return expected


def measured_function(mode: str, model: nn.Module, decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function to measure. It maps the latents to the image or, in training, to their gradient."""
    if mode == "decode":
        return decode
    parameters = [p for name, p in model.named_parameters() if name.split(".")[0] in ("decoder", "post_quant_conv")]

    def train(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(decode(z).float().square().mean(), [z, *parameters])[0]

    return train


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


def reserved_megabytes(device: torch.device) -> float:
    """Return the memory that a GPU's allocator holds for tensors and graphs, or 0 for a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 1e6


if __name__ == "__main__":
    main()
