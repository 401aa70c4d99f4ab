"""3x3 convolutions of strips on a CPU with a third of the multiplications: Winograd's minimal filtering.

F(m, r) computes m outputs of a filter with r taps from m + r - 1 products, where the direct sum takes m * r (Winograd, Arithmetic
Complexity of Computations, 1980; Lavin and Gray, arXiv:1509.09308). Inputs, taps and outputs are seen as polynomials: evaluated
at m + r - 1 points, multiplied point by point, and interpolated. Each step is linear, so the sum over the input channels can be
taken in between: one matrix product for every point.

Here rows take F(4, 3) and columns F(2, 3). So 6 * 4 products give 4 * 2 pixels, where the direct sum takes 72. F(4, 3) in both
directions would take 36 for 16 pixels, but its rounding error is larger than the direct convolution's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BLOCK_BYTES = 16 << 20  # for all tensors of a block of pixels
# Costs in units of one multiplication in a matrix product, from measured ratios on a CPU with AVX-512.
PASS_COST = 48  # per value of a pass that reads one or two values and writes one
INPUT_PASSES, OUTPUT_PASSES = 6, 7.5
WEIGHT_COST = 600  # of a weight's 24 factors, beyond what packing for the direct convolution costs


class FourOutputs:
    """F(4, 3) at the points 0, ±1/√2, ±√2 and infinity.

    They are chosen for a small rounding error. With the usual points, 0, ±1, ±2 and infinity, it is 1.5 times as large.
    """

    OUTPUTS, FACTORS = 4, 6
    SMALL, LARGE = 2**-0.5, 2**0.5
    # The taps' polynomial at each point, divided by the product of the differences to the other points.
    TAPS = (
        (1.0, 0.0, 0.0),
        (-2 / 3, -2 / 3 * SMALL, -1 / 3),
        (-2 / 3, 2 / 3 * SMALL, -1 / 3),
        (1 / 6, 1 / 6 * LARGE, 1 / 3),
        (1 / 6, -1 / 6 * LARGE, 1 / 3),
        (0.0, 0.0, 1.0),
    )

    @classmethod
    def factors(cls, x: Sequence[Tensor], out: Tensor) -> None:
        """Write the six factors of inputs ``x[0]`` to ``x[5]`` to out."""
        even, odd = torch.sub(x[4], x[2], alpha=2, out=out[3]), torch.sub(x[3], x[1], alpha=2, out=out[4])
        torch.add(even, odd, alpha=cls.SMALL, out=out[1])
        torch.sub(even, odd, alpha=cls.SMALL, out=out[2])
        even, odd = torch.sub(x[4], x[2], alpha=0.5, out=out[0]), torch.sub(x[3], x[1], alpha=0.5, out=out[5])
        torch.add(even, odd, alpha=cls.LARGE, out=out[3])
        torch.sub(even, odd, alpha=cls.LARGE, out=out[4])
        torch.add(x[0], x[4], out=out[0]).sub_(x[2], alpha=2.5)
        torch.add(x[1], x[5], out=out[5]).sub_(x[3], alpha=2.5)

    @classmethod
    def add_outputs(cls, products: Tensor, out: Sequence[Tensor]) -> None:
        """Add the four outputs to out. Overwrites products."""
        first, plus, minus, large_plus, large_minus, last = products
        difference, large_difference = plus - minus, large_plus - large_minus
        plus.add_(minus)
        large_plus.add_(large_minus)
        out[0].add_(first).add_(plus).add_(large_plus)
        out[1].add_(difference, alpha=cls.SMALL).add_(large_difference, alpha=cls.LARGE)
        out[2].add_(plus, alpha=0.5).add_(large_plus, alpha=2)
        out[3].add_(difference, alpha=cls.SMALL / 2).add_(large_difference, alpha=2 * cls.LARGE).add_(last)


class TwoOutputs:
    """F(2, 3) at the points 0, ±1 and infinity."""

    OUTPUTS, FACTORS = 2, 4
    TAPS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))

    @staticmethod
    def factors(x: Sequence[Tensor], out: Tensor) -> None:
        """Write the four factors of inputs ``x[0]`` to ``x[3]`` to out."""
        torch.sub(x[0], x[2], out=out[0])
        torch.add(x[2], x[1], out=out[1])
        torch.sub(x[2], x[1], out=out[2])
        torch.sub(x[3], x[1], out=out[3])

    @staticmethod
    def outputs(products: Tensor, out: Sequence[Tensor]) -> None:
        """Write the two outputs to out."""
        first, plus, minus, last = products
        torch.add(first, plus, out=out[0]).add_(minus)
        torch.sub(plus, minus, out=out[1]).add_(last)


ROWS, COLUMNS = FourOutputs, TwoOutputs
PRODUCTS = ROWS.FACTORS * COLUMNS.FACTORS


def is_faster(weight: Tensor, strips: Sequence[tuple[int, int]], max_bytes: int) -> bool:
    """True if a `WinogradConvolution` of these strips is faster than a direct one, by counted operations.

    Only for float32 and float64 on a CPU, outside autocast, where float32 products are not rounded to fewer bits.

    Args:
        weight: ``(out, in, rows, columns)``.
        strips: rows and columns of each strip of the output.
        max_bytes: the weight's factors may take two thirds.
    """
    out_channels, channels, *kernel = weight.shape
    pairs = out_channels * channels
    if weight.device.type != "cpu" or kernel != [3, 3] or not _computes_exactly(weight.dtype):
        return False
    if PRODUCTS * pairs * weight.itemsize > max_bytes * 2 // 3:
        return False
    pixels = sum(rows // ROWS.OUTPUTS * ROWS.OUTPUTS * columns for rows, columns in strips)
    saved = (9 - PRODUCTS / (ROWS.OUTPUTS * COLUMNS.OUTPUTS)) * pairs
    return pixels * (saved - PASS_COST * (INPUT_PASSES * channels + OUTPUT_PASSES * out_channels)) > WEIGHT_COST * pairs


def _computes_exactly(dtype: torch.dtype) -> bool:
    """True if matrix products on a CPU are computed in this dtype, float32 or float64."""
    if dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return dtype == torch.float64 or precision in ("none", "ieee")  # set by torch.set_float32_matmul_precision


class WinogradConvolution:
    """``out += conv2d(x, weight, bias, padding=(0, 1))`` for one image in channels_last, with 3x3 weights.

    Args:
        weight: ``(out, in, 3, 3)``, float32 or float64, on the CPU.
        bias: ``(out,)`` or None.
        max_bytes: limit for the weight's factors plus one block of pixels; a block has at least 4 x 16 pixels.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, max_bytes: int) -> None:
        self.weight, self.bias = weight, bias
        rows, columns = weight.new_tensor(ROWS.TAPS), weight.new_tensor(COLUMNS.TAPS)
        taps = torch.einsum("cx,ry->cryx", columns, rows).view(PRODUCTS, 9)
        # (PRODUCTS, in, out), by one matrix product
        self.factors = (taps @ weight.reshape(-1, 9).t()).view(PRODUCTS, *weight.shape[:2]).transpose(1, 2)
        self.block_bytes = min(max_bytes - self.factors.nbytes, MAX_BLOCK_BYTES)
        self.block_memory = weight.new_empty(0)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the convolution of x ``(1, in, H + 2, W)`` to out ``(1, out, H, W)``, in place."""
        height, width = out.shape[2:]
        whole = height - height % ROWS.OUTPUTS
        pixels, image = out[0].permute(1, 2, 0), x[0].permute(1, 2, 0)  # (rows, columns, channels)
        rows, columns = self._block_size(width)
        for row in range(0, whole, rows):
            last_row = min(row + rows, whole)
            for column in range(0, width, columns):
                last_column = min(column + columns, width)
                self._add_block(pixels[row:last_row, column:last_column], image[row : last_row + 2], column)
        if whole < height:
            rest = F.conv2d(x[:, :, whole:], self.weight, padding=(0, 1))
            pixels[whole:].add_(rest[0].permute(1, 2, 0))
        if self.bias is not None:
            pixels.add_(self.bias)

    def _block_size(self, width: int) -> tuple[int, int]:
        """Return the rows and columns of a block, multiples of the filters' outputs."""
        out_channels, channels = self.weight.shape[:2]
        per_pixel = self.weight.itemsize * (channels + out_channels) * 9 // 2
        pixels = self.block_bytes // per_pixel
        columns = min(width, max(pixels // ROWS.OUTPUTS, 16))
        rows = max(pixels // columns, 1)
        return max(rows // ROWS.OUTPUTS, 1) * ROWS.OUTPUTS, -(-columns // COLUMNS.OUTPUTS) * COLUMNS.OUTPUTS

    def _add_block(self, out: Tensor, x: Tensor, first: int) -> None:
        """Add a block ``(H, W, out)``. x ``(H + 2, columns, in)`` has all columns, and the block's first is ``first``."""
        out_channels, channels = self.weight.shape[:2]
        height, width = out.shape[0] // ROWS.OUTPUTS, -(-out.shape[1] // COLUMNS.OUTPUTS)
        padded = COLUMNS.OUTPUTS * width + 2
        shapes = [
            (ROWS.FACTORS, height, padded, channels),
            (COLUMNS.FACTORS, ROWS.FACTORS, height, width, channels),
            (PRODUCTS, height * width, out_channels),
            (ROWS.FACTORS, height, padded - 2, out_channels),
        ]
        row_factors, factors, products, row_products = self._buffers(shapes)
        # Columns outside the map are zero.
        left, right = max(first - 1, 0), min(first - 1 + padded, x.shape[1])
        inside = slice(left - first + 1, right - first + 1)
        row_factors[:, :, : inside.start] = 0
        row_factors[:, :, inside.stop :] = 0
        every = ROWS.OUTPUTS
        ROWS.factors([x[i : i + every * height : every, left:right] for i in range(ROWS.FACTORS)], row_factors[:, :, inside])
        every = COLUMNS.OUTPUTS
        COLUMNS.factors([row_factors[:, :, i : i + every * width : every] for i in range(COLUMNS.FACTORS)], factors)
        torch.bmm(factors.view(PRODUCTS, height * width, channels), self.factors, out=products)
        COLUMNS.outputs(products.view(*factors.shape[:4], -1), [row_products[:, :, i::every] for i in range(every)])
        ROWS.add_outputs(row_products[:, :, : out.shape[1]], [out[i :: ROWS.OUTPUTS] for i in range(ROWS.OUTPUTS)])

    def _buffers(self, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return uninitialised tensors in memory that every block overwrites, so it stays in the cache."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        if self.block_memory.numel() < sum(sizes):
            self.block_memory = self.weight.new_empty(sum(sizes))
        parts = self.block_memory[: sum(sizes)].split(sizes)
        return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]
