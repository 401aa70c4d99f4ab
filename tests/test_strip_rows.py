"""Sources of rows: each must match its layer on the whole map, whichever rows are requested."""

import copy

import pytest
import torch
from models import Scaled
from spies import KeepTensors
from tolerances import assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from movq_ext.model.feature_maps import MapStore
from movq_ext.model.map_rows import StoredRows
from movq_ext.model.strip_buffer import StripBuffer
from movq_ext.model.strip_rows import (
    ConvolvedRows,
    Pointwise,
    PointwiseRows,
    haloed_rows,
    pack_direct,
)
from movq_ext.model.working_memory import CPU_MEMORY
from movq_ext.ops.onednn import Convolution
from movq_ext.ops.winograd import WinogradConvolution

HEIGHT, WIDTH = 6, 5
SPANS = [(first, last) for first in range(HEIGHT) for last in range(first + 1, HEIGHT + 1)]


@pytest.fixture
def store():
    return MapStore(torch.float32, torch.device("cpu"))


@pytest.fixture
def x(store):
    x = store.allocate(4, HEIGHT, WIDTH)
    x.write(0, torch.randn(1, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)))
    return x


def strip(channels, first, last, value=torch.nan):
    return torch.full((1, last - first, WIDTH, channels), value).permute(0, 3, 1, 2)


@pytest.mark.parametrize("first, last", SPANS)
def test_stored_rows_are_the_maps(x, first, last):
    out = strip(4, first, last)
    StoredRows(x).write_rows(first, last, out)
    assert torch.equal(out, x.read(first, last))


def test_stored_rows_of_a_successor_are_not_copied(x):
    class NotCopied(torch.Tensor):
        def copy_(self, *_):
            raise AssertionError("copied")

    rows = x.reuse_storage(4).reserve(1, 3)
    StoredRows(x).write_rows(1, 3, rows.as_subclass(NotCopied))
    with pytest.raises(AssertionError, match="copied"):
        StoredRows(x).write_rows(0, 2, rows.as_subclass(NotCopied))


@torch.no_grad()
@pytest.mark.parametrize("first, last", SPANS)
def test_pointwise_rows(x, first, last):
    conv, out = nn.Conv2d(4, 7, 1), strip(7, first, last)
    PointwiseRows(conv, x).write_rows(first, last, out)
    assert_close(out, conv(x.read(0, HEIGHT))[:, :, first:last].double())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Conv2d, Scaled])
def test_pointwise_convolution(x, kind, dtype):
    torch.manual_seed(1)
    conv, strip_values = kind(4, 7, 1), x.read(1, 5)
    conv, strip_values = conv.to(dtype), strip_values.to(dtype)
    expected = copy.deepcopy(conv).double()(strip_values.double())
    pointwise, out = Pointwise(conv, dtype), strip(7, 1, 5).to(dtype)
    assert_close(pointwise(strip_values), expected)
    pointwise.write_to(out, strip_values)
    assert_close(out, expected)


@torch.no_grad()
def test_pointwise_convolutions_count_operations(x):
    pointwise = Pointwise(nn.Conv2d(4, 7, 1), x.dtype)
    with FlopCounterMode(display=False) as counter:
        pointwise.write_to(strip(7, 1, 5), x.read(1, 5))
    assert counter.get_total_flops() == 2 * 4 * 7 * 4 * WIDTH


@pytest.mark.parametrize("first, last", SPANS)
def test_haloed_rows_are_zero_outside_the_map(store, x, first, last):
    buffer = StripBuffer(store, 0)
    buffer.rows(x, HEIGHT + 2).fill_(torch.nan)
    padded = nn.functional.pad(x.read(0, HEIGHT), (0, 0, 1, 1))
    assert torch.equal(haloed_rows(StoredRows(x), first, last, buffer), padded[:, :, first : last + 2])


@torch.no_grad()
@pytest.mark.parametrize("kind, packed", [(nn.Conv2d, True), (Scaled, False)])
def test_convolved_rows(store, x, kind, packed):
    torch.manual_seed(1)
    conv = kind(4, 3, 3, padding=1)
    expected = conv(x.read(0, HEIGHT)).double()
    convolved = ConvolvedRows(conv, StoredRows(x), StripBuffer(store, 0))
    assert (convolved.packed is not None) == packed
    for first, last in SPANS:
        out = strip(3, first, last)
        convolved.write_rows(first, last, out)
        assert_close(out, expected[:, :, first:last])
        convolved.add_rows(first, last, out)
        assert_close(out, 2 * expected[:, :, first:last])


@torch.no_grad()
@pytest.mark.parametrize(
    "channels, winograd_bytes, spans, expected",
    [
        (128, CPU_MEMORY.winograd, [(0, 32)], WinogradConvolution),
        (32, CPU_MEMORY.winograd, [(0, 32)], Convolution),
        (128, 1 << 20, [(0, 32)], Convolution),
        (128, CPU_MEMORY.winograd, [(8, 16)], Convolution),  # this process's band
        (128, CPU_MEMORY.winograd, (), Convolution),  # a shortcut, beside the convolution that it is added to
    ],
    ids=["wide", "narrow", "little memory", "a small part", "unknown strips"],
)
def test_which_convolution(store, channels, winograd_bytes, spans, expected):
    x, conv = store.allocate(channels, 32, 32), nn.Conv2d(channels, channels, 3, padding=1)
    convolved = ConvolvedRows(conv, StoredRows(x), StripBuffer(store, winograd_bytes), spans)
    assert type(convolved.packed) is expected


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Conv2d, Scaled])
@pytest.mark.parametrize("channels, size", [(32, 32), (128, 8), (128, 32)])
def test_only_direct_convolutions_are_packed_ahead(kind, channels, size, dtype):
    store, conv = MapStore(dtype, torch.device("cpu")), kind(channels, channels, 3, padding=1).to(dtype)
    x = store.allocate(channels, size, size)
    for spans in ([(0, size)], [(row, row + 4) for row in range(0, size, 4)]):
        packed = pack_direct(conv, x, spans, CPU_MEMORY.winograd)
        chosen = ConvolvedRows(conv, StoredRows(x), StripBuffer(store, CPU_MEMORY.winograd), spans)
        assert type(packed) is (Convolution if type(chosen.packed) is Convolution else type(None))
        if packed is not None:
            assert ConvolvedRows(conv, StoredRows(x), chosen.buffer, spans, packed).packed is packed


@torch.no_grad()
def test_a_hook_may_keep_its_input(store, x):
    conv, hook = nn.Conv2d(4, 3, 3, padding=1), KeepTensors()
    conv.register_forward_hook(hook)
    convolved = ConvolvedRows(conv, StoredRows(x), StripBuffer(store, 0))
    for first, last in SPANS:
        convolved.write_rows(first, last, strip(3, first, last))
    assert all(torch.equal(a, b) for a, b in zip(hook.kept, hook.copies, strict=True))


def test_strips_share_one_buffer_that_grows(store, x):
    buffer = StripBuffer(store, 0)
    small = buffer.rows(x, 2)
    assert small.shape == (1, 4, 2, WIDTH) and small.is_contiguous(memory_format=torch.channels_last)
    assert buffer.rows(x, 1).data_ptr() == small.data_ptr()
    large = buffer.rows(x, 5)
    assert large.shape == (1, 4, 5, WIDTH) and buffer.rows(x, 2).data_ptr() == large.data_ptr()
