"""Decode and encode large images in bounded memory, without approximation.

They run strip by strip, with the statistics of the whole image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.native import compute_dtype
from ..ops.thread_pool import num_workers
from .decoder import MOVQDecoder
from .encoder import Encoder
from .layers import ResnetBlock
from .strip_checks import LayeredNetwork, check_no_dropout
from .strip_spans import HALO
from .strips import computes_in_float32, decode_in_strips, encode_in_strips
from .working_memory import CPU_MEMORY, WorkingMemory, convolution_values

MIB = 1 << 20


@torch.no_grad()
def decode_tiled(decoder: MOVQDecoder, z: Tensor, zq: Tensor, *, max_memory: int, folder: str | None = None) -> Tensor:
    """Return ``decoder(z, zq)``, decoded in bounded memory: for images of any size, without seams, and without gradients.

    ``max_memory`` covers the strip being computed and its convolution (at most half), and the maps between layers. Maps beyond
    it go to temporary files, which hold up to ``(C0 + C1) * H * W`` elements for an image of ``H * W`` pixels, where C0 and C1
    are the channels before and in the last level, or ``5 / 4 * C0 * H * W`` if C1 is at most half of C0 and a level has at most
    twice the channels of the next. It does not cover:

    - weights, latents and the image;
    - an attention layer's keys and values, ``2 * h * w * C`` elements, or half as many in 16-bit types;
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
        TypeError: as the decoder; max_memory is not an int; a block or norm has an unknown class, or a 3x3 convolution is not an
            ``nn.Conv2d`` padded with zeros. Subclasses and hooks of convolutions run once per strip; hooks of blocks do not run.
        OSError: the temporary files do not fit on the disk.
    """
    decoder.check_latents(z, zq)
    check_no_dropout("decoder", decoder)
    dtype = torch.float32 if computes_in_float32(decoder, z) else compute_dtype(z)
    needed = _min_memory(decoder, z.shape[3] << (decoder.num_resolutions - 1), dtype)
    check_max_memory(max_memory, needed, "z", z)
    return decode_in_strips(decoder, z, zq, _divide(max_memory, needed, z.device), folder)


@torch.no_grad()
def encode_tiled(encoder: Encoder, x: Tensor, *, max_memory: int, folder: str | None = None) -> Tensor:
    """Return ``encoder(x)``, encoded in bounded memory: for images of any size, without seams, and without gradients.

    ``max_memory`` covers the strip being computed and its convolution (at most half), and the maps between layers. Maps beyond
    it go to temporary files, which hold up to ``2 * C * H * W`` elements for an image of ``H * W`` pixels, where C is the most
    channels of its first level. It does not cover:

    - weights, the image and the latents;
    - an attention layer's keys and values, ``2 * h * w * C`` elements, or half as many in 16-bit types.

    The images of a batch are encoded one after another. No ``torch.no_grad()`` is needed.

    Args:
        encoder: must be in evaluation mode if it has dropout.
        x: as for ``encoder``.
        max_memory: bytes of the device's memory.
        folder: where to create the temporary files; the system's default if None.

    Returns:
        The latents, equal to ``encoder(x)`` up to rounding.

    Raises:
        ValueError: as the encoder; max_memory is too small for one row of the largest map; dropout is active.
        TypeError: as the encoder; max_memory is not an int; a block or norm has an unknown class, or a 3x3 convolution is not an
            ``nn.Conv2d`` padded with zeros. Subclasses and hooks of convolutions run once per strip; hooks of blocks do not run.
        OSError: the temporary files do not fit on the disk.
    """
    encoder.check_image(x)
    check_no_dropout("encoder", encoder)
    needed = _min_memory(encoder, x.shape[3], compute_dtype(x))
    check_max_memory(max_memory, needed, "x", x)
    return encode_in_strips(encoder, x, _divide(max_memory, needed, x.device), folder)


def _min_memory(network: LayeredNetwork, width: int, dtype: torch.dtype) -> int:
    """Return the smallest max_memory: half of it holds a strip of one row of the largest map, of this width."""
    blocks = [layer for layer in network.layers() if isinstance(layer, ResnetBlock)]
    values = max((convolution_values(block.in_channels, block.out_channels) for block in blocks), default=0)
    return 2 * (1 + HALO) * values * width * dtype.itemsize


def check_max_memory(max_memory: int, needed: int, name: str, x: Tensor) -> None:
    """Raise TypeError unless max_memory is an int, and ValueError if it is less than the argument x of this name needs."""
    if isinstance(max_memory, bool) or not isinstance(max_memory, int):
        raise TypeError(f"max_memory must be an int, the number of bytes, got {max_memory!r}")
    if max_memory < needed:
        expected = f"{needed} bytes ({-(-needed // MIB)} MiB) for {name} of shape {tuple(x.shape)}"
        raise ValueError(f"max_memory must be at least {expected}, got {max_memory}")


def _divide(max_memory: int, min_memory: int, device: torch.device) -> WorkingMemory:
    """Return how much of max_memory is for strips, at most half, and how much for maps.

    min_memory also holds four rows of the largest map, which a Winograd convolution computes at once, and their neighbours. Each
    thread needs as much.
    """
    half = max_memory // 2
    if device.type != "cpu":
        return WorkingMemory(half, maps=max_memory - half)
    strip = min(half, max(CPU_MEMORY.strip, min_memory))  # no larger than needed, so that it stays in the cache
    winograd = min(half - strip, CPU_MEMORY.winograd)
    workers = min(num_workers(), max(1, strip // min_memory))
    return WorkingMemory(strip, winograd, max_memory - strip - winograd, workers)
