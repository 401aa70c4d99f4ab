"""Nearest 2x upsampling followed by a 3x3 convolution: three ways that serve every device and dtype, and what each costs.

The large map holds every pixel four times, so neighbouring weights can be added before they are multiplied: 16 multiplications
per small pixel, where the large map takes 36.

- ``transposed``: a transposed convolution of the small map, then the bias;
- ``windows``: a convolution of 2x2 windows of the small map with four times the channels, then a pass that interleaves the four
  pixels of each window and adds the bias. By count it costs slightly more than ``transposed``, so it runs only on request until
  a GPU shows which of the two cuDNN convolves faster;
- ``direct``: the large map, its convolution, then the bias. Cheapest for small maps: nothing is folded.

`winograd_upsampling` has a fourth, for wide layers on a CPU without gradients.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .native import compute_dtype, is_tracing

METHODS = ("transposed", "windows", "direct")
FOLDED_CHANNELS = 128  # output channels whose weights are folded at once on a CPU, in its cache
# Operations in the time of one byte, from the data sheet of an H100 SXM: 3.35 TB/s, and dense 989 TFLOP/s in 16 bits, 495 in TF32
# and 67 in float32. A choice depends on these ratios alone. Not yet measured on a GPU.
OPERATIONS_PER_BYTE_16_BIT, OPERATIONS_PER_BYTE_TF32, OPERATIONS_PER_BYTE_FLOAT32 = 295, 148, 20
# Pixels from which folding takes less time on a CPU than it saves. It reads or writes each weight about 14 times. For each pixel
# and pair of channels it saves 20 of 36 multiplications, which AMX computes about eight times as fast in bfloat16.
MIN_FOLDED_PIXELS, MIN_FOLDED_PIXELS_BFLOAT16 = 512, 1536


def fold_upsampling(weight: Tensor) -> Tensor:
    """Return the transposed convolution (stride 2, padding 1) that equals nearest 2x upsampling followed by a 3x3 convolution.

    Each pixel of the large map depends on 2x2 pixels of the small one. The weights are sums of neighbouring published ones: 16
    multiplications per small pixel, where the large map takes 36.

    Args:
        weight: ``(out, in, 3, 3)``, of the convolution.

    Returns:
        ``(in, out, 4, 4)``.
    """
    dtype, weight = weight.dtype, _at_least_float32(weight)
    for dim in (3, 2):
        last, middle, first = weight.split(1, dim)  # a transposed convolution applies its kernel mirrored
        weight = torch.cat([first, first + middle, middle + last, last], dim)
    # On a GPU in the maps' layout, to which cuDNN would copy it; oneDNN repacks any.
    layout = torch.channels_last if weight.is_cuda else torch.contiguous_format
    return weight.to(dtype).transpose(0, 1).contiguous(memory_format=layout)


def fold_windows(weight: Tensor) -> Tensor:
    """Return the same fold as an ordinary convolution over 2x2 windows of the small map.

    Each window yields the four pixels of the large map around its centre.

    Args:
        weight: ``(out, in, 3, 3)``, of the convolution.

    Returns:
        ``(4 * out, in, 2, 2)``: upper left, upper right, lower left, lower right pixel.
    """

    def of_both_pixels(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, middle, last = weight.split(1, dim)
        return torch.cat([first + middle, last], dim), torch.cat([first, middle + last], dim)

    # Sums rather than a matrix product, which autocast would compute in 16 bits.
    rows = of_both_pixels(_at_least_float32(weight), 2)
    return torch.cat([pixel for row in rows for pixel in of_both_pixels(row, 3)]).to(weight.dtype)


def fold_window_row(weight: Tensor, row: int) -> Tensor:
    """Return one row of each window's pixels from `fold_windows`, in channels_last, from which oneDNN packs it fastest.

    Args:
        weight: ``(out, in, 3, 3)``, of the convolution.
        row: 0 for the upper pixels, 1 for the lower ones.

    Returns:
        ``(2 * out, in, 2, 2)``: left, right pixel.
    """
    out_channels, channels = weight.shape[:2]
    folded = weight.new_empty(2, out_channels, 2, 2, channels)  # (pixel, out, rows, columns, in)
    chunk = FOLDED_CHANNELS if weight.device.type == "cpu" else out_channels
    for first in range(0, out_channels, chunk):
        part = weight[first : first + chunk].contiguous(memory_format=torch.channels_last)
        taps = _at_least_float32(part).permute(2, 3, 0, 1)  # (rows, columns, out, in)
        rows = torch.empty_like(taps[:2])
        torch.add(taps[row], taps[row + 1], out=rows[row])
        rows[1 - row] = taps[2 - 2 * row]
        left, centre, right = rows.unbind(1)
        left_pixel, right_pixel = folded[:, first : first + chunk].permute(0, 3, 2, 1, 4)  # (columns, rows, out, in)
        torch.add(left, centre, out=left_pixel[0])
        left_pixel[1] = right
        right_pixel[0] = left
        torch.add(centre, right, out=right_pixel[1])
    return folded.flatten(0, 1).permute(0, 3, 1, 2)


def _at_least_float32(weight: Tensor) -> Tensor:
    """Return the weight in a dtype whose sums, rounded to the weight's own, are rounded once."""
    return weight if weight.itemsize >= 4 else weight.float()


def interleave_windows(windows: Tensor, bias: Tensor | None) -> Tensor:
    """Return the large map from the convolution of `fold_windows` with padding 1, plus the bias.

    Args:
        windows: ``(B, 4 * C, H + 1, W + 1)``.
        bias: ``(C,)``, or None.

    Returns:
        ``(B, C, 2 * H, 2 * W)``.
    """
    pixels: Tensor = windows.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)[:, :, 1:-1, 1:-1]
    return pixels if bias is None else pixels + bias.to(windows.dtype)[:, None, None]


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, method: str = "transposed") -> Tensor:
    """Return ``F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)``, computed by one of METHODS."""
    if method == "transposed":
        return F.conv_transpose2d(x, fold_upsampling(weight), bias, stride=2, padding=1)
    if method == "windows":
        return interleave_windows(F.conv2d(x, fold_windows(weight), padding=1), bias)
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def folding_pays_on_cpu(pixels: int, dtype: torch.dtype) -> bool:
    """Return True if folding weights saves more than it costs, for a convolution in this dtype.

    Args:
        pixels: of all images, before upsampling.
        dtype: of the convolution.
    """
    return pixels >= (MIN_FOLDED_PIXELS_BFLOAT16 if dtype == torch.bfloat16 else MIN_FOLDED_PIXELS)


def cpu_method(x: Tensor) -> str:
    """Return the faster method of `upsample_conv` on a CPU: ``"transposed"``, or ``"direct"`` for few pixels."""
    if is_tracing():  # the program must work for other sizes
        return "transposed"
    return "transposed" if folding_pays_on_cpu(x.numel() // x.shape[1], compute_dtype(x)) else "direct"


class Cost(NamedTuple):
    """What a method computes, and the bytes that its kernels read and write."""

    operations: int
    bytes: int

    def equivalent_bytes(self, dtype: torch.dtype) -> float:
        """Return the bytes that a GPU moves in the time of all operations and bytes."""
        if dtype.itemsize == 2:
            return self.bytes + self.operations / OPERATIONS_PER_BYTE_16_BIT
        tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
        return self.bytes + self.operations / (OPERATIONS_PER_BYTE_TF32 if tf32 else OPERATIONS_PER_BYTE_FLOAT32)


def count_costs(
    x: Tensor, out_channels: int, has_bias: bool, dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> dict[str, Cost]:
    """Return the cost of each method with our kernels, for x ``(B, C, H, W)`` convolved in a dtype.

    A fold reads 9 weights per pair of channels and writes 16, which the convolution reads. The bias is added in place. If x or
    the weight (of x's dtype if None) has another dtype, autocast copies what the convolution takes.
    """
    return _count_costs(tuple(map(int, x.shape)), x.dtype, out_channels, has_bias, dtype, weight_dtype or x.dtype)


@functools.lru_cache(maxsize=1024)  # every decode asks for the same few
def _count_costs(
    shape: tuple[int, ...], x_dtype: torch.dtype, out_channels: int, has_bias: bool, dtype: torch.dtype, weight_dtype: torch.dtype
) -> dict[str, Cost]:
    def cast(values: int, source: torch.dtype) -> int:
        return 0 if source == dtype else values * (source.itemsize + dtype.itemsize)

    batch, channels, height, width = shape
    pixels, windows, pairs = batch * height * width, batch * (height + 1) * (width + 1), channels * out_channels
    small, large, interleaved = pixels * channels, 4 * pixels * out_channels, 4 * windows * out_channels
    bias_pass = 2 * large if has_bias else 0
    folding = 25 * pairs * weight_dtype.itemsize + cast(16 * pairs, weight_dtype) + cast(small, x_dtype)
    doubling = 5 * small * x_dtype.itemsize + cast(9 * pairs, weight_dtype) + cast(4 * small, x_dtype)
    total = {
        "transposed": folding + (small + 16 * pairs + large + bias_pass) * dtype.itemsize,
        "windows": folding + (small + 16 * pairs + interleaved + 2 * large) * dtype.itemsize,
        "direct": doubling + (4 * small + 9 * pairs + large + bias_pass) * dtype.itemsize,
    }
    multiplications = {"transposed": 16 * pixels * pairs, "windows": 16 * windows * pairs, "direct": 36 * pixels * pairs}
    return {method: Cost(2 * multiplications[method], total[method]) for method in METHODS}
