"""Dividing maps into strips: arithmetic on numbers of rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from movq_ext.model.feature_maps import MapStore
from movq_ext.model.strip_spans import HALO, MIN_ROWS, busiest_rows, divide_reused_rows, divide_rows
from movq_ext.model.working_memory import convolution_values, cpu_memory

HEIGHTS, WORKERS = st.integers(1, 300), st.integers(1, 9)


@given(HEIGHTS, st.integers(MIN_ROWS, 400), WORKERS)
def test_strips_cover_every_row_once(height, max_rows, workers):
    spans = divide_rows(height, max_rows, workers)
    assert [row for first, last in spans for row in range(first, last)] == list(range(height))
    assert all(last - first <= max_rows for first, last in spans)


@given(HEIGHTS, st.integers(1, 40), WORKERS)
def test_busiest_rows_are_those_of_a_simulation(height, rows, workers):
    """Each worker takes the next strip when it is done."""
    loads = [0] * workers
    for first in range(0, height, rows):
        loads[loads.index(min(loads))] += min(rows, height - first) + HALO
    assert busiest_rows(height, rows, workers) == max(loads)


@pytest.mark.parametrize(
    "height, max_rows, workers, rows",
    [
        (256, 34, 1, 32),  # as many rows as fit, in whole cells
        (256, 15, 2, 8),
        (256, 16, 2, 16),
        (32, 34, 2, 16),  # a strip for each worker
        (48, 34, 2, 24),  # rather than three strips of 16
        (37, 34, 2, 20),  # four rows at a time
        (32, 34, 3, 12),
        (8, 34, 2, 4),
        (4, 34, 2, 4),  # no strip has fewer than four rows
        (4, 34, 1, 4),
        (37, 3, 1, 2),
        (37, 64, 1, 37),
    ],
)
def test_rows_of_a_strip(height, max_rows, workers, rows):
    first, last = divide_rows(height, max_rows, workers)[0]
    assert last - first == rows


REUSED = [
    (1, 2),
    (1, 3),
    (1, 8),
    (2, 3),
    (3, 4),
    (8, 9),
    (5, 5),
]  # channels of a map, and of the map whose storage it reuses


def reused_groups(height, max_rows, workers, channels, reused, first=0, first_stored=0):
    spans = [(first + top, first + bottom) for top, bottom in divide_rows(height, max_rows, workers)]
    return divide_reused_rows(spans, workers, channels, reused, first_stored)


@given(HEIGHTS, st.integers(MIN_ROWS, 40), WORKERS, st.sampled_from(REUSED), st.integers(0, 200), st.integers(0, 1))
def test_groups_of_a_map_that_reuses_storage_may_run_in_any_order(height, max_rows, workers, ratio, stored, halo):
    """A row of the larger map is overwritten only by its own strip, or after its group. A band starts at any row."""
    (channels, reused), top = ratio, stored + halo
    groups = reused_groups(height, max_rows, workers, channels, reused, top, stored)
    assert [row for group in groups for span in group for row in range(*span)] == list(range(top, top + height))
    assert all(last - first <= max_rows for group in groups for first, last in group)
    if workers == 1:  # in order
        groups = [[span] for group in groups for span in group]
    for index, group in enumerate(groups):
        unread = [span for later in groups[index:] for span in later]
        for written_first, written_last in group:
            for first, last in unread:
                if (first, last) != (written_first, written_last):
                    write = ((written_first - stored) * channels, (written_last - stored) * channels)
                    read = ((first - stored) * reused, (last - stored) * reused)
                    assert write[1] <= read[0] or write[0] >= read[1]


@given(HEIGHTS, st.integers(MIN_ROWS, 40), st.integers(2, 9), st.sampled_from(REUSED))
def test_few_rows_are_computed_by_one_thread(height, max_rows, workers, ratio):
    """As many as two strips of four rows need above them, and the rows that are left at the end."""
    channels, reused = ratio
    groups = reused_groups(height, max_rows, workers, channels, reused)
    serial = [last - first for group in groups for first, last in group if len(group) == 1]
    needed = 0 if channels == reused else -(-2 * MIN_ROWS * channels // (reused - channels))
    assert sum(serial) < needed + 2 * MIN_ROWS


@pytest.mark.parametrize(
    "height, max_rows, workers, channels, reused, rows",
    [
        (128, 16, 2, 1, 2, [[8], [4] * 2, [8] * 2, [16] * 2, [16] * 4]),
        (256, 32, 2, 1, 2, [[8], [4] * 2, [8] * 2, [16] * 2, [32] * 2, [32] * 4]),
        (128, 16, 4, 1, 2, [[8], [4] * 2, [4] * 4, [8] * 4, [16] * 4]),
        (64, 16, 2, 1, 4, [[4], [4] * 2, [16] * 2, [12, 8]]),
        (64, 16, 2, 2, 3, [[16], [4] * 2, [4] * 2, [8] * 2, [8] * 2]),
        (37, 16, 2, 1, 2, [[8], [4] * 2, [8] * 2, [4, 1]]),
        (64, 16, 2, 1, 1, [[16] * 4]),  # in place
        (64, 16, 1, 1, 2, [[16] * 4]),  # one thread, in order
    ],
)
def test_rows_of_groups(height, max_rows, workers, channels, reused, rows):
    groups = reused_groups(height, max_rows, workers, channels, reused)
    assert [[last - first for first, last in group] for group in groups] == rows


def test_strips_have_as_many_rows_in_every_dtype():
    """So strips in 16 bits take half the memory. float64 has half the rows."""
    rows = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = MapStore(dtype, torch.device("cpu")).allocate(128, 2048, 256)
        first, last = cpu_memory(dtype)._replace(workers=1).spans(x, convolution_values(128, 128))[0]
        rows[dtype] = last - first
    assert rows[torch.float32] == rows[torch.bfloat16] == rows[torch.float16]
    assert rows[torch.float64] < 0.6 * rows[torch.float32] and rows[torch.float32] < 2048
