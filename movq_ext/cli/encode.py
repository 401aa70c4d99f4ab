"""``movq-ext encode``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from .. import MOVQ
from ..bulk.codebook import Codebook
from ..io.codes import CodeFile, codebook_fingerprint, encode_image
from ..io.files import content_hash
from ..io.folders import describe_passed_over
from ..io.image_files import find_images
from ..io.images import load_image
from .common import add_model, load_model, print_error

SUMMARY = "Encode images to a file of codes. Images that the file already holds are skipped."
SAVE_INTERVAL_SECONDS = 60.0  # an interruption loses at most this much work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, 
                        help="image files, and folders to search recursively; an image is named by its path from its folder on, "
                        "such as photos/a.png")  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, default=Path("codes.safetensors"), help="file to write (default: %(default)s)")
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    model = load_model(args)
    file = open_code_file(args.out, model)
    found = find_images(args.images)
    for unreadable in found.unreadable:
        print_error(str(unreadable))
    encoded, skipped, failed = 0, 0, len(found.unreadable)
    saved_at = time.monotonic()
    try:
        for path, name in tqdm(found.files, unit="image", file=sys.stderr):
            try:
                source_hash = content_hash(path)
                if file.holds(name, source_hash):
                    skipped += 1
                    continue
                image = load_image(path)
                file.add(name, encode_image(model, image), (image.height, image.width), source_hash)
                encoded += 1
            except Exception as error:  # one bad image must not stop the rest
                failed += 1
                print_error(f"{path}: {error}")
            if time.monotonic() - saved_at > SAVE_INTERVAL_SECONDS:
                file.save(args.out)
                saved_at = time.monotonic()
    finally:
        if encoded or not args.out.exists():
            file.save(args.out)
    print(f"encoded {encoded}, already there {skipped}, failed {failed}")
    if found.passed_over:
        print(describe_passed_over(found.passed_over))
    return 1 if failed else 0


def open_code_file(path: Path, model: MOVQ) -> CodeFile:
    """Load the file to add to, or create an empty one. Raises ValueError if its codes belong to another codebook."""
    if not path.exists():
        return CodeFile(codebook_fingerprint(model))
    file = CodeFile.load(path)
    Codebook.from_model(model).check_fingerprint(file.codebook, path)
    return file
