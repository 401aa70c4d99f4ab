"""One photograph through the shipped model and back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from .io.codes import CodeFile, codebook_id, decode_image, encode_image
from .io.images import load_image, save_image
from .model.autoencoder import MOVQ

ASSETS = Path(str(resources.files(__package__) / "assets"))
SMALL_MODEL = ASSETS / "small"  # the shipped weights, readable by from_pretrained
PHOTOS = {path.stem: path for path in sorted((ASSETS / "photos").glob("*.png"))}  # none was trained on


@dataclass(frozen=True)
class Quality:
    """How close a decoded picture is to the original."""

    psnr: float  # dB
    ssim: float

    @classmethod
    def of(cls, original: Image.Image, decoded: Image.Image) -> Quality:
        a, b = np.asarray(original), np.asarray(decoded)
        window = min(7, *a.shape[:2]) // 2 * 2 - 1 if min(a.shape[:2]) < 7 else 7
        return cls(
            float(peak_signal_noise_ratio(a, b, data_range=255)),
            float(structural_similarity(a, b, data_range=255, channel_axis=2, win_size=window)),
        )


@dataclass(frozen=True)
class RoundTrip:
    """What the demo measured; times in seconds."""

    quality: Quality
    encode_seconds: float
    decode_seconds: float
    codes: int
    distinct_codes: int
    bits_per_pixel: float


def round_trip(model: MOVQ, photo: Path, out: Path) -> RoundTrip:
    """Encode photo, write ``codes.safetensors``, decode what was written to ``decoded.png`` and ``side_by_side.png``.

    Raises OSError if photo cannot be read or out cannot be written.
    """
    original = load_image(photo)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    codes = encode_image(model, original)
    _synchronize(model)
    encoded = time.perf_counter()
    file = CodeFile(codebook_id(model))
    file.add(photo.name, codes, (original.height, original.width))
    file.save(out / "codes.safetensors")

    file = CodeFile.load(out / "codes.safetensors")
    decoding = time.perf_counter()
    decoded = decode_image(model, file.codes[photo.name], file.sizes[photo.name])
    decoded_at = time.perf_counter()
    save_image(decoded, out / "decoded.png")
    save_image(side_by_side(original, decoded), out / "side_by_side.png")
    return RoundTrip(
        Quality.of(original, decoded),
        encoded - start,
        decoded_at - decoding,
        codes.numel(),
        int(codes.unique().numel()),
        codes.numel() * float(np.log2(model.quantize.n_e)) / (original.width * original.height),
    )


def side_by_side(left: Image.Image, right: Image.Image, gap: int = 8) -> Image.Image:
    """Both pictures in one, left the original, with a white gap between."""
    canvas = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + gap, 0))
    return canvas


def _synchronize(model: MOVQ) -> None:
    if model.quant_conv.weight.is_cuda:
        torch.cuda.synchronize(model.quant_conv.weight.device)
