"""3x3 convolutions of upsampled strips on a CPU with a quarter of the multiplications.

Nearest upsampling by two, then a filter with taps ``w0, w1, w2``, makes two pixels of each value. They share one product:

    y[2i]     = w0 * x[i-1] + (w1 + w2) * x[i]  =  (w0 + w1 + w2) * x[i] + w0 * (x[i-1] - x[i])
    y[2i + 1] = (w0 + w1) * x[i] + w2 * x[i+1]  =  (w0 + w1 + w2) * x[i] - w2 * (x[i] - x[i+1])

So three products take the place of four, as in Winograd's F(2, 2), and neighbouring values share their difference. Nested for
rows and columns, nine products make four pixels, where folded weights take 16 and the convolution of the doubled map 36.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .winograd import MAX_BLOCK_BYTES, computes_exactly, weight_factors

MIN_CHANNELS = 128  # of the input: with fewer, a pass over the values takes as long as the products that are saved
FACTORS = 9  # matrices that take the place of a weight
HALO = 2  # rows


def winograd_upsampling_fits(weight: Tensor, width: int, max_bytes: int, threads: int = 1) -> bool:
    """Return True if `WinogradUpsampling` is faster than folded weights and takes at most ``max_bytes``.

    Always False unless the weight is on a CPU in float32 or float64, outside autocast, and float32 products are not rounded to
    fewer bits.

    Args:
        weight: ``(out, in, 3, 3)``.
        width: of the map before upsampling.
        max_bytes: for the weight's factors and a row of each thread.
        threads: how many share the convolution.
    """
    if weight.device.type != "cpu" or not computes_exactly(weight.dtype):
        return False
    out_channels, channels = weight.shape[:2]
    if channels < MIN_CHANNELS:
        return False
    values = FACTORS * out_channels * channels + threads * _block_values(1, width, channels, out_channels)
    return values * weight.itemsize <= max_bytes


def _block_values(rows: int, width: int, channels: int, out_channels: int) -> int:
    """Return the number of values in all tensors of a block of rows."""
    return (width + 1) * (channels * (4 * rows + 2 * HALO + 2) + 5 * rows * out_channels)


class WinogradUpsampling:
    """``conv2d(interpolate(x, scale_factor=2.0), weight, bias, padding=1)`` for strips in channels_last. Threads may share it.

    Args:
        weight: ``(out, in, 3, 3)``, float32 or float64, on the CPU.
        bias: ``(out,)`` or None.
        max_bytes: see `winograd_upsampling_fits`, which must be True.
        threads: how many may share it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, max_bytes: int, threads: int = 1) -> None:
        self.bias = bias
        self.out_channels, self.channels = weight.shape[:2]
        # Of the value, and of its differences from the neighbours before and after it.
        from_taps = weight.new_tensor(((1, 1, 1), (1, 0, 0), (0, 0, -1)))
        factors = weight_factors(weight, torch.kron(from_taps, from_taps), threads)
        self.weights = [[factor[0].t() for factor in row] for row in factors.unflatten(0, (3, 3))]  # (in, out), [row][column]
        self.block_values = min(max_bytes - factors.nbytes, MAX_BLOCK_BYTES) // threads // weight.itemsize

    def write_to(self, out: Tensor, x: Tensor, halo: tuple[int, int]) -> None:
        """Write the rows that are made of x's rows, without its halo.

        Args:
            out: ``(1, out, 2 * rows, 2 * W)``.
            x: ``(1, in, above + rows + below, W)``.
            halo: ``(above, below)``, 0 or 1 row each. A missing one is zero.
        """
        pixels, image = out[0].permute(1, 2, 0), x[0].permute(1, 2, 0)  # (rows, columns, channels)
        height, width = pixels.shape[0] // 2, image.shape[1]
        above, below = halo
        rows = self._block_rows(height, width)
        # A column of zeros follows each row, and so precedes the next one. One more zero precedes the first row.
        values = image.new_zeros((rows + HALO) * (width + 1) + 2, self.channels)
        padded = values[1:-1].unflatten(0, (-1, width + 1))[:, :width]
        differences = [torch.empty_like(values) for _ in range(3)]
        sums = image.new_empty(5, rows * (width + 1), self.out_channels)
        for row in range(0, height, rows):
            last = min(row + rows, height)
            no_above, no_below = row == 0 and not above, last == height and not below
            haloed = image[row + above - 1 + no_above : last + above + 1 - no_below]
            padded[no_above : no_above + len(haloed)] = haloed
            if no_below:
                padded[no_above + len(haloed)] = 0
            block = pixels[2 * row : 2 * last].unflatten(0, (-1, 2)).unflatten(2, (-1, 2))
            self._write_block(block, values, differences, sums)

    def _block_rows(self, height: int, width: int) -> int:
        """Return how many rows of the small map form a block, as many as its memory allows."""
        halo = _block_values(0, width, self.channels, self.out_channels)
        row = _block_values(1, width, self.channels, self.out_channels) - halo
        blocks = -(-height // max(1, (self.block_values - halo) // row))
        return -(-height // blocks)

    def _write_block(self, out: Tensor, values: Tensor, differences: list[Tensor], sums: Tensor) -> None:
        """Write the pixels of a block.

        Args:
            out: ``(rows, 2, W, 2, out)``.
            values: ``(pixels, in)`` of the rows and the halo, see `write_to`.
            differences: memory, ``(pixels, in)`` each.
            sums: memory, ``(5, rows * (W + 1), out)``.
        """
        rows, _, width = out.shape[:3]
        pitch = width + 1
        count, end = rows * pitch, (rows + HALO) * pitch + 2
        first = pitch + 1  # pixel of the block
        by_column, by_row, by_both = differences  # from the pixel on the left, above, and both
        torch.sub(values[: end - 1], values[1:end], out=by_column[1:end])
        torch.sub(values[first - pitch : end - pitch], values[first:end], out=by_row[first:end])
        torch.sub(by_column[first - pitch : end - pitch], by_column[first:end], out=by_both[first:end])
        # The factors of each weight, [row][column]: the value, its difference from the one before, and that of the one after.
        factors = [
            [source[first + shift : first + shift + count] for source, shift in row]
            for row in (
                ((values, 0), (by_column, 0), (by_column, 1)),
                ((by_row, 0), (by_both, 0), (by_both, 1)),
                ((by_row, pitch), (by_both, pitch), (by_both, pitch + 1)),
            )
        ]

        shared, left, right, of_row, of_pixel = sums[:, :count].unbind()
        if self.bias is None:
            torch.mm(factors[0][0], self.weights[0][0], out=shared)
        else:
            torch.addmm(self.bias, factors[0][0], self.weights[0][0], out=shared)
        for column, of_column in ((1, left), (2, right)):
            torch.addmm(shared, factors[0][column], self.weights[0][column], out=of_column)
        for row in (1, 2):
            torch.mm(factors[row][0], self.weights[row][0], out=of_row)
            for column, of_column in ((1, left), (2, right)):
                torch.addmm(of_row, factors[row][column], self.weights[row][column], out=of_pixel)
                summands = (t.unflatten(0, (rows, pitch))[:, :width] for t in (of_column, of_pixel))
                torch.add(*summands, out=out[:, row - 1, :, column - 1])
