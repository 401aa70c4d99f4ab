"""Dividing maps into strips: arithmetic on numbers of rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movq_ext.model.strip_spans import HALO, MIN_ROWS, busiest_rows, divide_rows, split_at_overlaps

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


@given(HEIGHTS, st.integers(1, 40), st.integers(1, 8), st.integers(0, 8), st.integers(0, 200), st.integers(0, 1))
def test_groups_of_a_map_that_reuses_storage_may_run_in_any_order(height, rows, channels, fewer, stored, halo):
    """A row of the larger map is overwritten only by its own strip, or after its group. A band starts at any row."""
    top = stored + halo
    spans = [(first, min(first + rows, top + height)) for first in range(top, top + height, rows)]
    reused = channels + fewer
    groups = list(split_at_overlaps(spans, channels, reused, stored))
    assert [span for group in groups for span in group] == spans
    for index, group in enumerate(groups):
        unread = [span for later in groups[index:] for span in later]
        for written_first, written_last in group:
            for first, last in unread:
                if (first, last) != (written_first, written_last):
                    write = ((written_first - stored) * channels, (written_last - stored) * channels)
                    read = ((first - stored) * reused, (last - stored) * reused)
                    assert write[1] <= read[0] or write[0] >= read[1]


def test_groups_double():
    spans = [(first, first + 4) for first in range(0, 64, 4)]
    assert [len(group) for group in split_at_overlaps(spans, 1, 2)] == [1, 1, 2, 4, 8]
