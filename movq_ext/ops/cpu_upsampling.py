"""Upsampling and its convolution on a CPU without gradients, prepared for several maps."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .thread_pool import num_workers, run_in_threads
from .upsampling import fold_upsampling, folding_pays_on_cpu, upsample_conv
from .winograd import WINOGRAD_BYTES
from .winograd_upsampling import WinogradUpsampling, winograd_upsampling_is_faster


def takes_nine_products(weight: Tensor, dtype: torch.dtype, pixels: int, max_bytes: int = WINOGRAD_BYTES) -> bool:
    """Return True if `prepare_upsample_conv` takes `WinogradUpsampling`. Arguments are as for it."""
    return dtype == weight.dtype and winograd_upsampling_is_faster(weight, pixels, max_bytes)


def prepare_upsample_conv(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, pixels: int, max_bytes: int = WINOGRAD_BYTES
) -> Callable[[Tensor], Tensor]:
    """Return ``x -> upsample_conv(x, weight, bias)`` for several maps, without gradients.

    Args:
        weight, bias: as for `upsample_conv`, on a CPU.
        dtype: of the convolution.
        pixels: of all maps, before upsampling.
        max_bytes: limit for nine products, see `WinogradUpsampling`; 0 rules them out.
    """
    if takes_nine_products(weight, dtype, pixels, max_bytes):
        return functools.partial(_upsample_in_threads, WinogradUpsampling(weight, bias, max_bytes, num_workers()))
    if folding_pays_on_cpu(pixels, dtype):
        folded = fold_upsampling(weight)
        return lambda x: F.conv_transpose2d(x, folded, bias, stride=2, padding=1)
    return lambda x: upsample_conv(x, weight, bias, "direct")


def _upsample_in_threads(convolution: WinogradUpsampling, x: Tensor) -> Tensor:
    """Return all images of x ``(B, C, H, W)``, upsampled and convolved, in the layout of x."""
    images, _, height, width = x.shape
    pixels = x.contiguous(memory_format=torch.channels_last)
    out = x.new_empty(images, 2 * height, 2 * width, convolution.out_channels).permute(0, 3, 1, 2)
    rows = -(-height // num_workers())  # of a task: a thread takes part of every image

    def write(part: tuple[int, int]) -> None:
        image, first = slice(part[0], part[0] + 1), part[1]
        last = min(first + rows, height)
        halo = int(first > 0), int(last < height)
        strip = pixels[image, :, first - halo[0] : last + halo[1]]
        convolution.write_to(out[image, :, 2 * first : 2 * last], strip, halo)

    run_in_threads(write, [(image, first) for image in range(images) for first in range(0, height, rows)])
    return out.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
