"""Rows of upsamplings: both methods must match the layer on the whole map, whichever rows are requested."""

import copy

import pytest
import torch
from tolerances import assert_close
from torch import nn

from movq_ext.model.feature_maps import MapStore
from movq_ext.model.strip_buffer import StripBuffer
from movq_ext.model.upsampled_rows import WindowRows, WinogradRows, upsampled_rows
from movq_ext.ops.winograd import WINOGRAD_BYTES

HEIGHT, WIDTH = 6, 5
SPANS = [(first, last) for first in range(HEIGHT) for last in range(first + 1, HEIGHT + 1)]
MEMORY = {WindowRows: 0, WinogradRows: WINOGRAD_BYTES}


pytestmark = pytest.mark.usefixtures("few_channels")


def random_map(dtype):
    store = MapStore(dtype, torch.device("cpu"))
    x = store.allocate(4, HEIGHT, WIDTH)
    x.write(0, torch.randn(1, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype))
    return store, x


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "method, dtype",
    [
        (WindowRows, torch.float64),
        (WindowRows, torch.float32),
        (WindowRows, torch.bfloat16),
        (WinogradRows, torch.float64),
        (WinogradRows, torch.float32),
    ],
)
def test_rows_are_those_of_the_layer(method, dtype, bias):
    torch.manual_seed(1)
    conv, (store, x) = nn.Conv2d(4, 4, 3, padding=1, bias=bias).to(dtype), random_map(dtype)
    doubled = x.read(0, HEIGHT).double().repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = copy.deepcopy(conv).double()(doubled)
    rows = upsampled_rows(conv, x, StripBuffer(store, MEMORY[method]))
    assert type(rows) is method
    for first, last in SPANS:
        out = torch.full((1, 2 * (last - first), 2 * WIDTH, 4), torch.nan, dtype=dtype).permute(0, 3, 1, 2)
        rows.write_rows(first, last, out)
        assert_close(out, expected[:, :, 2 * first : 2 * last])


@torch.no_grad()
@pytest.mark.parametrize("dtype, autocasts", [(torch.bfloat16, False), (torch.float32, True)])
def test_sixteen_bits_take_windows(dtype, autocasts):
    """Differences of neighbours, rounded to 8 bits, would cost accuracy."""
    store, x = random_map(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        rows = upsampled_rows(nn.Conv2d(4, 4, 3, padding=1).to(dtype), x, StripBuffer(store, WINOGRAD_BYTES))
    assert type(rows) is WindowRows


@torch.no_grad()
@pytest.mark.parametrize("autocasts", [False, True])
def test_weights_of_windows_are_freed_where_they_are_packed(autocasts):
    store, x = random_map(torch.bfloat16 if autocasts else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        packed = WindowRows(nn.Conv2d(4, 4, 3, padding=1), x, StripBuffer(store, 0)).packed
    assert all((convolution.weight is None) == (convolution.packed is not None) for convolution in packed)
