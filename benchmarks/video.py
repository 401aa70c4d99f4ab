"""Decodes of CogVideoX's autoencoder: diffusers eager, in channels_last_3d and compiled, against `movq_ext.accelerate`.

    python benchmarks/video.py --out benchmarks/results/video

The model has random weights and the published widths. The candidates are timed in turns, for several rounds: "ms" is the median,
"ratio" the median of the rounds' ratios of diffusers' time to the candidate's, and "spread" the ``(largest - smallest) / median``
of these. "norms" is the share of a decode that its spatial norms and activations take, timed call by call, and "error" the
relative difference to diffusers' clip. "MB" is the peak memory of a decode beyond what was in use, each in its own process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import diffusers
import torch
from timing import environment, milliseconds, peak_megabytes, summary, write
from torch import Tensor, nn

import movq_ext
from movq_ext.diffusers import cogvideox, video_norms

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
    decode = torch.compile(model.decode) if candidate == "compiled" else model.decode
    z = z.contiguous(memory_format=layout)
    return lambda: decode(z, return_dict=False)[0]


def measure(model: Any, z: Tensor, candidates: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    clips, shares = {}, {}
    for turn in range(rounds):
        for candidate in candidates:
            run = prepare(model, candidate, z)
            if turn == 0:
                clips[candidate] = run().float()  # compiles, too
                shares[candidate] = float("nan") if candidate == "compiled" else share_of_norms(run, z.device)
            times[candidate].append(milliseconds(run, z.device))
    rows = []
    for candidate in candidates:
        ratio, spread = summary([theirs / ours for theirs, ours in zip(times["diffusers"], times[candidate], strict=True)])
        error = float((clips[candidate] - clips["diffusers"]).norm() / clips["diffusers"].norm())
        row = {"candidate": candidate, "ms": median(times[candidate]), "ratio": ratio, "spread": spread}
        rows.append({**row, "norms": shares[candidate], "error": error})
    return rows


def share_of_norms(run: Callable[[], Tensor], device: torch.device) -> float:
    """Return the share of a call's time in spatial norms and activations."""
    norm3d = diffusers.models.autoencoders.autoencoder_kl_cogvideox.CogVideoXSpatialNorm3D
    ours = video_norms.CogVideoXSpatialNorm3D
    parts = [(norm3d, "forward"), (nn.SiLU, "forward"), (cogvideox, "_normalise"), (ours, "modulated")]
    with timed(parts, device) as spent:
        start = _now(device)
        run()
        return spent[0] / (_now(device) - start)


@contextmanager
def timed(functions: list[tuple[Any, str]], device: torch.device) -> Iterator[list[float]]:
    """Add the time spent in these functions to the first element of the yielded list; one inside another counts once."""
    spent, depth = [0.0], [0]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            start = _now(device)
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                spent[0] += 0.0 if depth[0] else _now(device) - start

        return call

    patches = [mock.patch.object(owner, name, wrap(getattr(owner, name))) for owner, name in functions]
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


def measure_peak(candidate: str, case: list[str]) -> float:
    """Return the peak memory of a decode in MB, from a process of its own."""
    command = [sys.executable, __file__, "--peak-of", candidate, *case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@torch.no_grad()
def print_peak(candidate: str, device: str, dtype: str, frames: str, height: str, width: str, widths: str) -> None:
    """Print the peak memory of the second decode in MB."""
    model = build_model(widths == "quick", device, dtype)
    z = latents(model, int(frames), int(height), int(width))
    run = prepare(model, candidate, z)
    run()
    print(peak_megabytes(run, z.device))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", nargs="+", type=int, default=[9, 17], help="of the decoded clips, 4 n + 1")
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES, choices=CANDIDATES, help="with diffusers always first")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every candidate")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="rehearse: a narrow model and small frames")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no measurement after this long")
    parser.add_argument("--peak-of", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(*options.peak_of)
        return
    start, rows = time.monotonic(), []
    candidates = ("diffusers", *(candidate for candidate in options.candidates if candidate != "diffusers"))
    for dtype in ("bfloat16", "float32") if options.device != "cpu" else ("float32",):
        model = build_model(options.quick, options.device, dtype)
        for height, width in ((16, 16),) if options.quick else SIZES:
            for frames in options.frames:
                if time.monotonic() - start > 60 * options.minutes:
                    continue
                case = [options.device, dtype, *map(str, (frames, height, width)), "quick" if options.quick else "published"]
                given = {"device": options.device, "dtype": dtype, "frames": frames, "size": f"{height}x{width}"}
                for row in measure(model, latents(model, frames, height, width), candidates, options.rounds):
                    rows.append({**given, **row, "MB": measure_peak(row["candidate"], case)})
    head = {**environment(torch.device(options.device)), "diffusers": diffusers.__version__}
    write(options.out, "video", "Decodes of AutoencoderKLCogVideoX with and without movq_ext.accelerate", head, rows)


if __name__ == "__main__":
    main()
