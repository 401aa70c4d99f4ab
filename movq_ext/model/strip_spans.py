"""Divide a map into strips, by counted rows: for threads that each take the next strip, within their memory."""

from __future__ import annotations

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


def _next_multiple(value: int, factor: int) -> int:
    return -(-value // factor) * factor
