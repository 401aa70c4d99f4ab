"""Peak memory of a decode of CogVideoX's autoencoder: diffusers, `movq_ext.accelerate`, and strips with `decode_clip_tiled`.

    python benchmarks/video_memory.py --out benchmarks/results/video_memory

The model has random weights and the published widths. Each decode runs in a separate process. "MB" is the peak memory beyond what
was in use before the decode, so without the interpreter, torch and the weights. "error" is the relative difference to diffusers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from timing import EXACT_MALLOC, environment, peak_megabytes, write
from torch import Tensor
from video import build_model, latents

import movq_ext

SIZES = ("9x96x96", "17x96x96", "9x128x192", "17x128x192")


@torch.no_grad()
def measure_one(way: str, size: str, quick: bool, device: str, save: Path) -> float:
    """Decode random latents in one way and save the clip. Returns the peak in MB."""
    model, (frames, height, width) = build_model(quick, device, "float32"), map(int, size.split("x"))
    z, clips = latents(model, frames, height, width), list[Tensor]()
    if way == "movq_ext":
        movq_ext.accelerate(model)

    def decode() -> None:
        whole = way in ("diffusers", "movq_ext")
        clips.append(model.decode(z).sample if whole else movq_ext.decode_clip_tiled(model, z, max_memory=int(way) << 20))

    peak = peak_megabytes(decode, z.device)
    torch.save(clips[0].cpu(), save)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video_memory"), help="folder for the results")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="frames x height x width of the clips")
    parser.add_argument("--max-memory", nargs="+", type=int, default=[256, 128], help="memory for strips, in MiB")
    parser.add_argument("--quick", action="store_true", help="rehearse: a narrow model")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(*options.one, options.quick, options.device, options.save)))
        return
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            for way in ("diffusers", "movq_ext", *map(str, options.max_memory)):
                save = Path(folder) / f"{way}.pt"
                command = [sys.executable, __file__, "--one", way, size, f"--save={save}", f"--device={options.device}"]
                command += ["--quick"] if options.quick else []
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **EXACT_MALLOC})
                theirs, clip = torch.load(Path(folder) / "diffusers.pt"), torch.load(save)
                error = float((clip - theirs).norm() / theirs.norm())
                name = f"decode_clip_tiled, {way} MiB" if way.isdecimal() else way
                rows.append({"clip": size, "way": name, "MB": json.loads(done.stdout.splitlines()[-1]), "error": error})
                print(rows[-1], file=sys.stderr)
    head = {**environment(torch.device(options.device)), "diffusers": diffusers.__version__}
    write(options.out, "video_memory", "Peak memory of a decode of AutoencoderKLCogVideoX", head, rows)


if __name__ == "__main__":
    main()
