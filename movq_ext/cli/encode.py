"""``movq-ext encode``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from ..bulk.code_output import DEFAULT_SHARD_SIZE, CodeOutput, ShardFolder, SingleFile
from ..bulk.codebook import Codebook
from ..bulk.image_encoder import ImageEncoder
from ..io.files import content_hash
from ..io.folders import describe_ignored
from ..io.image_files import find_images
from ..io.images import has_later_frames, image_size, load_image
from .common import (
    add_max_pixels,
    add_model,
    add_threads,
    colour,
    load_model,
    memory_size,
    positive,
    print_error,
    raise_pillow_limit,
    set_threads,
)
from .interruption import resumable

SUMMARY = "Encode images to codes: to one file, or to a folder of shards. Images that are already there are skipped."
FORMATS = {"safetensors": ".safetensors", "webdataset": ".tar", "parquet": ".parquet"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path,
                        help="image files, and folders to search recursively; an image is named by the given folder's name "
                        "and the path below it (photos/a.png); a file given directly, by its parent folder and name")  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, default=Path("codes.safetensors"),
                        help="a .safetensors file or, for many images, a folder of shards (default: %(default)s)")  # fmt: skip
    parser.add_argument("--format", choices=FORMATS,
                        help="format of the shards (webdataset writes .tar files; default: safetensors)")  # fmt: skip
    parser.add_argument("--shard-size", type=positive, metavar="IMAGES",
                        help=f"maximum number of images in a shard (default: {DEFAULT_SHARD_SIZE})")  # fmt: skip
    parser.add_argument("--background", type=colour, default="white", metavar="COLOUR",
                        help="colour behind transparent pixels (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-memory", type=memory_size, metavar="SIZE",
                        help="working memory per image, not counting weights and pixels, such as 500M or 8G; larger images are "
                        "encoded in strips, with temporary files (default: most of the free memory)")  # fmt: skip
    add_max_pixels(parser)
    add_threads(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    set_threads(args)
    raise_pillow_limit(args.max_pixels)
    writes_file = is_single_file(args)
    found = find_images(args.images)
    for unreadable in found.unreadable:
        print_error(str(unreadable))
    model = load_model(args)
    encoder = ImageEncoder(model, args.max_memory)
    encoded, skipped, multi_frame, failed = 0, 0, 0, len(found.unreadable)
    with resumable(), open_output(args, writes_file, Codebook.from_model(model, args.max_pixels)) as output:
        output.require_room(file.name for file in found.files)
        for path, name in tqdm(found.files, unit="image", file=sys.stderr):
            try:
                source_hash = content_hash(path)
                if output.holds(name, source_hash):
                    skipped += 1
                    continue
                encoder.require_memory(*image_size(path, args.max_pixels))
                image = load_image(path, args.background, args.max_pixels)
                has_more = has_later_frames(path, args.max_pixels)
                codes = encoder.encode(image)
            except Exception as error:  # one bad image must not stop the rest
                failed += 1
                reason = str(error) or type(error).__name__  # a MemoryError has no message
                print_error(reason if str(path) in reason else f"{path}: {reason}")
                continue
            output.add(name, codes, (image.height, image.width), source_hash)
            encoded += 1
            multi_frame += has_more
    print(f"encoded {encoded}, already there {skipped}, failed {failed}")
    if multi_frame:
        print(f"images with more than one frame or page, encoded from the first: {multi_frame}")
    if found.ignored:
        print(describe_ignored(found.ignored))
    return 1 if failed else 0


def is_single_file(args: argparse.Namespace) -> bool:
    """Return True if the output is one code file. Raises ValueError if the options contradict that."""
    if args.out.is_dir():
        return False
    if args.out.suffix in (".tar", ".parquet"):
        raise ValueError(f"expected -o to be a folder or a .safetensors file, got {args.out}: pass a folder and --format")
    if not args.out.exists() and args.out.suffix != ".safetensors":
        return False
    if args.shard_size or args.format not in (None, "safetensors"):
        raise ValueError(f"--shard-size and --format are for shards: expected -o to be a folder, got {args.out}")
    return True


def open_output(args: argparse.Namespace, writes_file: bool, codebook: Codebook) -> CodeOutput:
    """Open the file or folder that the options name."""
    if writes_file:
        return SingleFile(args.out, codebook)
    return ShardFolder(args.out, codebook, FORMATS[args.format or "safetensors"], args.shard_size or DEFAULT_SHARD_SIZE)
