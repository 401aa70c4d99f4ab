"""``movq-ext export``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .. import export_decoder
from .common import add_model, load_model, size_range

SUMMARY = "Compile the decoder to a file that runs without movq_ext: quantised latents in, images out."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", type=Path, default=Path("decoder.pt2"), help="file to write (default: %(default)s)")
    parser.add_argument("--size", type=size_range, default="256", metavar="PIXELS",
                        help="height of the image, N or MIN:MAX (default: %(default)s)")  # fmt: skip
    parser.add_argument("--width", type=size_range, metavar="PIXELS",
                        help="width of the image, N or MIN:MAX (default: the same as --size)")  # fmt: skip
    parser.add_argument("--batch", type=size_range, default="1", metavar="IMAGES",
                        help="images in a batch, N or MIN:MAX (default: %(default)s)")  # fmt: skip
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    model = load_model(args)
    height = latent_range(args.size, model.downsampling)
    width = latent_range(args.width or args.size, model.downsampling)
    start = time.monotonic()
    export_decoder(model, args.out, height=height, width=width, batch=args.batch)
    print(f"device   {args.device}, {args.dtype}")
    print(f"written  {args.out}: {args.out.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
    return 0


def latent_range(pixels: tuple[int, int], downsampling: int) -> tuple[int, int]:
    """Convert a range of image sizes to latent cells. Raises ValueError for a size that is not a whole number of cells."""
    if any(size % downsampling for size in pixels):
        raise ValueError(f"size must be a multiple of the model's {downsampling} pixels per latent cell, got {pixels}")
    return pixels[0] // downsampling, pixels[1] // downsampling
