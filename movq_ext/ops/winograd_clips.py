"""Winograd convolutions of clips on a CPU, with taps in time: see `winograd` for the filters in space.

The products of all taps in time are summed before they are transformed to pixels, and a frame is transformed once for all taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .native import is_inference
from .thread_pool import run_in_threads
from .winograd import winograd_is_faster
from .winograd_filters import TILE, as_matrix

FACTOR_BYTES = 40 << 20  # of one tap in time, and half as many again: see `winograd_is_faster`
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
    return winograd_is_faster(weight[:, :, 0], [(height, width)] * frames, FACTOR_BYTES)


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
    convolution = WinogradClipConvolution(weight, bias, repeats_first_frame)
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
        source = images[image, :, max(first - 1, 0) : last + 1].contiguous()
        result = source.new_empty(out_frames, last - first, width, len(weight))
        convolution.write_to(result, source, above=first > 0)
        results[image, :, first:last] = result

    run_in_threads(convolve_strip, [(image, first) for image in range(batch) for first in range(0, height, rows)])
    return out


class WinogradClipConvolution:
    """``conv3d(x, weight, bias, padding=(0, 0, 1))`` of strips of a clip. Threads may share it.

    Args:
        weight, bias, repeats_first_frame: as for `convolve_clip`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, repeats_first_frame: bool) -> None:
        self.bias, self.repeats_first_frame = bias, repeats_first_frame
        self.out_channels, self.channels, self.taps = weight.shape[:3]
        rows, columns = TILE
        from_taps = TILE.taps_matrix(weight.dtype)
        self.from_rows, self.from_columns, self.to_columns, self.to_rows = TILE.transforms(weight.dtype, bias is not None)
        factors = from_taps @ weight.permute(3, 4, 2, 1, 0).reshape(from_taps.shape[1], -1)
        self.factors = factors.view(rows.products, columns.products, self.taps, self.channels, self.out_channels)

    def write_to(self, out: Tensor, x: Tensor, above: bool) -> None:
        """Write the convolution of x ``(T + taps - 1, rows, W, C)`` to out ``(T, H, W, out)``, both contiguous.

        With repeats_first_frame x has T frames. It has the rows of out, the row above them if ``above``, and the row below them
        unless the map ends there. Other rows are zero.
        """
        rows, columns = TILE
        frames, height, width = out.shape[:3]
        groups, tiles = -(-height // rows.outputs), -(-width // columns.outputs)
        row_factors = x.new_zeros(rows.products, len(x), groups, tiles * columns.outputs + columns.taps - 1, self.channels)
        for frame, values in enumerate(x):
            for group in range(groups):
                first = group * rows.outputs - (0 if above else 1)  # row of x, -1 above the map
                inside = values[max(first, 0) : first + rows.products]
                from_rows = self.from_rows[:, max(-first, 0) :][:, : len(inside)]
                torch.mm(from_rows, inside.flatten(1), out=as_matrix(row_factors[:, frame, group, 1 : width + 1]))

        neighbours = x.new_empty(columns.products, len(x) * groups, tiles, self.channels)
        factors = x.new_empty(columns.products, len(x) * groups * tiles, self.channels)
        products = x.new_empty(columns.products, frames * groups * tiles, self.out_channels)
        row_products = x.new_empty(self.to_rows.shape[1], frames * groups * tiles, columns.outputs, self.out_channels)
        to_columns = self.to_columns.expand(frames * groups * tiles, -1, -1)
        for point, weights in enumerate(self.factors):
            windows = row_factors[point].flatten(0, 1).unfold(1, columns.products, columns.outputs)
            neighbours.copy_(windows.permute(3, 0, 1, 2))
            torch.mm(self.from_columns, as_matrix(neighbours), out=as_matrix(factors))
            for factor, weight, product in zip(factors, weights, products, strict=True):
                self._sum_taps(factor.unflatten(0, (len(x), -1)), weight, product.unflatten(0, (frames, -1)))
            torch.bmm(to_columns, products.transpose(0, 1), out=row_products[point])

        if self.bias is not None:
            row_products[rows.products] = self.bias
        pixels = row_products.view(-1, frames, groups, tiles * columns.outputs, self.out_channels)[:, :, :, :width]
        for frame, outputs in enumerate(out):
            for group, part in enumerate(outputs.split(rows.outputs)):
                torch.mm(self.to_rows[: len(part)], pixels[:, frame, group].flatten(1), out=as_matrix(part))

    def _sum_taps(self, factors: Tensor, weights: Tensor, products: Tensor) -> None:
        """Write the sum over all taps in time of ``factors[frame] @ weights[tap]`` to products.

        Args:
            factors: of the frames, ``(frames of x, tiles, C)``.
            weights: ``(taps, C, out)``.
            products: ``(T, tiles, out)``.
        """
        products.zero_()
        for tap, weight in enumerate(weights):
            missing = min(self.taps - 1 - tap, len(products)) if self.repeats_first_frame else 0
            if missing:  # frames of the result for which this tap falls on a repetition
                products[:missing] += factors[0] @ weight
            target = products[missing:].flatten(0, 1)
            start = 0 if self.repeats_first_frame else tap
            source = factors[start : start + len(products) - missing].flatten(0, 1)
            torch.addmm(target, source, weight, out=target)
