"""Random crops of the photographs in a folder."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..io.folders import describe_ignored
from ..io.image_files import find_images
from ..io.images import DEFAULT_MAX_PIXELS, load_image, to_tensor

logger = logging.getLogger(__name__)

CACHE_BYTES = 2 << 30  # of decoded photographs


class Photographs:
    """Draw random crops of the photographs in a folder, searched recursively.

    A batch is a pure function of the generator's state, so a resumed run sees the crops of an uninterrupted one. Photographs that
    are unreadable or have more than ``max_pixels`` are skipped, and logged when they are first drawn.

    Raises ValueError if the folder contains no images.
    """

    def __init__(self, folder: str | Path, crop: int, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        found = find_images([folder])
        for unreadable in found.unreadable:
            logger.warning("skipping an unreadable folder or link: %s", unreadable)
        if found.ignored:
            logger.info("%s: %s", folder, describe_ignored(found.ignored))
        self.files = [file.path for file in found.files]
        self.crop, self.max_pixels = crop, max_pixels
        self._cache: dict[Path, Image.Image] = {}
        self._cached_bytes = 0
        self._unreadable: set[Path] = set()

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Return ``(size, 3, crop, crop)`` float32 in [-1, 1]."""
        return torch.stack([self._random_crop(generator) for _ in range(size)])

    def _random_crop(self, generator: torch.Generator) -> Tensor:
        pick, zoom, across, down, flip = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        image = self._readable(int(pick * len(self.files)))
        # The source region ranges from `crop` pixels (full resolution) to half the photograph's shorter side, so the model
        # sees both fine texture and whole scenes.
        widest = max(self.crop, min(image.size) / 2)
        side = min(self.crop * (widest / self.crop) ** math.sqrt(zoom), *image.size)
        left, top = across * (image.width - side), down * (image.height - side)
        box = (left, top, left + side, top + side)
        x = to_tensor(image.resize((self.crop, self.crop), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0))
        return x.flip(2) if flip < 0.5 else x

    def _readable(self, index: int) -> Image.Image:
        """Return the photograph at index, or the next readable one."""
        for file in self.files[index:] + self.files[:index]:
            if file not in self._unreadable:
                try:
                    return self._load(file)
                except OSError as error:
                    self._unreadable.add(file)
                    logger.warning("skipping an image (%d so far): %s", len(self._unreadable), error)
        raise ValueError(f"could not read any of the {len(self.files)} images")

    def _load(self, file: Path) -> Image.Image:
        if file not in self._cache:
            image = load_image(file, max_pixels=self.max_pixels)
            image_bytes = 3 * image.width * image.height
            if self._cached_bytes + image_bytes > CACHE_BYTES:
                return image
            self._cache[file] = image
            self._cached_bytes += image_bytes
        return self._cache[file]
