"""The float32 copy of a strip. Its memory is kept for the next strip, unless there is a memory limit."""

import pytest
import torch

from movq_ext.model.feature_maps import MapStore
from movq_ext.model.strip_buffer import StripBuffer


def strip(count, dtype):
    return torch.randn(1, 8, count, 6, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("budget", [None, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_float32(dtype, budget):
    buffer = StripBuffer(MapStore(dtype, torch.device("cpu"), budget), 0)
    addresses = set()
    for count in (4, 2, 4):
        rows = strip(count, dtype)
        copy = buffer.upcast(rows)
        assert torch.equal(copy, rows.float()) and copy.dtype == torch.float32
        addresses.add(copy.data_ptr())
    kept = buffer._upcast.numel()
    assert (kept, len(addresses)) == (8 * 4 * 6, 1) if budget is None else kept == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_rows_are_not_copied(dtype):
    rows = strip(2, dtype)
    assert StripBuffer(MapStore(dtype, torch.device("cpu")), 0).upcast(rows) is rows
