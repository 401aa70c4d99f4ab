"""3x3 convolutions of strips on a CPU with a third of the multiplications: Winograd's minimal filtering.

All transforms of `MinimalFilter` are linear, so the sum over the input channels can be taken between them: one matrix product for
every point. F(4, 3) on rows and F(2, 3) on columns are nested: 6 * 4 products for a tile of 4 * 2 pixels, where the direct sum
takes 72.

Everything is a matrix product, small ones for the transforms and large ones over the channels. A block of pixels goes through all
of them, so intermediate results stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .thread_pool import run_in_threads
from .winograd_filters import MIN_CHANNELS, TILE, as_matrix

MAX_BLOCK_BYTES = 16 << 20  # for all tensors of the blocks that threads compute at once
MIN_BLOCK_COLUMNS = 16
# Costs in units of one multiplication of a direct convolution, from measured times on a CPU with AVX-512.
PRODUCT_COST = 1.25
TRANSFORM_COST = 50  # of a value that a transform writes
FACTOR_COST = 40  # of a weight's factor, beyond what packing for the direct convolution costs


def winograd_is_faster(weight: Tensor, strips: Sequence[tuple[int, int]], max_bytes: int) -> bool:
    """Return True if a `WinogradConvolution` of these strips is faster than a direct one, and as exact.

    Counts operations. Always False unless the weight is on a CPU in float32 or float64, outside autocast, and float32 products
    are not rounded to fewer bits.

    Args:
        weight: ``(out, in, rows, columns)``.
        strips: rows and columns of each strip of the output.
        max_bytes: the weight's factors may take two thirds.
    """
    out_channels, channels, *kernel = weight.shape
    if weight.device.type != "cpu" or kernel != [3, 3] or not _computes_exactly(weight.dtype):
        return False
    factors = TILE.products * out_channels * channels
    if channels < MIN_CHANNELS or factors * weight.itemsize > max_bytes * 2 // 3:
        return False
    tiles = sum(-(-rows // TILE.rows.outputs) * -(-columns // TILE.columns.outputs) for rows, columns in strips)
    direct_cost = weight.numel() * sum(rows * columns for rows, columns in strips)
    return tiles * _tile_cost(channels, out_channels) + FACTOR_COST * factors < direct_cost


def _tile_cost(channels: int, out_channels: int) -> float:
    rows, columns = TILE
    values = rows.products * columns.outputs * (channels + out_channels)  # between the filters
    values += TILE.products * channels + TILE.outputs * out_channels
    return PRODUCT_COST * TILE.products * channels * out_channels + TRANSFORM_COST * values


def _computes_exactly(dtype: torch.dtype) -> bool:
    """True if matrix products on a CPU are computed in this dtype, float32 or float64."""
    if dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return dtype == torch.float64 or precision in ("none", "ieee")  # set by torch.set_float32_matmul_precision


class WinogradConvolution:
    """``conv2d(x, weight, bias, padding=(0, 1))`` for one image in channels_last. Threads may share it.

    Args:
        weight: ``(out, in, 3, 3)``, float32 or float64, on the CPU.
        bias: ``(out,)`` or None.
        max_bytes: limit for the weight's factors plus each thread's block of pixels. A block has at least one row of tiles, 16
            pixels wide.
        threads: how many may share it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, max_bytes: int, threads: int = 1) -> None:
        self.tile, self.bias = TILE, bias
        self.out_channels, self.channels = weight.shape[:2]
        rows, columns = TILE
        from_taps = TILE.taps_matrix(weight.dtype)
        self.from_rows, self.from_columns, self.to_columns, self.to_rows = TILE.transforms(weight.dtype, bias is not None)
        factors = weight.new_empty(TILE.products, self.channels, self.out_channels)

        def write_factors(channels: slice) -> None:
            taps = weight[:, channels].permute(2, 3, 1, 0).reshape(from_taps.shape[1], -1)
            torch.mm(from_taps, taps, out=factors[:, channels].flatten(1))

        size = -(-self.channels // threads)
        run_in_threads(write_factors, [slice(first, first + size) for first in range(0, self.channels, size)])
        self.factors = factors.view(rows.products, columns.products, self.channels, self.out_channels)
        self.block_bytes = min(max_bytes - self.factors.nbytes, MAX_BLOCK_BYTES) // threads

    def write_to(self, out: Tensor, x: Tensor) -> None:
        """Write the convolution of x ``(1, in, H + 2, W)`` to out ``(1, out, H, W)``."""
        self._convolve(out, x, beta=0)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the convolution of x ``(1, in, H + 2, W)`` to out ``(1, out, H, W)``, in place."""
        self._convolve(out, x, beta=1)

    def _convolve(self, out: Tensor, x: Tensor, beta: int) -> None:
        """Write ``beta * out + conv(x)`` to out, block by block."""
        pixels, image = out[0].permute(1, 2, 0), x[0].permute(1, 2, 0)  # (rows, columns, channels)
        height, width = pixels.shape[:2]
        groups, tiles = self._block_size(height, width)
        memory = pixels.new_empty(self._values(groups, tiles))  # stays in the cache
        rows, columns = groups * self.tile.rows.outputs, tiles * self.tile.columns.outputs
        for row in range(0, height, rows):
            for column in range(0, width, columns):
                block = pixels[row : row + rows, column : column + columns]
                self._write_block(block, image[row : row + len(block) + self.tile.rows.taps - 1], column, beta, memory)

    def _block_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the tiles of a block in a column and in a row, as many as its memory allows."""
        rows, columns = self.tile
        groups, tiles = -(-height // rows.outputs), -(-width // columns.outputs)
        itemsize = self.factors.itemsize
        while tiles * columns.outputs > MIN_BLOCK_COLUMNS and self._values(1, tiles) * itemsize > self.block_bytes:
            tiles = -(-tiles // 2)
        most = max(1, self.block_bytes // (self._values(1, tiles) * itemsize))
        return -(-groups // -(-groups // most)), tiles

    def _write_block(self, out: Tensor, x: Tensor, first: int, beta: int, memory: Tensor) -> None:
        """Write a block ``(H, W, out)``. x ``(H + 2, columns, in)`` has all columns, and the block's first is ``first``."""
        rows, columns = self.tile
        groups, tiles = -(-out.shape[0] // rows.outputs), -(-out.shape[1] // columns.outputs)
        shapes = self._shapes(groups, tiles)
        sizes = [math.prod(shape) for shape in shapes]
        row_factors, neighbours, factors, products, row_products = (
            part.view(shape) for part, shape in zip(memory[: sum(sizes)].split(sizes), shapes, strict=True)
        )

        # Rows of the input. Columns outside the map are zero.
        left, right = max(first - 1, 0), min(first - 1 + row_factors.shape[2], x.shape[1])
        inside = slice(left - first + 1, right - first + 1)
        row_factors[:, :, : inside.start] = 0
        row_factors[:, :, inside.stop :] = 0
        for group in range(groups):
            values = x[group * rows.outputs :][: rows.products, left:right]
            torch.mm(self.from_rows[:, : len(values)], values.flatten(1), out=as_matrix(row_factors[:, group, inside]))

        for point, weights in enumerate(self.factors):
            neighbours.copy_(row_factors[point].unfold(1, columns.products, columns.outputs).permute(3, 0, 1, 2))
            torch.mm(self.from_columns, as_matrix(neighbours), out=as_matrix(factors))
            for factor, weight, product in zip(factors, weights, products, strict=True):
                torch.mm(factor, weight, out=product)
            to_columns = self.to_columns.expand(groups * tiles, -1, -1)
            torch.bmm(to_columns, products.transpose(0, 1), out=row_products[point])

        if self.bias is not None:
            row_products[rows.products] = self.bias
        row_products = row_products.view(-1, groups, tiles * columns.outputs, self.out_channels)[:, :, : out.shape[1]]
        for group in range(groups):
            outputs = out[group * rows.outputs :][: rows.outputs]
            to_rows = self.to_rows[: len(outputs)]
            torch.addmm(as_matrix(outputs), to_rows, row_products[:, group].flatten(1), beta=beta, out=as_matrix(outputs))

    def _shapes(self, groups: int, tiles: int) -> list[tuple[int, ...]]:
        """Return the shapes of a block's tensors."""
        rows, columns = self.tile
        count = groups * tiles
        return [
            (rows.products, groups, tiles * columns.outputs + columns.taps - 1, self.channels),
            (columns.products, groups, tiles, self.channels),
            (columns.products, count, self.channels),
            (columns.products, count, self.out_channels),
            (self.to_rows.shape[1], count, columns.outputs, self.out_channels),
        ]

    def _values(self, groups: int, tiles: int) -> int:
        return sum(map(math.prod, self._shapes(groups, tiles)))
