"""Draws demo.png, the image in README.md: `python docs/images/draw.py`, with movq_ext installed.

The image is the side_by_side.png of `movq-ext demo`. Its colours are rounded to multiples of 4: the difference is invisible,
and the file is 40% smaller.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from movq_ext import from_pretrained
from movq_ext.demo import DEFAULT_PHOTO, PHOTOS, SMALL_MODEL_PATH, round_trip

HERE = Path(__file__).resolve().parent
STEP = 4  # of 256 levels


def draw(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as out:
        round_trip(from_pretrained(SMALL_MODEL_PATH), PHOTOS[DEFAULT_PHOTO], Path(out))
        pixels = np.asarray(Image.open(Path(out) / "side_by_side.png")).astype(int)
    rounded = np.minimum((pixels + STEP // 2) // STEP * STEP, 255)
    Image.fromarray(rounded.astype(np.uint8)).save(folder / "demo.png", optimize=True)


if __name__ == "__main__":
    draw(HERE)
