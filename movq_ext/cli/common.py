"""Options, argument types and error messages shared by several commands."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

import torch
from PIL import Image, ImageColor
from tqdm import tqdm

from .. import MOVQ, from_pretrained
from ..demo import SMALL_MODEL_PATH
from ..io.files import printable
from ..io.images import DEFAULT_MAX_PIXELS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_THREADS = 1024


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_name, default=default, help="torch device (default: a GPU if there is one)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--model`` and ``--dtype``, which `load_model` reads."""
    add_device(parser)
    parser.add_argument("--model", type=Path, default=SMALL_MODEL_PATH, metavar="PATH",
                        help="weights: a file or folder that from_pretrained reads (default: the shipped model)")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default: %(default)s)")


def load_model(args: argparse.Namespace) -> MOVQ:
    """Load the model that the options name."""
    return from_pretrained(args.model, device=args.device, dtype=DTYPES[args.dtype])


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads``, which `set_threads` reads."""
    parser.add_argument("--threads", type=thread_count, help="CPU threads (default: all cores)")


def set_threads(args: argparse.Namespace) -> None:
    """Compute on as many CPU threads as ``--threads`` asks for."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-pixels``."""
    parser.add_argument("--max-pixels", type=positive, default=DEFAULT_MAX_PIXELS, metavar="N",
                        help="largest image, in pixels; larger ones are listed and skipped (default: %(default)s)")  # fmt: skip


def raise_pillow_limit(max_pixels: int) -> None:
    """Let Pillow open images of up to ``max_pixels``. Its own limit is 179 million pixels."""
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


def print_error(message: str) -> None:
    """Print an error to stderr, above the progress bar if there is one."""
    tqdm.write(f"error: {printable(message)}", file=sys.stderr)


def device_name(text: str) -> str:
    """Check that torch can compute on a device."""
    try:
        torch.zeros(1, device=text).item()  # fails on the meta device, which creates tensors but holds no values
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without the backend
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from error
    return text


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def colour(text: str) -> str:
    """Check that Pillow knows a colour."""
    try:
        ImageColor.getrgb(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a colour such as white or #ff8800, got {text!r}") from error
    return text


def size_range(text: str) -> tuple[int, int]:
    """Parse ``N`` or ``MIN:MAX``; a single number is both ends of its range."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected N or MIN:MAX, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def memory_size(text: str) -> int:
    """Parse a size in bytes; K, M, G and T stand for powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    size = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"expected a size such as 500M or 8G, got {text!r}")
    return int(size)


def thread_count(text: str) -> int:
    """Parse a number of threads."""
    if not (text.isdecimal() and 1 <= int(text) <= MAX_THREADS):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MAX_THREADS}, got {text!r}")
    return int(text)
