"""``movq-ext demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import explain
from ..demo import DEFAULT_PHOTO, DEFAULT_SIZE, PHOTOS, SMALL_MODEL_PATH, round_trip
from .common import add_model, add_threads, load_model, positive, set_threads

SUMMARY = "Encode and decode one photograph, and report its size and quality."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--photo", default=DEFAULT_PHOTO,
                        help=f"a shipped photograph ({', '.join(PHOTOS)}) or an image file (default: %(default)s)")  # fmt: skip
    parser.add_argument("--size", type=positive, default=DEFAULT_SIZE, metavar="PIXELS",
                        help="scale a larger photograph down until its longer side has this many pixels "
                        "(default: %(default)s)")  # fmt: skip
    add_threads(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    photo = PHOTOS.get(args.photo, Path(args.photo))
    if not photo.exists():
        raise FileNotFoundError(f"expected --photo to be a file or one of {', '.join(PHOTOS)}, got {args.photo}")
    set_threads(args)
    model = load_model(args)
    result = round_trip(model, photo, args.out, args.size)
    width, height = result.size
    rows, columns = result.grid
    scaled = "" if result.size == result.photo_size else ", scaled down from {}x{}".format(*result.photo_size)
    # The claim holds for the shipped model and photographs only: anything may be in the training data of another model.
    unseen = photo in PHOTOS.values() and args.model.resolve() == SMALL_MODEL_PATH.resolve()
    note = " (not in the model's training data)" if unseen else ""
    lines = {
        "photograph": f"{photo.name}, {width}x{height}{scaled}{note}",
        "codes": f"{rows}x{columns} grid, {result.bits_per_code} bits per code, "
        f"{result.distinct_codes} distinct of {model.quantize.n_e}",
        "size": f"{result.code_bits / 8e3:.1f} kB of codes ({result.bits_per_pixel:.3f} bit/pixel); "
        f"the photograph as PNG: {result.png_bytes / 1e3:.1f} kB",
        "quality": f"PSNR {result.quality.psnr:.2f} dB, SSIM {result.quality.ssim:.4f}",
        "time": f"encode {result.encode_seconds:.3f} s, decode {result.decode_seconds:.3f} s "
        "(one photograph, after a warm-up; no loading and no file access)",
        "device": f"{args.device}, {args.dtype}" + (f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""),
        "path": explain(model.quant_conv.weight),
        "written": f"{args.out}: codes.safetensors ({result.code_file_bytes / 1e3:.1f} kB, 32 bits per code), "
        "decoded.png, side_by_side.png",
    }
    for label, text in lines.items():
        print(f"{label:<12}{text}")
    return 0
