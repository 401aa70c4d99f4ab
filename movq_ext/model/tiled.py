"""Decoding large images in bounded memory, exactly: strip by strip, with the statistics and the attention of the whole image."""

from __future__ import annotations

import torch
from torch import Tensor

from .decoder import MOVQDecoder
from .layers import ResnetBlock
from .strips import HALO, STRIP_BYTES, check_evaluation, computes_in_float32, convolution_values, decode_in_strips

MIB = 1 << 20


@torch.no_grad()
def decode_tiled(decoder: MOVQDecoder, z: Tensor, zq: Tensor, *, max_memory: int, folder: str | None = None) -> Tensor:
    """``decoder(z, zq)`` in bounded memory, for images of any size: exact, without seams, in evaluation and without gradients.

    Args:
        decoder: in evaluation mode, if it has dropout.
        z, zq: as for ``decoder``.
        max_memory: bytes of the device's memory to use beyond weights, latents and the image: at most half of it for the strip at
            work, the others for maps between layers. Beyond that an attention layer takes its keys and values, 2 * h * w * C
            elements, and a norm its scales and shifts, as many in float32; float16 on a CPU takes a float32 copy of the weights
            and maps. A decode that needs more keeps its maps in temporary files, up to ``(C0 + C1) * H * W`` elements for an
            image of ``H * W`` with C0 and C1 channels before and in the last level. The images of a batch come one after the
            other.
        folder: of the temporary files; the system's if None.

    Returns:
        What ``decoder(z, zq)`` returns, but for rounding.

    Raises:
        ValueError: as the decoder's; max_memory is too small for one row of the largest map; the decoder trains with dropout.
        TypeError: as the decoder's; a block or norm of the decoder is of another class, or a 3x3 convolution no ``nn.Conv2d``
            padded with zeros. Subclasses and hooks of convolutions are called (strip by strip), those of blocks are not.
        OSError: the temporary files do not fit the disk.
    """
    decoder.check_latents(z, zq)
    check_evaluation(decoder)
    scale = 2 ** (decoder.num_resolutions - 1)
    blocks = [layer for _, layer, _ in decoder.steps() if isinstance(layer, ResnetBlock)]
    values = max((convolution_values(block.in_channels, block.out_channels) for block in blocks), default=0)
    computed_in = torch.float32 if computes_in_float32(decoder, z) else z.dtype
    least = 2 * (1 + HALO) * values * z.shape[3] * scale * computed_in.itemsize
    if max_memory < least:
        needed = f"{least} bytes ({-(-least // MIB)} MiB) for z of shape {tuple(z.shape)}"
        raise ValueError(f"max_memory must be at least {needed}, got {max_memory}")
    working = max_memory // 2
    if z.device.type == "cpu":  # more would leave the cache
        working = min(working, STRIP_BYTES)
    return decode_in_strips(decoder, z, zq, working, max_memory - working, folder)
