"""Decodes of CogVideoX's autoencoder: diffusers eager, in channels_last_3d and compiled, against `movq_ext.accelerate`.

    python benchmarks/video.py --compile-only  # fills the compiler's cache: the next line takes less time
    python benchmarks/video.py --out benchmarks/results/video_cpu --minutes 17
    python benchmarks/video_plot.py benchmarks/results/video_cpu

The model has random weights and the published widths; "compiled" has its decoder compiled. The candidates take turns, one decode
each in a round, and rounds go through all clips until the minutes are over: large clips get fewer "rounds". "ms" is the median,
"ratio" the median of the rounds' ratios of diffusers' time to the candidate's, and "spread" the ``(largest - smallest) / median``
of these. "MB" is the median peak memory of a decode beyond what was in use. "norms" (with activations), "convolutions" (causal
ones, with padding) and "upsampling" are shares of a decode's time, measured call by call; not in a compiled program. "error" is
the relative difference to diffusers' clip.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import diffusers
import torch
from timing import environment, peak_megabytes, summary, write
from torch import Tensor, nn

import movq_ext
from movq_ext.diffusers import causal_convolution, cogvideox, video_norms

QUICK = {"block_out_channels": (32, 64), "layers_per_block": 1}
SIZES = ((96, 96), (128, 192))  # height and width in pixels
CANDIDATES = ("diffusers", "channels_last_3d", "compiled", "movq_ext")


def build_model(quick: bool, device: str, dtype: str) -> Any:
    torch.manual_seed(0)
    levels = 2 if quick else 4
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * levels, "up_block_types": ("CogVideoXUpBlock3D",) * levels}
    model: Any = diffusers.AutoencoderKLCogVideoX(**blocks, **(QUICK if quick else {}))
    return model.eval().to(device, getattr(torch, dtype))


def latents(model: Any, frames: int, height: int, width: int) -> Tensor:
    """Return random latents of a clip of so many frames and pixels."""
    scale = 2 ** (len(model.config.block_out_channels) - 1)
    size = (1, model.config.latent_channels, (frames + 3) // 4, height // scale, width // scale)
    return torch.randn(size, device=model.device, dtype=model.dtype)


def prepare(model: Any, candidate: str, z: Tensor) -> Callable[[], Tensor]:
    """Change the model into the candidate, and return a call that decodes z."""
    layout = torch.channels_last_3d if candidate == "channels_last_3d" else torch.contiguous_format
    for parameter in model.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    (movq_ext.accelerate if candidate == "movq_ext" else movq_ext.restore)(model)
    compiled = model.__dict__.setdefault("compiled_decoder", torch.compile(model.decoder._call_impl, dynamic=False))
    model.decoder._compiled_call_impl = compiled if candidate == "compiled" else None
    z = z.contiguous(memory_format=layout)
    return lambda: model.decode(z, return_dict=False)[0]


def measure(run: Callable[[], Tensor], device: torch.device, by_part: bool) -> dict[str, Any]:
    """Return the time and the peak memory of a call, the share of each part in its time, and its result."""
    clips, spent = list[Tensor](), dict.fromkeys(parts(), float("nan"))
    start, end = 0.0, 0.0

    def call() -> None:
        nonlocal start, end
        start = _now(device)
        clips.append(run())
        end = _now(device)

    if by_part:
        with timed(parts(), device) as spent:
            peak = peak_megabytes(call, device)
    else:
        peak = peak_megabytes(call, device)
    seconds = end - start
    return {
        "ms": 1e3 * seconds,
        "MB": peak,
        **{part: own / seconds for part, own in spent.items()},
        "clip": clips[0].float().cpu(),
    }


def parts() -> dict[str, list[tuple[Any, str]]]:
    """Return the functions of diffusers and ours that compute each part of a decoder."""
    theirs: Any = diffusers.models.autoencoders.autoencoder_kl_cogvideox
    norms = [(theirs.CogVideoXSpatialNorm3D, "forward"), (nn.SiLU, "forward"), (cogvideox, "_normalise")]
    return {
        "norms": [*norms, (video_norms.CogVideoXSpatialNorm3D, "modulated")],
        "convolutions": [
            (theirs.CogVideoXCausalConv3d, "forward"),
            (cogvideox, "causal_convolution"),
            (causal_convolution.CausalConv3d, "forward"),
        ],
        "upsampling": [(theirs.CogVideoXUpsample3D, "forward"), (cogvideox.CogVideoXUpsample3D, "forward")],
    }


@contextmanager
def timed(functions: dict[str, list[tuple[Any, str]]], device: torch.device) -> Iterator[dict[str, float]]:
    """Add the time spent in each part's functions to the yielded dict; what another calls counts for that one only."""
    spent, depth = dict.fromkeys(functions, 0.0), 0

    def wrap(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            start = _now(device)
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                spent[part] += 0.0 if depth else _now(device) - start

        return call

    patches = [
        mock.patch.object(owner, name, wrap(part, getattr(owner, name)))
        for part, found in functions.items()
        for owner, name in found
    ]
    for patch in patches:
        patch.start()
    try:
        yield spent
    finally:
        for patch in patches:
            patch.stop()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Case:
    """A clip of random latents, and what was measured of its decodes.

    Args:
        model: see `build_model`.
        candidates: with diffusers first.
        size: frames, height and width of the clip.
    """

    def __init__(self, model: Any, candidates: tuple[str, ...], size: tuple[int, int, int]) -> None:
        self.model, self.candidates, self.size = model, candidates, size
        self.z = latents(model, *size)
        self.measured: dict[str, list[dict[str, Any]]] = {candidate: [] for candidate in candidates}
        self.errors: dict[str, float] = {}
        self.seconds = 0.0  # of its last round

    def compile(self) -> None:
        if "compiled" in self.candidates:
            prepare(self.model, "compiled", self.z)()

    def measure_round(self) -> None:
        """Decode once with each candidate."""
        start, theirs = time.monotonic(), torch.empty(0)
        for candidate in self.candidates:
            result = measure(prepare(self.model, candidate, self.z), self.z.device, by_part=candidate != "compiled")
            clip = result.pop("clip")
            theirs = clip if candidate == "diffusers" else theirs
            self.errors[candidate] = float((clip - theirs).norm() / theirs.norm())
            self.measured[candidate].append(result)
        self.seconds = time.monotonic() - start

    def rows(self) -> Iterator[dict[str, Any]]:
        frames, height, width = self.size
        for candidate, results in self.measured.items():
            if results:
                pairs = zip(self.measured["diffusers"], results, strict=True)
                ratio, spread = summary([theirs["ms"] / ours["ms"] for theirs, ours in pairs])
                row = {"frames": frames, "size": f"{height}x{width}", "candidate": candidate, "rounds": len(results)}
                middle = {key: median(result[key] for result in results) for key in results[0]}
                row |= {"ms": middle.pop("ms"), "ratio": ratio, "spread": spread} | middle
                yield {**row, "error": self.errors[candidate]}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", nargs="+", type=int, default=[9, 17], help="of the decoded clips, 4 n + 1")
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES, choices=CANDIDATES, help="diffusers is always one")
    parser.add_argument("--rounds", type=int, default=5, help="of every clip, at most")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="rehearse: a narrow model and small frames")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no round that would end after this long")
    parser.add_argument("--compile-only", action="store_true", help="compile for every clip, and measure nothing")
    options = parser.parse_args()
    start, rows = time.monotonic(), []
    candidates = ("diffusers", *(candidate for candidate in options.candidates if candidate != "diffusers"))
    for dtype in ("bfloat16", "float32") if options.device != "cpu" else ("float32",):
        model = build_model(options.quick, options.device, dtype)
        sizes = [(frames, *size) for size in (((16, 16),) if options.quick else SIZES) for frames in options.frames]
        cases = [Case(model, candidates, size) for size in sizes]
        for case in cases:
            case.compile()
            print(f"{case.size} is compiled after {time.monotonic() - start:.0f} s", file=sys.stderr)
        seconds_per_pixel = 0.0
        for _ in range(0 if options.compile_only else options.rounds):
            for case in cases:
                if time.monotonic() - start + seconds_per_pixel * prod(case.size) < 60 * options.minutes:
                    case.measure_round()
                    seconds_per_pixel = case.seconds / prod(case.size)
                    print(f"{case.size} took {case.seconds:.0f} s", file=sys.stderr)
        rows += [{"dtype": dtype, **row} for case in cases for row in case.rows()]
    if options.compile_only:
        return
    head = {**environment(torch.device(options.device)), "diffusers": diffusers.__version__}
    write(options.out, "video", "Decodes of AutoencoderKLCogVideoX with and without movq_ext.accelerate", head, rows)


if __name__ == "__main__":
    main()
