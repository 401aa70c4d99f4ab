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

from .winograd import MAX_BLOCK_BYTES, MIN_BLOCK_COLUMNS, factors_serve, weight_factors

MIN_CHANNELS = 128  # of the input: with fewer, a pass over the values takes as long as the products that are saved
MIN_PIXELS = 64  # of all maps: for fewer, the factors take longer than they save
FACTORS = 9  # matrices that take the place of a weight
HALO = 2  # rows, and columns


def winograd_upsampling_is_faster(weight: Tensor, pixels: int, max_bytes: int) -> bool:
    """Return True if `WinogradUpsampling` is faster than folded weights and takes at most ``max_bytes``.

    Always False unless `factors_serve`.

    Args:
        weight: ``(out, in, 3, 3)``.
        pixels: of all maps, before upsampling.
        max_bytes: the weight's factors may take two thirds.
    """
    return weight.shape[1] >= MIN_CHANNELS and pixels >= MIN_PIXELS and factors_serve(weight, FACTORS, max_bytes)


class WinogradUpsampling:
    """``conv2d(interpolate(x, scale_factor=2.0), weight, bias, padding=1)`` for strips in channels_last. Threads may share it.

    Args:
        weight: ``(out, in, 3, 3)``, float32 or float64, on the CPU.
        bias: ``(out,)`` or None.
        max_bytes: limit for the weight's factors plus each thread's block of pixels. A block has at least 16 pixels of one row.
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
        pixels = pixels.unflatten(1, (-1, 2)).unflatten(0, (-1, 2))  # (rows, 2, columns, 2, channels)
        height, _, width = pixels.shape[:3]
        rows, columns = self._block_size(height, width)
        values = image.new_empty(4, (rows + HALO) * (columns + HALO) + 2, self.channels)  # stays in the cache
        sums = image.new_empty(5, rows * (columns + HALO), self.out_channels)
        for row in range(0, height, rows):
            for column in range(0, width, columns):
                block = pixels[row : row + rows, :, column : column + columns]
                pitch = self._copy_haloed(values[0], image, row + halo[0], column, block.shape[0], block.shape[2])
                self._write_block(block, values, sums, pitch)

    def _block_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of a block of the small map, as many as its memory allows."""
        columns = width
        while columns > MIN_BLOCK_COLUMNS and self._values(1, columns) > self.block_values:
            columns = -(-columns // 2)
        row = self._values(2, columns) - self._values(1, columns)
        most = max(1, 1 + (self.block_values - self._values(1, columns)) // row)
        return -(-height // -(-height // most)), columns

    def _values(self, rows: int, columns: int) -> int:
        """Return the number of values in all tensors of a block."""
        shared = 4 * ((rows + HALO) * (columns + HALO) + 2) * self.channels
        return shared + 5 * rows * (columns + HALO) * self.out_channels

    def _copy_haloed(self, values: Tensor, image: Tensor, row: int, column: int, rows: int, columns: int) -> int:
        """Copy a block of the image ``(H, W, in)`` and its halo to values, ``(pixels, in)``. Return the pitch of its rows.

        The halo is zero outside the image. One pixel lies before the first row's pixels: its left neighbour. Between two rows lie
        the right neighbour of the first and the left neighbour of the second: one pixel if both are zero.
        """
        height, width = image.shape[:2]
        pitch = columns + (1 if columns == width else HALO)
        first, last = max(row - 1, 0), min(row + rows + 1, height)
        start = first - (row - 1)  # row of the block
        inside = slice(start, start + last - first)
        count = rows + HALO
        middle = values[1 : 1 + count * pitch].unflatten(0, (count, pitch))
        if first > row - 1:
            middle[0].zero_()
        if last < row + rows + 1:
            middle[-1].zero_()
        left, right = values[: count * pitch : pitch], middle[:, columns]
        for edge, neighbour in ((left, column - 1), (right, column + columns)):
            edge.zero_()
            if 0 <= neighbour < width:
                edge[inside] = image[first:last, neighbour]
        middle[inside, :columns] = image[first:last, column : column + columns]
        return pitch

    def _write_block(self, out: Tensor, values: Tensor, sums: Tensor, pitch: int) -> None:
        """Write the pixels of a block.

        Args:
            out: ``(rows, 2, columns, 2, out)``.
            values: ``(4, pixels, in)``. The first are the block's, see `_copy_haloed`, the others memory for differences.
            sums: memory, ``(5, pixels, out)``.
            pitch: pixels from one row to the next.
        """
        rows, _, columns = out.shape[:3]
        count, end = rows * pitch, (rows + HALO) * pitch + 1
        first = pitch + 1  # pixel of the block
        value, by_column, by_row, by_both = values  # differences from the pixel on the left, above, and both
        torch.sub(value[: end - 1], value[1:end], out=by_column[1:end])
        torch.sub(value[first - pitch : end - pitch], value[first:end], out=by_row[first:end])
        torch.sub(by_column[first - pitch : end - pitch], by_column[first:end], out=by_both[first:end])
        # By [row][column] of the weights. In each direction: a value, its difference from the previous one, and the next
        # difference.
        factors = [
            [source[first + shift : first + shift + count] for source, shift in row]
            for row in (
                ((value, 0), (by_column, 0), (by_column, 1)),
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
                summands = (t.unflatten(0, (rows, pitch))[:, :columns] for t in (of_column, of_pixel))
                torch.add(*summands, out=out[:, row - 1, :, column - 1])
