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
from .winograd_filters import MIN_CHANNELS, TILE, ColumnTransforms, as_matrix

WINOGRAD_BYTES = 40 << 20  # usual limit of a convolution: the factors of 512 x 512 weights take 24 MiB
# For all tensors of the blocks that threads compute at once, for each tap in time: every block reads the factors of all taps.
MAX_BLOCK_BYTES = 16 << 20
MIN_BLOCK_COLUMNS = 16
PART_COLUMNS = 1 << 16  # of the matrix of a weight's taps: each thread computes the factors of a few large parts
# Costs in units of one multiplication of a direct convolution, from measured times on a CPU with AVX-512.
PRODUCT_COST = 1.25
TRANSFORM_COST = 50  # of a value that a transform writes
FACTOR_COST = 20  # of a weight's factor, which is computed once and read for every strip and frame
STRIP_COST = 2e7  # of a strip: about fifty operators more than for a direct convolution, 0.2 ms


def winograd_is_faster(weight: Tensor, strips: Sequence[tuple[int, int]], max_bytes: int, frames: int = 1) -> bool:
    """Return True if a `WinogradConvolution` of these strips is faster than a direct one, and as exact.

    Counts operations. Always False unless `factors_serve`.

    Args:
        weight: ``(out, in, rows, columns)``.
        strips: rows and columns of each strip of the output.
        max_bytes: the weight's factors may take two thirds.
        frames: of a clip, computed together.
    """
    out_channels, channels, *kernel = weight.shape
    if kernel != [3, 3] or channels < MIN_CHANNELS or not factors_serve(weight, TILE.products, max_bytes):
        return False
    factors = TILE.products * out_channels * channels
    tiles = frames * sum(-(-rows // TILE.rows.outputs) * -(-columns // TILE.columns.outputs) for rows, columns in strips)
    direct_cost = weight.numel() * frames * sum(rows * columns for rows, columns in strips)
    cost = tiles * _tile_cost(channels, out_channels) + STRIP_COST * len(strips)
    return cost + FACTOR_COST * factors * (1 + frames * len(strips)) < direct_cost


def _tile_cost(channels: int, out_channels: int) -> float:
    rows, columns = TILE
    values = rows.products * columns.outputs * (channels + out_channels)  # between the filters
    values += TILE.products * channels + TILE.outputs * out_channels
    return PRODUCT_COST * TILE.products * channels * out_channels + TRANSFORM_COST * values


def factors_serve(weight: Tensor, products: int, max_bytes: int) -> bool:
    """Return True if this many factors may replace each of a weight's kernels: products are exact, and memory suffices.

    Always False unless the weight is on a CPU in float32 or float64, outside autocast, and float32 products are not rounded to
    fewer bits.

    Args:
        weight: ``(out, in, ...)``.
        products: factors of each pair of channels.
        max_bytes: the factors may take two thirds.
    """
    out_channels, channels = weight.shape[:2]
    factor_bytes = products * out_channels * channels * weight.itemsize
    return weight.device.type == "cpu" and _computes_exactly(weight.dtype) and factor_bytes <= max_bytes * 2 // 3


def _computes_exactly(dtype: torch.dtype) -> bool:
    """True if matrix products on a CPU are computed in this dtype, float32 or float64."""
    if dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return dtype == torch.float64 or precision in ("none", "ieee")  # set by torch.set_float32_matmul_precision


def weight_factors(weight: Tensor, from_taps: Tensor, threads: int) -> Tensor:
    """Return the factors of a weight, ``(products, taps, out, in)``.

    Args:
        weight: ``(out, in, 3, 3)`` or ``(out, in, taps, 3, 3)`` with taps in time.
        from_taps: ``(products, 9)``.
        threads: how many compute them.
    """
    out_channels, channels = weight.shape[:2]
    weight = weight.reshape(out_channels, channels, -1, 9)
    taps = weight.shape[2]
    factors = weight.new_empty(len(from_taps), taps, out_channels, channels)
    size = max(1, min(PART_COLUMNS // channels, -(-out_channels // threads)))

    def write_factors(first: int) -> None:
        part = slice(first, first + size)
        for tap in range(taps):
            columns = weight[part, :, tap].movedim(2, 0).flatten(1)  # a view, or in channels_last a copy of whole pixels
            torch.mm(from_taps, columns, out=factors[:, tap, part].flatten(1))

    run_in_threads(write_factors, range(0, out_channels, size), threads)
    return factors


class WinogradConvolution:
    """``conv2d(x, weight, bias, padding=(0, 1))`` for an image in channels_last. Threads may share it.

    With taps in time: ``conv3d(x, weight, bias, padding=(0, 0, 1))`` for a clip, whose frames are in the first dimension. The
    products of all taps in time are summed before they are transformed to pixels, and a frame is transformed once for all taps.

    Args:
        weight: ``(out, in, 3, 3)`` or ``(out, in, taps, 3, 3)``, float32 or float64, on the CPU.
        bias: ``(out,)`` or None.
        max_bytes: limit for the weight's factors plus each thread's block of pixels. A block has at least one row of tiles, 16
            pixels wide.
        threads: how many may share it.
        repeats_first_frame: first prepend the first frame of x ``taps - 1`` times.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, max_bytes: int, threads: int = 1, *, repeats_first_frame: bool = False
    ) -> None:
        self.tile, self.bias, self.repeats_first_frame = TILE, bias, repeats_first_frame
        self.out_channels, self.channels = weight.shape[:2]
        self.taps = weight[0, 0].numel() // 9
        self.from_rows, self.to_rows = TILE.row_transforms(weight.dtype, bias is not None)
        factors = weight_factors(weight, TILE.taps_matrix(weight.dtype), threads)
        self.factors = factors.unflatten(0, (TILE.rows.products, TILE.columns.products))
        self.weights = [point.mT.unbind(1) for point in self.factors]  # (columns.products, in, out) of every tap in time
        self.block_bytes = min(max_bytes - self.factors.nbytes, MAX_BLOCK_BYTES * self.taps) // threads

    def write_to(self, out: Tensor, x: Tensor) -> None:
        """Write the convolution of x ``(1, in, H + 2, W)`` to out ``(1, out, H, W)``.

        A clip x has ``T + taps - 1`` frames and out T, or with repeats_first_frame both have T frames.
        """
        self._convolve(out, x, beta=0)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the convolution of x to out, in place. Shapes are as for `write_to`."""
        self._convolve(out, x, beta=1)

    def _convolve(self, out: Tensor, x: Tensor, beta: int) -> None:
        """Write ``beta * out + conv(x)`` to out, block by block."""
        pixels, images = out.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)  # (frames, rows, columns, channels)
        frames, height, width = pixels.shape[:3]
        groups, tiles = self._block_size(len(x), frames, height, width)
        memory = pixels.new_empty(self._values(len(x), frames, groups, tiles))  # stays in the cache
        rows, columns = groups * self.tile.rows.outputs, tiles * self.tile.columns.outputs
        for row in range(0, height, rows):
            for column in range(0, width, columns):
                block = pixels[:, row : row + rows, column : column + columns]
                self._write_block(block, images[:, row : row + block.shape[1] + self.tile.rows.taps - 1], column, beta, memory)

    def _block_size(self, x_frames: int, frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the tiles of a block in a column and in a row, as many as its memory allows."""
        rows, columns = self.tile
        groups, tiles = -(-height // rows.outputs), -(-width // columns.outputs)
        most = self.block_bytes // self.factors.itemsize
        while tiles * columns.outputs > MIN_BLOCK_COLUMNS and self._values(x_frames, frames, 1, tiles) > most:
            tiles = -(-tiles // 2)
        most_groups = max(1, most // self._values(x_frames, frames, 1, tiles))
        return -(-groups // -(-groups // most_groups)), tiles

    def _write_block(self, out: Tensor, x: Tensor, first: int, beta: int, memory: Tensor) -> None:
        """Write a block of all frames.

        Args:
            out: ``(T, H, W, out)``.
            x: ``(frames of x, H + 2, columns, in)``, with all columns.
            first: the block's first column.
            beta: see `_convolve`.
            memory: for all values between x and out.
        """
        rows, columns = self.tile
        frames, height, width = out.shape[:3]
        groups, tiles = -(-height // rows.outputs), -(-width // columns.outputs)
        shapes = self._shapes(len(x), frames, groups, tiles)
        sizes = [math.prod(shape) for shape in shapes]
        row_factors, factors, products, row_products = (
            part.view(shape) for part, shape in zip(memory[: sum(sizes)].split(sizes), shapes, strict=True)
        )

        # Rows of the input. Columns outside the map are zero.
        left, right = max(first - 1, 0), min(first - 1 + row_factors.shape[3], x.shape[2])
        inside = slice(left - first + 1, right - first + 1)
        row_factors[:, :, :, : inside.start] = 0
        row_factors[:, :, :, inside.stop :] = 0
        for frame, image in enumerate(x[:, :, left:right]):
            self._transform_rows(image, row_factors[:, frame, :, inside])

        neighbours = row_factors.unfold(3, columns.products, columns.outputs).permute(0, 5, 1, 2, 3, 4)
        transforms = ColumnTransforms(neighbours, factors, products, row_products[: rows.products].movedim(-2, 1))
        terms = self._terms(factors.flatten(1, 3), products.flatten(1, 3), groups * tiles)
        for row, weights in enumerate(self.weights):
            transforms.write_factors(row)
            for tap, part, out_part in terms:
                torch.baddbmm(out_part, part, weights[tap], beta=int(tap > 0), out=out_part)
            transforms.write_sums(row)

        if self.bias is not None:
            row_products[rows.products] = self.bias
        for frame, image in enumerate(out):
            self._write_rows(image, row_products[:, frame].flatten(2, 3)[:, :, :width], beta)

    def _transform_rows(self, image: Tensor, out: Tensor) -> None:
        """Write the factors of rows.

        Args:
            image: ``(H + 2, columns, in)``.
            out: ``(rows.products, groups, columns, in)``. Rows below the image are zero.
        """
        rows = self.tile.rows
        whole, rest = divmod(len(image) - (rows.taps - 1), rows.outputs)
        if whole:
            groups = image.unfold(0, rows.products, rows.outputs).permute(0, 3, 1, 2).flatten(2)  # views: each is a matrix
            torch.bmm(self.from_rows.expand(whole, -1, -1), groups, out=_as_matrices(out[:, :whole]))
        if rest:
            values = image[whole * rows.outputs :]
            torch.mm(self.from_rows[:, : len(values)], values.flatten(1), out=as_matrix(out[:, whole]))

    def _write_rows(self, out: Tensor, products: Tensor, beta: int) -> None:
        """Write ``beta * out`` plus the rows that products of rows make.

        Args:
            out: ``(H, W, out)``.
            products: ``(to_rows.shape[1], groups, W, out)``.
            beta: see `_convolve`.
        """
        outputs = self.tile.rows.outputs
        whole, rest = divmod(len(out), outputs)
        if whole:
            part = as_matrix(out[: whole * outputs]).unflatten(0, (whole, outputs))
            to_rows = self.to_rows.expand(whole, -1, -1)
            torch.baddbmm(part, to_rows, _as_matrices(products[:, :whole]), beta=beta, out=part)
        if rest:
            part = as_matrix(out[-rest:])
            torch.addmm(part, self.to_rows[:rest], products[:, whole].flatten(1), beta=beta, out=part)

    def _terms(self, factors: Tensor, products: Tensor, tiles: int) -> list[tuple[int, Tensor, Tensor]]:
        """Return the terms of products, ``out += part @ weights[tap]``, from the first tap in time to the last.

        Args:
            factors: of the frames of x, ``(columns.products, frames * tiles, in)``.
            products: ``(columns.products, T * tiles, out)``.
            tiles: of a frame.

        Returns:
            ``(tap, part, out)`` for each: parts of factors and of products.
        """
        terms, frames = [], products.shape[1] // tiles
        for tap in range(self.taps):
            # Frames of the result for which this tap falls on a repetition of the first frame.
            repeated = min(self.taps - 1 - tap, frames) if self.repeats_first_frame else 0
            for frame in range(repeated):
                terms.append((tap, factors[:, :tiles], products[:, frame * tiles : (frame + 1) * tiles]))
            if repeated < frames:
                start = 0 if self.repeats_first_frame else tap
                part = factors[:, start * tiles : (start + frames - repeated) * tiles]
                terms.append((tap, part, products[:, repeated * tiles :]))
        return terms

    def _shapes(self, x_frames: int, frames: int, groups: int, tiles: int) -> list[tuple[int, ...]]:
        """Return the shapes of a block's tensors."""
        rows, columns = self.tile
        return [
            (rows.products, x_frames, groups, tiles * columns.outputs + columns.taps - 1, self.channels),
            (columns.products, x_frames, groups, tiles, self.channels),
            (columns.products, frames, groups, tiles, self.out_channels),
            (self.to_rows.shape[1], frames, groups, tiles, columns.outputs, self.out_channels),
        ]

    def _values(self, x_frames: int, frames: int, groups: int, tiles: int) -> int:
        return sum(map(math.prod, self._shapes(x_frames, frames, groups, tiles)))


def _as_matrices(values: Tensor) -> Tensor:
    """Return ``(products, groups, columns, C)`` as a view with one matrix for each group, ``(groups, products, columns * C)``."""
    return values.view(*values.shape[:2], -1).transpose(0, 1)
