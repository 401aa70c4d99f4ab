"""Read and write image files; convert images to tensors in [-1, 1] and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor

from .files import atomic_write, require_file, wrap_errors
from .rgb import to_rgb

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # a subset of Pillow's: its EPS reader runs Ghostscript
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
DEFAULT_MAX_PIXELS = 8192 * 8192  # of an image; 34 bytes can claim 179 million
STRIP_PIXELS = 1 << 22  # that `to_image` converts at once
TRANSPOSITIONS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(OSError):
    """The file is damaged, truncated or not an image in a supported format."""


def load_image(path: str | Path, background: str = "white", max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Load an image as RGB, with its EXIF orientation and colour profile applied.

    Transparent pixels are composited on the background colour. Of an animation or a file with several pages, the first is read.

    Raises ImageError if the file is damaged, is not in one of FORMATS, has more pixels than ``max_pixels`` or Pillow's own
    limit (twice ``PIL.Image.MAX_IMAGE_PIXELS``), or has values of unknown range (see `to_rgb`), and OSError if the file cannot
    be read. The header says how many pixels there are: none is decoded before the check.
    """
    with _open_image(path, max_pixels) as image:
        if image.format == "TIFF":
            image.info.pop("xmp", None)  # load() would parse it, and fail if it is not text
        image.load()
        return to_rgb(_orient(image), background)


def _orient(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data say. Invalid EXIF data are ignored, as viewers do. Pillow turns TIFF images itself."""
    orientation = None
    with suppress(Exception):  # of many types; those of the pixels were raised by load()
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    method = TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def image_size(path: str | Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Return (height, width) in pixels, as stored, without decoding pixels. Raises what `load_image` raises."""
    with _open_image(path, max_pixels) as image:
        return image.height, image.width


def has_later_frames(path: str | Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> bool:
    """Return True if a readable frame or page follows the one that `load_image` reads.

    Raises like load_image, but not for damage after the first frame.
    """
    with _open_image(path, max_pixels) as image:
        if image.format == "MPO":  # a photograph and, say, its depth map
            return False
        try:
            if image.format == "GIF":  # seek() would allocate the second frame, which may be larger than the first
                return bool(getattr(image, "is_animated", False))
            image.seek(1)  # n_frames would read the headers of all frames
        except Exception:  # EOFError if there is no second frame; many types if it is damaged
            return False
        return True


@contextmanager
def _open_image(path: str | Path, max_pixels: int) -> Iterator[Image.Image]:
    """Yield an image whose header is read, and whose pixels are not."""
    require_file(path)
    with wrap_errors(ImageError, f"cannot read {path}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
        try:
            image = Image.open(path, formats=FORMATS)
        except Image.DecompressionBombError as error:  # Pillow's own limit
            limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
            raise ImageError(f"cannot read {path}: expected at most {limit} pixels. {error}") from error
        with image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height} (width x height)"
                raise ImageError(f"cannot read {path}: expected at most {max_pixels} pixels, got {size}")
            yield image


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to ``(3, H, W)`` float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_image(x: Tensor) -> Image.Image:
    """Convert ``(3, H, W)`` in [-1, 1] to an RGB image. Clamps; raises ValueError for NaN and infinite values."""
    _, height, width = x.shape
    pixels = torch.empty(height, width, 3, dtype=torch.uint8)
    rows = max(1, STRIP_PIXELS // width)  # in strips: the whole image in float32 would take several times its memory
    for strip, out in zip(x.split(rows, 1), pixels.split(rows), strict=True):
        if not bool(strip.isfinite().all()):
            raise ValueError("expected finite pixel values, got NaN or infinity")
        out.copy_(strip.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0))
    return Image.fromarray(pixels.numpy())


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad ``(B, C, H, W)`` at the bottom and right to a multiple, by repeating the last row and column."""
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple), mode="replicate")


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a PNG atomically."""
    with atomic_write(path) as partial:
        image.save(partial, format="PNG")
