"""Image files to tensors in [-1, 1] and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .files import refusing, replacing, require_file

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not all that Pillow has: for EPS it starts Ghostscript


class ImageError(OSError):
    """The file is no picture, or not a whole one."""


def find_images(paths: Iterable[str | Path]) -> Iterator[tuple[Path, Path]]:
    """(file, name relative to the argument it came from) of every image; folders are searched to the bottom, sorted.

    A file given by name is taken whatever its suffix. Raises FileNotFoundError for a path that does not exist.
    """
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.suffix.lower() in SUFFIXES and file.is_file():
                    yield file, file.relative_to(path)
        elif path.exists():
            yield path, Path(path.name)
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")


def load_image(path: str | Path) -> Image.Image:
    """The picture as RGB, upright (EXIF orientation applied).

    Raises OSError if the file cannot be read, and its subclass ImageError if it is no whole picture in one of FORMATS, or has
    more than twice ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    require_file(path)
    with refusing(ImageError, f"cannot read {path}"), Image.open(path, formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to 8 instead of scaling
            return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to ``(3, H, W)`` float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_image(x: Tensor) -> Image.Image:
    """``(3, H, W)`` in [-1, 1] (clamped) to an RGB picture. Raises ValueError where x is not finite."""
    if not bool(x.isfinite().all()):
        raise ValueError("the picture has NaN or infinite values")
    pixels = x.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of ``(B, C, H, W)`` until height and width are multiples."""
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple), mode="replicate")


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a PNG so that path never holds half a picture."""
    with replacing(path) as partial:
        image.save(partial, format="PNG")
