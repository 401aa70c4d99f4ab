"""Read and write image files; convert images to tensors in [-1, 1] and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .files import atomic_write, require_file, wrap_errors
from .rgb import to_rgb

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # a subset of Pillow's: its EPS reader runs Ghostscript
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


class ImageError(OSError):
    """The file is damaged, truncated or not an image in a supported format."""


def load_image(path: str | Path, background: str = "white") -> Image.Image:
    """Load an image as RGB, with its EXIF orientation and colour profile applied.

    Transparent pixels are composited on the background colour. Of an animation or a file with several pages, the first is read.

    Raises ImageError if the file is damaged, is not in one of FORMATS, has more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` or
    values of unknown range (see `to_rgb`), and OSError if the file cannot be read.
    """
    require_file(path)
    with wrap_errors(ImageError, f"cannot read {path}"), Image.open(path, formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image, background)


def has_later_frames(path: str | Path) -> bool:
    """Return True if a readable frame or page follows the one that `load_image` reads.

    Raises like load_image, but not for damage after the first frame.
    """
    require_file(path)
    with wrap_errors(ImageError, f"cannot read {path}"), Image.open(path, formats=FORMATS) as image:
        if image.format == "MPO":  # a photograph and, say, its depth map
            return False
        try:
            image.seek(1)  # n_frames would read the headers of all frames
        except Exception:  # EOFError if there is no second frame; many types if it is damaged
            return False
        return True


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to ``(3, H, W)`` float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_image(x: Tensor) -> Image.Image:
    """Convert ``(3, H, W)`` in [-1, 1] to an RGB image. Clamps; raises ValueError for NaN and infinite values."""
    if not bool(x.isfinite().all()):
        raise ValueError("expected finite pixel values, got NaN or infinity")
    pixels = x.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad ``(B, C, H, W)`` at the bottom and right to a multiple, by repeating the last row and column."""
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple), mode="replicate")


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a PNG atomically."""
    with atomic_write(path) as partial:
        image.save(partial, format="PNG")
