"""Encode one photograph, decode its codes, and measure what was lost."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from .assets import PHOTOS, SMALL_MODEL_PATH
from .io.codes import CodeFile, codebook_fingerprint, decode_image, encode_image
from .io.images import load_image, save_image
from .model.autoencoder import MOVQ

__all__ = ["DEFAULT_PHOTO", "DEFAULT_SIZE", "PHOTOS", "SMALL_MODEL_PATH", "Quality", "RoundTrip", "round_trip", "side_by_side"]

T = TypeVar("T")

DEFAULT_PHOTO = "astronaut"
DEFAULT_SIZE = 512
SSIM_WINDOW = 7  # pixels


@dataclass(frozen=True)
class Quality:
    """How close a decoded image is to the original.

    Args:
        psnr: peak signal-to-noise ratio in dB; infinite if both are equal.
        ssim: structural similarity, at most 1; NaN if the image has fewer than 3 pixels along one side.
    """

    psnr: float
    ssim: float

    @classmethod
    def compare(cls, original: Image.Image, decoded: Image.Image) -> Quality:
        """Compare two RGB images of one size."""
        a, b = np.asarray(original), np.asarray(decoded)
        psnr = math.inf if np.array_equal(a, b) else float(peak_signal_noise_ratio(a, b, data_range=255))
        shorter = min(original.size)
        window = min(SSIM_WINDOW, shorter - 1 + shorter % 2)  # the largest odd window that fits
        if window < 3:
            return cls(psnr, math.nan)
        return cls(psnr, float(structural_similarity(a, b, data_range=255, channel_axis=2, win_size=window)))


@dataclass(frozen=True)
class RoundTrip:
    """What `round_trip` measured.

    Args:
        photo_size: (width, height) of the photograph in pixels.
        size: (width, height) of the image that was encoded.
        grid: (rows, columns) of codes.
        distinct_codes: how many different codes occur in the grid.
        bits_per_code: bits that identify one code of the codebook.
        png_bytes: the image that was encoded, as a PNG file.
        code_file_bytes: ``codes.safetensors``, which holds 32 bits per code.
        quality: the decoded image compared with the one that was encoded.
        encode_seconds, decode_seconds: wall-clock time of `encode_image` and `decode_image`, each called once before to warm up.
    """

    photo_size: tuple[int, int]
    size: tuple[int, int]
    grid: tuple[int, int]
    distinct_codes: int
    bits_per_code: int
    png_bytes: int
    code_file_bytes: int
    quality: Quality
    encode_seconds: float
    decode_seconds: float

    @property
    def code_bits(self) -> int:
        """Number of bits of all codes, packed."""
        return self.grid[0] * self.grid[1] * self.bits_per_code

    @property
    def bits_per_pixel(self) -> float:
        """Number of bits of all codes, packed, per pixel of the image."""
        return self.code_bits / (self.size[0] * self.size[1])


def round_trip(model: MOVQ, photo: Path, out: Path, size: int = DEFAULT_SIZE) -> RoundTrip:
    """Encode a photograph to ``codes.safetensors``, and decode that file to ``decoded.png`` and ``side_by_side.png``.

    Args:
        model: the model to encode and decode with.
        photo: image file.
        out: folder to write to; created if missing.
        size: longest side in pixels; a larger photograph is scaled down first, a smaller one is not scaled up.

    Raises:
        OSError: photo cannot be read, or out cannot be written.
    """
    original = load_image(photo)
    photo_size = original.size
    original.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=None)
    out.mkdir(parents=True, exist_ok=True)
    code_path = out / "codes.safetensors"

    codes, encode_seconds = _time_second_call(encode_image, model, original)
    file = CodeFile(codebook_fingerprint(model))
    file.add(photo.name, codes, (original.height, original.width))
    file.save(code_path)

    file = CodeFile.load(code_path)  # decode what was written, not what is in memory
    decoded, decode_seconds = _time_second_call(decode_image, model, file.codes[photo.name], file.sizes[photo.name])
    save_image(decoded, out / "decoded.png")
    save_image(side_by_side(original, decoded), out / "side_by_side.png")
    return RoundTrip(
        photo_size=photo_size,
        size=original.size,
        grid=(codes.shape[0], codes.shape[1]),
        distinct_codes=int(codes.unique().numel()),
        bits_per_code=(model.quantize.n_e - 1).bit_length(),
        png_bytes=_png_bytes(original),
        code_file_bytes=code_path.stat().st_size,
        quality=Quality.compare(original, decoded),
        encode_seconds=encode_seconds,
        decode_seconds=decode_seconds,
    )


def side_by_side(left: Image.Image, right: Image.Image, gap: int = 8) -> Image.Image:
    """Place two images next to each other, ``gap`` white pixels apart."""
    canvas = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + gap, 0))
    return canvas


def _png_bytes(image: Image.Image) -> int:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.tell()


def _time_second_call(function: Callable[..., T], model: MOVQ, *args: Any) -> tuple[T, float]:
    """Call ``function(model, *args)`` twice. Return its result and the seconds of the second call.

    The first call also loads libraries, chooses kernels and allocates memory.
    """
    function(model, *args)
    _synchronize(model)
    start = time.perf_counter()
    result = function(model, *args)
    _synchronize(model)
    return result, time.perf_counter() - start


def _synchronize(model: MOVQ) -> None:
    if model.quant_conv.weight.is_cuda:
        torch.cuda.synchronize(model.quant_conv.weight.device)
