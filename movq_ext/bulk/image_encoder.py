"""Encode images of any size in the memory that is available."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from ..io.codes import encode_image
from ..model.autoencoder import MOVQ
from .memory import free_memory, peak_values_per_pixel

MEMORY_SHARE = 0.8  # of the free memory, for an image
LOADING_BYTES = 50  # per pixel while an image is read and converted to a tensor; measured for every mode and format
PIXEL_BYTES = 16  # per pixel once that is done: an image and its float32 tensor


class ImageEncoder:
    """Encodes images one by one: whole if the feature maps fit in memory, otherwise in strips.

    Args:
        model: a MOVQ model.
        max_memory: bytes of working memory per image, see `MOVQ.encode`. None for most of the free memory.
    """

    def __init__(self, model: MOVQ, max_memory: int | None = None) -> None:
        self.model, self.max_memory = model, max_memory
        weight = model.quant_conv.weight
        self.device = weight.device
        half_on_cpu = weight.dtype == torch.float16 and self.device.type == "cpu"  # computed in float32 copies
        self._bytes_per_pixel = peak_values_per_pixel(model.encoder) * (weight.element_size() + 4 * half_on_cpu)

    def require_memory(self, height: int, width: int) -> None:
        """Raise ValueError if an image of this size cannot be read in the memory that is free now."""
        max_pixels = int(MEMORY_SHARE * free_memory(torch.device("cpu"))) // LOADING_BYTES
        if height * width > max_pixels:
            raise ValueError(f"{height} x {width} pixels (height x width) do not fit in the free memory, {max_pixels} pixels do")

    def encode(self, image: Image.Image) -> Tensor:
        """Return the code indices ``(h, w)`` of an RGB image. Raises what `encode_image` raises."""
        return encode_image(self.model, image, self.max_memory or self._budget(image.width * image.height))

    def _budget(self, pixels: int) -> int | None:
        """Return the bytes for an image of this many pixels, or None if its feature maps fit as a whole."""
        budget = int(MEMORY_SHARE * free_memory(self.device)) - PIXEL_BYTES * pixels
        return None if self._bytes_per_pixel * pixels <= budget else max(1, budget)
