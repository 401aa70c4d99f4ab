"""Decode large images in bounded memory, without approximation: strip by strip, with the statistics of the whole image."""

from __future__ import annotations

import torch
from torch import Tensor

from .decoder import MOVQDecoder
from .layers import ResnetBlock
from .strip_checks import check_no_dropout
from .strip_rows import HALO
from .strips import STRIP_BYTES, computes_in_float32, convolution_values, decode_in_strips

MIB = 1 << 20


@torch.no_grad()
def decode_tiled(decoder: MOVQDecoder, z: Tensor, zq: Tensor, *, max_memory: int, folder: str | None = None) -> Tensor:
    """Return ``decoder(z, zq)``, decoded in bounded memory: for images of any size, without seams, and without gradients.

    ``max_memory`` covers the strip being computed (at most half) and the maps between layers. Maps beyond it go to temporary
    files, which hold up to ``(C0 + C1) * H * W`` elements for an image of ``H * W`` pixels, where C0 and C1 are the channels
    before and in the last level. It does not cover:

    - weights, latents and the image;
    - an attention layer's keys and values, ``2 * h * w * C`` elements;
    - a norm's scales and shifts, ``2 * h * w * C`` elements in float32;
    - for float16 on a CPU, float32 copies of the weights and maps.

    The images of a batch are decoded one after another. No ``torch.no_grad()`` is needed.

    Args:
        decoder: must be in evaluation mode if it has dropout.
        z, zq: as for ``decoder``.
        max_memory: bytes of the device's memory.
        folder: where to create the temporary files; the system's default if None.

    Returns:
        The image, equal to ``decoder(z, zq)`` up to rounding.

    Raises:
        ValueError: as the decoder; max_memory is too small for one row of the largest map; dropout is active.
        TypeError: as the decoder; a block or norm has an unknown class, or a 3x3 convolution is not an ``nn.Conv2d`` padded with
            zeros. Subclasses and hooks of convolutions run once per strip; hooks of blocks do not run.
        OSError: the temporary files do not fit on the disk.
    """
    decoder.check_latents(z, zq)
    check_no_dropout(decoder)
    needed = _min_memory(decoder, z)
    if max_memory < needed:
        expected = f"{needed} bytes ({-(-needed // MIB)} MiB) for z of shape {tuple(z.shape)}"
        raise ValueError(f"max_memory must be at least {expected}, got {max_memory}")
    strip_bytes = max_memory // 2
    if z.device.type == "cpu":
        strip_bytes = min(strip_bytes, STRIP_BYTES)  # a larger strip would not stay in the cache
    return decode_in_strips(decoder, z, zq, strip_bytes, max_memory - strip_bytes, folder)


def _min_memory(decoder: MOVQDecoder, z: Tensor) -> int:
    """Return the smallest max_memory: half of it holds a strip of one row of the largest map."""
    blocks = [step.layer for step in decoder.steps() if isinstance(step.layer, ResnetBlock)]
    values = max((convolution_values(block.in_channels, block.out_channels) for block in blocks), default=0)
    dtype = torch.float32 if computes_in_float32(decoder, z) else z.dtype
    width = z.shape[3] << (decoder.num_resolutions - 1)
    return 2 * (1 + HALO) * values * width * dtype.itemsize
