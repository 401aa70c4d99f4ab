"""Divide a map into strips, by counted rows: for threads that each take the next strip, within their memory."""

from __future__ import annotations

from collections.abc import Sequence

HALO = 2  # input rows of a 3x3 convolution that its output lacks: one above and one below
# Rows of a strip without a memory limit: a Winograd convolution computes four at a time, and every strip normalises HALO more.
MIN_ROWS = 4

Span = tuple[int, int]  # (first, last) of a strip, which has rows first to last - 1


def divide_rows(height: int, max_rows: int, workers: int) -> list[Span]:
    """Return strips of at most max_rows rows that give the busiest of the workers the fewest rows, halos included.

    Heights are a power of two, so that most strips hold whole cells of zq, or divide the map evenly between the workers.
    """
    candidates = [1 << exponent for exponent in range(max_rows.bit_length())]
    even = -(-height // workers)
    if workers > 1:
        candidates = [rows for rows in candidates if rows >= MIN_ROWS]
        even = _next_multiple(even, MIN_ROWS)
    if even <= max_rows:
        candidates.append(even)
    rows = min(candidates, key=lambda rows: (busiest_rows(height, rows, workers), -rows))
    return [(first, min(first + rows, height)) for first in range(0, height, rows)]


def busiest_rows(height: int, rows: int, workers: int) -> int:
    """Return how many rows with their halos the busiest worker computes, for strips of this many rows."""
    strips = -(-height // rows)
    most = -(-strips // workers) * (rows + HALO)
    last_is_alone = (strips - 1) % workers == 0
    return most - (strips * rows - height) if last_is_alone else most


def divide_reused_rows(
    spans: Sequence[Span], workers: int, channels: int, reused_channels: int, first_stored: int = 0
) -> list[Sequence[Span]]:
    """Divide a map that reuses a larger map's storage into groups of strips, which threads may compute in any order.

    Each strip reads its own rows of the larger map, and overwrites rows above them that an earlier group must have read. So one
    worker computes the first rows alone, until two strips of MIN_ROWS fit over rows that were read. Later groups have a strip for
    each worker, and their heights grow.

    Args:
        spans: how strips would be divided without this rule. None of the groups has a higher one.
        workers: threads that compute the strips of a group.
        channels, reused_channels: of the map and of the larger one.
        first_stored: the row of both maps with which the storage starts.
    """
    if workers == 1 or channels == reused_channels:
        return [spans]
    max_rows = max(MIN_ROWS, max(last - first for first, last in spans))
    # Above row r, the larger map's rows hold r * reused_channels // channels of this map's.
    serial_end = first_stored + -(-2 * MIN_ROWS * channels // (reused_channels - channels))
    groups: list[Sequence[Span]] = []
    row, end = spans[0][0], spans[-1][1]
    while row < end:
        if row < serial_end:
            rows = min(_next_multiple(serial_end - row, MIN_ROWS), max_rows, end - row)
            groups.append([(row, row + rows)])
        else:
            rows = (row - first_stored) * reused_channels // channels - (row - first_stored)
            if rows < end - row:
                rows -= rows % (MIN_ROWS * min(workers, rows // MIN_ROWS))  # every worker computes as many
            rows = min(rows, end - row)
            groups.append([(row + first, row + last) for first, last in divide_rows(rows, max_rows, workers)])
        row += rows
    return groups


def _next_multiple(value: int, factor: int) -> int:
    return -(-value // factor) * factor
