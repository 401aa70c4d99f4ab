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
from ..io.images import find_images, load_image
from .common import add_model, load_model, print_error

SUMMARY = "Encode images to a file of codes. Images that the file already holds are skipped."
SAVE_INTERVAL_SECONDS = 60.0  # an interruption loses at most this much work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, help="image files, and folders to search recursively")
    parser.add_argument("-o", "--out", type=Path, default=Path("codes.safetensors"), help="file to write (default: %(default)s)")
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    model = load_model(args)
    file = open_code_file(args.out, model)
    encoded = skipped = failed = 0
    names: set[str] = set()
    saved_at = time.monotonic()
    try:
        for path, relative in tqdm(list(find_images(args.images)), unit="image", file=sys.stderr):
            name = relative.as_posix()
            try:
                if name in names:
                    raise ValueError("another image in this call has the same name")
                names.add(name)
                if name in file.codes:
                    skipped += 1
                    continue
                image = load_image(path)
                file.add(name, encode_image(model, image), (image.height, image.width))
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
    return 1 if failed else 0


def open_code_file(path: Path, model: MOVQ) -> CodeFile:
    """Load the file to add to, or create an empty one. Raises ValueError if its codes belong to another codebook."""
    if not path.exists():
        return CodeFile(codebook_fingerprint(model))
    file = CodeFile.load(path)
    Codebook.from_model(model).check_fingerprint(file.codebook, path)
    return file
