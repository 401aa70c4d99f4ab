"""Decodes of diffusers' autoencoders before and after `movq_ext.accelerate`, in one process.

    python benchmarks/accelerate_diffusers.py --out benchmarks/results/accelerate_diffusers

The models have random weights and the published configs. They are timed before and after in turns, for several rounds. "ratio" is
the median of the rounds' ratios, "spread" the ``(largest - smallest) / median`` of these, and "error" the relative difference of
the images. "MB" is the peak memory of a decode beyond what was in use, each in a process of its own. (This file is not called
accelerate.py because that would hide the package of that name from diffusers.)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from timing import environment, milliseconds, peak_megabytes, summary, write

import movq_ext

WIDE = (128, 256, 512, 512)
QUICK = (32, 64)


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


def measure(model: Any, z: torch.Tensor, rounds: int) -> dict[str, float]:
    times: dict[Any, list[float]] = {movq_ext.restore: [], movq_ext.accelerate: []}
    images = []
    for change, rounds_ms in list(times.items()) * rounds:
        change(model)
        images.append(decode(model, z).float())
        rounds_ms.append(milliseconds(lambda: decode(model, z), z.device))
    movq_ext.restore(model)
    before, after = times.values()
    ratio, spread = summary([theirs / ours for theirs, ours in zip(before, after, strict=True)])
    error = float((images[1] - images[0]).norm() / images[0].norm())
    return {"diffusers ms": median(before), "accelerated ms": median(after), "ratio": ratio, "spread": spread, "error": error}


def measure_peaks(name: str, case: Sequence[str]) -> dict[str, float]:
    """Return the peak memory of a decode in MB beyond what was in use, before and after, each in a process of its own."""
    peaks = {}
    for column in ("diffusers", "accelerated"):
        command = [sys.executable, __file__, "--peak-of", name, column, *case]
        peaks[f"{column} MB"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peaks


@torch.no_grad()
def print_peak(name: str, column: str, device: str, dtype: str, size: str, layout: str, widths: str) -> None:
    """Print the peak memory of the second decode of one model in MB. Runs in a process of its own."""
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    model = build_model(name, QUICK if widths == "quick" else WIDE).to(device, getattr(torch, dtype))
    if column == "accelerated":
        movq_ext.accelerate(model)
    z = latents(model.to(memory_format=memory_format), int(size)).to(memory_format=memory_format)
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
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[256, 512, 1024], help="height and width in pixels; a CPU takes the first only"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns before and after")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/accelerate_diffusers"), help="folder for the results"
    )
    parser.add_argument("--quick", action="store_true", help="rehearse: narrow models and small images")
    parser.add_argument("--minutes", type=float, default=15.0, help="start no measurement after this long")
    parser.add_argument("--peak-of", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(*options.peak_of)
        return
    start, rows = time.monotonic(), []
    for device in options.devices:
        on_gpu = device != "cpu"
        for name in ("Kandinsky", "SD", "FLUX"):
            for dtype in (torch.bfloat16, torch.float16, torch.float32) if on_gpu else (torch.float32,):
                model = build_model(name, QUICK if options.quick else WIDE).to(device, dtype)
                for size in [32] if options.quick else options.sizes if on_gpu else options.sizes[:1]:
                    for layout in (torch.contiguous_format, torch.channels_last):
                        if time.monotonic() - start > 60 * options.minutes:
                            continue
                        z = latents(model.to(memory_format=layout), size).to(memory_format=layout)
                        row = {"device": device, "model": name, "dtype": str(dtype)[6:], "size": size}
                        row["layout"] = "nhwc" if layout == torch.channels_last else "nchw"
                        case = [device, row["dtype"], str(size), row["layout"], "quick" if options.quick else "wide"]
                        rows.append({**row, **measure(model, z, options.rounds), **measure_peaks(name, case)})
    head = {**environment(torch.device(options.devices[0])), "diffusers": diffusers.__version__}
    write(options.out, "accelerate_diffusers", "diffusers' autoencoders with and without movq_ext.accelerate", head, rows)


if __name__ == "__main__":
    main()
