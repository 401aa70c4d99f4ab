"""Winograd convolutions of clips on a CPU, strip by strip: see `winograd`."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import is_inference
from .thread_pool import num_workers, run_in_threads
from .winograd import WINOGRAD_BYTES, WinogradConvolution, winograd_is_faster
from .winograd_filters import TILE

STRIP_BYTES = 2 << 20  # of the input's frames in a strip, which has one row of tiles at least
# Of the result, in all frames. Below, computing the factors of the weights takes longer than they save.
MIN_PIXELS = 2048


def clip_winograd_is_faster(x: Tensor, weight: Tensor, bias: Tensor | None, frames: int) -> bool:
    """Return False if conv3d is faster than `convolve_clip`, more exact, or records gradients.

    Args:
        x, weight, bias: as for `convolve_clip`.
        frames: number of frames of the result.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not is_inference(*tensors) or any(t.dtype != x.dtype or t.device.type != "cpu" for t in tensors):
        return False
    height, width = x.shape[3:]
    if weight.shape[1] != x.shape[1] or x.numel() == 0 or frames * height * width < MIN_PIXELS:
        return False
    return winograd_is_faster(weight[:, :, 0], [(height, width)], WINOGRAD_BYTES, frames)


def convolve_clip(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    repeats_first_frame: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``conv3d(x, weight, bias, padding=(0, 1, 1))`` in the layout of x, strip by strip, and strips in threads.

    Args:
        x: ``(B, C, T, H, W)``, float32 or float64.
        weight, bias: ``(out, C, taps, 3, 3)``, and ``(out,)`` or None.
        repeats_first_frame: first prepend the first frame of x ``taps - 1`` times.
        out: memory for the result.
    """
    batch, channels, frames, height, width = x.shape
    max_bytes = WINOGRAD_BYTES * weight.shape[2]
    convolution = WinogradConvolution(weight, bias, max_bytes, num_workers(), repeats_first_frame=repeats_first_frame)
    out_frames = frames if repeats_first_frame else frames - weight.shape[2] + 1
    if out is None:
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
        layout = torch.channels_last_3d if is_channels_last else torch.contiguous_format
        out = torch.empty((batch, len(weight), out_frames, height, width), dtype=x.dtype, memory_format=layout)
    images, results = x.permute(0, 2, 3, 4, 1), out.permute(0, 2, 3, 4, 1)  # (B, T, H, W, channels)
    rows = max(1, STRIP_BYTES // (frames * width * channels * x.itemsize * TILE.rows.outputs)) * TILE.rows.outputs

    def convolve_strip(strip: tuple[int, int]) -> None:
        image, first = strip
        last = min(first + rows, height)
        above, below = min(first, 1), min(height - last, 1)
        source = x.new_zeros(frames, last - first + 2, width, channels)
        source[:, 1 - above : source.shape[1] - 1 + below] = images[image, :, first - above : last + below]
        result = source.new_empty(out_frames, last - first, width, len(weight))
        convolution.write_to(result.permute(0, 3, 1, 2), source.permute(0, 3, 1, 2))
        results[image, :, first:last] = result

    run_in_threads(convolve_strip, [(image, first) for image in range(batch) for first in range(0, height, rows)])
    return out
