"""Dividing maps into strips: arithmetic on numbers of rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from movq_ext.model.feature_maps import MapStore
from movq_ext.model.strip_spans import HALO, MIN_ROWS, busiest_rows, divide_rows
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


def test_strips_have_as_many_rows_in_every_dtype():
    """So strips in 16 bits take half the memory. float64 has half the rows."""
    rows = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = MapStore(dtype, torch.device("cpu")).allocate(128, 2048, 256)
        first, last = cpu_memory(dtype)._replace(workers=1).spans(x, convolution_values(128, 128))[0]
        rows[dtype] = last - first
    assert rows[torch.float32] == rows[torch.bfloat16] == rows[torch.float16]
    assert rows[torch.float64] < 0.6 * rows[torch.float32] and rows[torch.float32] < 2048
