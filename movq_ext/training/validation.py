"""Reconstruct a few fixed photographs, to see and to measure how good a model is."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..io.image_files import find_images
from ..io.images import DEFAULT_MAX_PIXELS, load_image, to_image, to_tensor
from ..model.autoencoder import MOVQ

MAX_IMAGES = 8


def psnr(mse: float) -> float:
    """Return the PSNR in dB for a mean squared error of values in [-1, 1]; at most 100."""
    return -10 * math.log10(max(mse / 4, 1e-10))  # the squared peak is 4


class Validation:
    """The first images of a folder, cropped to a square and scaled.

    Args:
        folder: photographs, searched recursively.
        size: height and width in pixels; a multiple of the model's downsampling factor.
        max_pixels: see `load_image`.

    Raises:
        ValueError: folder contains no images.
        OSError: folder does not exist, or an image cannot be read.
    """

    def __init__(self, folder: str | Path, size: int, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        images = [load_image(file.path, max_pixels=max_pixels) for file in find_images([folder]).files[:MAX_IMAGES]]
        self.images = [to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)) for image in images]

    @torch.no_grad()
    def run(self, model: MOVQ, device: torch.device, quantized: bool) -> tuple[float, Image.Image]:
        """Return the mean PSNR in dB, and one picture: the photographs above, their reconstructions below."""
        reconstructions, quality = [], []
        for image in self.images:
            latents = model.encode(image[None].to(device))
            decoded = model.decode(model.quantize(latents)[0] if quantized else latents)[0].float().clamp(-1, 1).cpu()
            reconstructions.append(decoded)
            quality.append(psnr((decoded - image).square().mean().item()))
        return sum(quality) / len(quality), to_image(torch.cat([_row(self.images), _row(reconstructions)], 1))


def _row(images: list[Tensor]) -> Tensor:
    return torch.cat(images, 2)
