"""Statistics that a kernel computes while writing a map, for the next norm: when they pay off, and the size of each part.

The epilogue and the interleaving know every value they store, so the norm reads the map once rather than twice. The price is 16
bytes per group and part, written and read. In channels_last with 32 groups that is 1/4 of what the norm saves for maps of up to 2
MB, 1/16 at 8 MB and 1/128 from 64 MB on.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

THREADS = 256  # of a block, each with accesses of 16 bytes; the same in csrc/kernels/epilogue.cu and upsampling_interleave.cu
QUAD = 4  # values whose moments are computed at once; the same in csrc/kernels/chunk_statistics.cuh
TARGET_BLOCKS, MAX_ROUNDS = 512, 32  # one wave of four blocks per multiprocessor of an H100; accesses of a thread
INTERLEAVED_BYTES, INTERLEAVED_COLUMNS = 128, 32  # of a pixel, and pixels of a row, that a block interleaves at once


class MeasuredMap(NamedTuple):
    """A map and, if the kernel that wrote it left them, the statistics of its parts for the next norm.

    Attributes:
        values: ``(B, C, H, W)``.
        statistics: ``(B, groups, parts, 4)`` in float32, see `NormOptions`, or None.
    """

    values: Tensor
    statistics: Tensor | None = None


def chunk_pixels(x: Tensor, groups: int, *others: Tensor | None) -> int | None:
    """Return the pixels of one part of the statistics that the epilogue leaves of x, or None if it leaves none.

    Args:
        x: ``(B, C, H, W)``, dense in NCHW or channels_last, on a GPU.
        groups: of the norm that reads x next; 0 if none does.
        others: the tensors added to x, or None.
    """
    batch, channels, height, width = x.shape
    pixels, access = height * width, 16 // x.itemsize
    if groups < 1 or channels % groups or not _is_aligned(x, *others):
        return None
    if x.is_contiguous():
        if pixels % access:
            return None
        columns = min(pixels // access, THREADS)
        blocks = -(-pixels // (columns * access)) * -(-batch * channels // (THREADS // columns))
        return _rounds(blocks) * THREADS * access
    if channels % access or channels > THREADS * access or channels // groups % QUAD:
        return None
    rows = THREADS * access // channels
    return _rounds(batch * -(-pixels // rows)) * rows


def chunk_columns(windows: Tensor, groups: int, bias: Tensor | None) -> int | None:
    """Return the columns of one part of the statistics that the interleaving leaves of its result, or None if it leaves none.

    Args:
        windows: ``(B, 4 * C, H + 1, W + 1)`` in channels_last, on a GPU.
        groups: of the norm that reads the result next; 0 if none does.
        bias: the bias added to the result, or None.
    """
    batch, channels, rows, columns = windows.shape[0], windows.shape[1] // 4, 2 * windows.shape[2] - 2, 2 * windows.shape[3] - 2
    access, tile_channels = 16 // windows.itemsize, INTERLEAVED_BYTES // windows.itemsize
    if groups < 1 or channels % groups or channels % access or not _is_aligned(windows, bias):
        return None
    group_channels = channels // groups
    if group_channels % QUAD or tile_channels % group_channels:
        return None
    blocks = batch * rows * -(-columns // INTERLEAVED_COLUMNS) * -(-channels // tile_channels)
    return max(_rounds(blocks), 2) * INTERLEAVED_COLUMNS  # a thread has two loads in flight


def _rounds(blocks: int) -> int:
    """Return the accesses of a thread, where `blocks` blocks of one access per thread would cover the map."""
    return min(max(blocks // TARGET_BLOCKS, 1), MAX_ROUNDS)


def _is_aligned(*tensors: Tensor | None) -> bool:
    for tensor in tensors:
        if tensor is not None and tensor.data_ptr() % 16:
            return False
    return True
