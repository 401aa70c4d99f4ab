"""Convert images of every mode to RGB, as a viewer shows them."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
from PIL import Image, ImageChops, ImageCms
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

SIGNED_INTEGERS = 2  # of SAMPLEFORMAT
WHITE_IS_ZERO = 0  # of PHOTOMETRIC_INTERPRETATION
MAX_ROUNDING_ERROR = 2  # of 255, between two profiles of one colour space


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert an image to 8-bit sRGB, composited on a background colour where it is transparent.

    The file states the range of 16-bit grey; floats range over [0, 1]. An embedded colour profile is applied; an
    invalid one is ignored, as viewers do.

    Raises ValueError if the range is unknown: 32-bit integers, signed integers, floats outside [0, 1].
    """
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode == "F" or image.mode.startswith("I") or _tiff_tag(image, SAMPLEFORMAT, 1) == SIGNED_INTEGERS:
        image, alpha = _to_grey(image), _alpha_of_grey(image)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image, alpha = (image.convert("L") if image.mode in ("1", "L", "LA") else rgba.convert("RGB")), rgba.getchannel("A")
    rgb = _to_srgb(image, profile)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    rgb.info.clear()  # save() would write the old profile and transparent colour
    return rgb


def _to_grey(image: Image.Image) -> Image.Image:
    """Scale integers or floats to 8 bits. Raises ValueError if their range is unknown."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # also true of NaN
            raise ValueError(f"expected floats in [0, 1], got floats in [{values.min():g}, {values.max():g}]")
        return Image.fromarray((values * 255).round().astype(np.uint8))
    bits = _tiff_tag(image, BITSPERSAMPLE, 16)
    if _tiff_tag(image, SAMPLEFORMAT, 1) == SIGNED_INTEGERS:
        raise ValueError(f"expected unsigned integers, got signed integers of {bits} bits")
    if bits > 16:
        raise ValueError(f"expected integers of up to 16 bits, got {bits} bits")
    grey = (values * (255 / (2**bits - 1))).round().astype(np.uint8)
    inverted = _tiff_tag(image, PHOTOMETRIC_INTERPRETATION, 1) == WHITE_IS_ZERO  # Pillow inverts 8 bits only
    return Image.fromarray(255 - grey if inverted else grey)


def _alpha_of_grey(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel of a 16-bit PNG that declares a grey level transparent, or None."""
    level = image.info.get("transparency")
    return None if level is None else Image.fromarray(np.where(np.asarray(image) == level, 0, 255).astype(np.uint8))


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    """Return a TIFF tag's value (its first, if it has one per channel); default for other formats and missing tags."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to RGB: from the profile's colours to those of sRGB, unless they differ by rounding only."""
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):  # TypeError: a TIFF tag that holds no bytes
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
            if image.mode == "CMYK" or _changes_colours(transform, image.mode):
                return transform.apply(image)
    return image.convert("RGB")


def _changes_colours(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return True if the transform changes a sample of colours by more than MAX_ROUNDING_ERROR."""
    down = Image.linear_gradient("L").resize((32, 32))
    across, up = down.transpose(Image.Transpose.ROTATE_90), down.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    sample = down if mode == "L" else Image.merge("RGB", (down, across, up))
    changed = transform.apply(sample)
    difference = np.asarray(ImageChops.difference(changed, sample.convert("RGB")))
    return int(difference.max()) > MAX_ROUNDING_ERROR
