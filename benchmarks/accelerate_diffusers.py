"""Decodes of diffusers' autoencoders, eager and compiled, before and after `movq_ext.accelerate`, in one process.

    python benchmarks/accelerate_diffusers.py --models SD --sizes 256 512 --compile-only  # fills the compiler's cache
    python benchmarks/accelerate_diffusers.py --models SD --sizes 256 512 --minutes 8 --out benchmarks/results/accelerate_cpu

The models have random weights and the published configs. "compiled" has its decoder compiled. The candidates take turns, for
several rounds; a turn starts with an untimed decode if one takes less than 1.5 s. "ratio" is the median of the rounds' ratios of
diffusers' time to the accelerated one's, "spread" the ``(largest - smallest) / median`` of these, "compiled ratio" the median
ratio to the compiled model's time, and "error" the relative difference of the images. "MB" is the peak memory of a decode beyond
what was in use, each in a process of its own. The results are written after every case. (This file is not called accelerate.py
because that would hide the package of that name from diffusers.)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from timing import EXACT_MALLOC, environment, milliseconds, needs_warm_up, peak_megabytes, summary, write

import movq_ext

WIDE = (128, 256, 512, 512)
QUICK = (32, 64)
MODELS = ("Kandinsky", "SD", "FLUX")
CANDIDATES = ("diffusers", "compiled", "accelerated")


def build_model(name: str, widths: tuple[int, ...]) -> Any:
    """Return Kandinsky 2.x's MoVQ, the autoencoder of SD and SDXL, or FLUX's."""
    torch.manual_seed(0)
    library: Any = diffusers  # it has no type annotations
    common: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths, "layers_per_block": 2, "latent_channels": 16 if name == "FLUX" else 4,
    }  # fmt: skip
    if name == "Kandinsky":
        common["up_block_types"][0], common["down_block_types"][-1] = "AttnUpDecoderBlock2D", "AttnDownEncoderBlock2D"
        return library.VQModel(norm_type="spatial", num_vq_embeddings=64, **common).eval()
    return library.AutoencoderKL(use_quant_conv=name != "FLUX", use_post_quant_conv=name != "FLUX", **common).eval()


def decode(model: Any, z: torch.Tensor) -> torch.Tensor:
    options = {"force_not_quantize": True} if isinstance(model, diffusers.VQModel) else {}
    image: torch.Tensor = model.decode(z, return_dict=False, **options)[0]
    return image


def prepare(model: Any, candidate: str) -> None:
    """Change the model into the candidate, one of CANDIDATES."""
    (movq_ext.accelerate if candidate == "accelerated" else movq_ext.restore)(model)
    compiled = model.__dict__.setdefault("compiled_decoder", torch.compile(model.decoder._call_impl, dynamic=False))
    model.decoder._compiled_call_impl = compiled if candidate == "compiled" else None


def measure(model: Any, z: torch.Tensor, rounds: int) -> dict[str, float]:
    images, second_call_ms = {}, {}
    for candidate in CANDIDATES:
        prepare(model, candidate)
        images[candidate] = decode(model, z).float()
        second_call_ms[candidate] = milliseconds(lambda: decode(model, z), z.device, 0.0, min_calls=1, warm_up=False)
    warm_up = needs_warm_up(second_call_ms.values())
    times: dict[str, list[float]] = {candidate: [] for candidate in CANDIDATES}
    for candidate in CANDIDATES * rounds:
        prepare(model, candidate)
        times[candidate].append(milliseconds(lambda: decode(model, z), z.device, min_calls=1, warm_up=warm_up))
    prepare(model, "diffusers")
    row = {f"{candidate} ms": median(of_rounds) for candidate, of_rounds in times.items()}
    row["ratio"], row["spread"] = summary(ratios(times, "diffusers"))
    row["compiled ratio"] = median(ratios(times, "compiled"))
    row["error"] = float((images["accelerated"] - images["diffusers"]).norm() / images["diffusers"].norm())
    return row


def ratios(times: dict[str, list[float]], candidate: str) -> list[float]:
    return [theirs / ours for theirs, ours in zip(times[candidate], times["accelerated"], strict=True)]


def measure_peaks(name: str, case: Sequence[str]) -> dict[str, float]:
    """Return the peak memory of a decode in MB beyond what was in use, of each candidate in a process of its own."""
    peaks = {}
    for candidate in CANDIDATES:
        command = [sys.executable, __file__, "--peak-of", name, candidate, *case]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **EXACT_MALLOC})
        peaks[f"{candidate} MB"] = float(done.stdout)
    return peaks


@torch.no_grad()
def print_peak(name: str, candidate: str, device: str, dtype: str, size: str, layout: str, widths: str) -> None:
    """Print the peak memory of the second decode of one model in MB. Runs in a process of its own."""
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    model = build_model(name, QUICK if widths == "quick" else WIDE).to(device, getattr(torch, dtype))
    z = latents(model.to(memory_format=memory_format), int(size)).to(memory_format=memory_format)
    prepare(model, candidate)
    decode(model, z)
    print(peak_megabytes(lambda: decode(model, z), z.device))


def latents(model: Any, size: int) -> torch.Tensor:
    """Return random latents of an image of ``size`` by ``size`` pixels."""
    cells = size >> (len(model.config.block_out_channels) - 1)
    return torch.randn(1, model.config.latent_channels, cells, cells, device=model.device, dtype=model.dtype)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--layouts", nargs="+", default=["nchw", "nhwc"], choices=["nchw", "nhwc"])
    parser.add_argument("--sizes", nargs="+", type=int, help="height and width in pixels; 256 on a CPU, up to 1024 on a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every candidate")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/accelerate_diffusers"), help="folder for the results"
    )
    parser.add_argument("--quick", action="store_true", help="rehearse: narrow models and small images")
    parser.add_argument("--minutes", type=float, default=15.0, help="start no measurement after this long")
    parser.add_argument("--compile-only", action="store_true", help="compile for every case, and write nothing")
    parser.add_argument("--peak-of", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(*options.peak_of)
        return
    deadline, rows = time.monotonic() + 60 * options.minutes, list[dict[str, Any]]()
    head = {**environment(torch.device(options.devices[0])), "diffusers": diffusers.__version__, "rounds": options.rounds}
    for device, name, dtype, size, layout in cases(options):
        if time.monotonic() > deadline:
            break
        model = build_model(name, QUICK if options.quick else WIDE).to(device, getattr(torch, dtype))
        memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        z = latents(model.to(memory_format=memory_format), size).to(memory_format=memory_format)
        if options.compile_only:
            prepare(model, "compiled")
            decode(model, z)
            continue
        row = {
            "device": device,
            "model": name,
            "dtype": dtype,
            "size": size,
            "layout": layout,
            **measure(model, z, options.rounds),
        }
        case = [device, dtype, str(size), layout, "quick" if options.quick else "wide"]
        rows.append({**row, **measure_peaks(name, case)})
        print(rows[-1], file=sys.stderr)
        write(options.out, "accelerate_diffusers", "diffusers' autoencoders with and without movq_ext.accelerate", head, rows)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, str, int, str]]:
    """Yield device, model, dtype, size and layout of every case, small images first."""
    for device in options.devices:
        sizes = options.sizes or ([256, 512, 1024] if device != "cpu" else [256])
        for size in [32] if options.quick else sizes:
            for name in options.models:
                for dtype in ("bfloat16", "float16", "float32") if device != "cpu" else ("float32",):
                    for layout in options.layouts:
                        yield device, name, dtype, size, layout


if __name__ == "__main__":
    main()
