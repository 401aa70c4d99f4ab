"""Paths of the weights and photographs in the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

ASSETS = Path(str(resources.files(__package__)))
SMALL_MODEL_PATH = ASSETS / "small"  # the shipped weights, readable by from_pretrained
PHOTO_FOLDER = ASSETS / "photos"
PHOTOS = {path.stem: path for path in sorted(PHOTO_FOLDER.glob("*.png"))}  # the shipped model was trained on none of them
