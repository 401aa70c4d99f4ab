"""Maps in the rows of their input: the values of a whole map in any order of strips, and the memory of one map."""

import copy
import time

import pytest
import torch
from models import PeakBytes
from tolerances import assert_close
from torch import nn

from movq_ext import ResnetBlock
from movq_ext.model import strips
from movq_ext.model.feature_maps import FeatureMap, MapStore
from movq_ext.model.layers import Upsample
from movq_ext.model.overwritten_rows import OverwrittenRows
from movq_ext.model.strip_buffer import StripBuffer
from movq_ext.model.strip_norms import NormalisedRows
from movq_ext.model.working_memory import WorkingMemory

CPU = torch.device("cpu")
HEIGHT, WIDTH = 13, 7


class ShortStrips(strips.Strips):
    """Strips of few rows, so that there are many borders."""

    rows = 4

    def spans(self, x, values_per_pixel):
        return [(first, min(first + self.rows, x.height)) for first in range(0, x.height, self.rows)]


def runner(dtype=torch.float32, budget=None, workers=1, rows=4):
    run = ShortStrips(MapStore(dtype, CPU, budget), None, WorkingMemory(1 << 30, maps=budget, workers=workers))
    run.rows = rows
    return run


def block(in_channels, out_channels, dtype=torch.float32):
    torch.manual_seed(0)
    return ResnetBlock(in_channels=in_channels, out_channels=out_channels).eval().to(dtype)


def values(channels, dtype=torch.float32, height=HEIGHT):
    return torch.randn(1, channels, height, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --- Rows that strips overwrite


@pytest.mark.parametrize("order", [range(7), reversed(range(7)), [3, 0, 6, 2, 4, 1, 5]], ids=["down", "up", "mixed"])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_of_overwritten_rows(order, rows, dtype):
    store, norm, height = MapStore(dtype, CPU), nn.GroupNorm(4, 8).to(dtype), 7 * rows
    x = store.allocate(8, height, WIDTH)
    x.write(0, values(8, dtype, height))
    expected = torch.empty(1, height, WIDTH, 8, dtype=dtype).permute(0, 3, 1, 2)
    NormalisedRows(norm, x, None, "silu", StripBuffer(store, 0)).write_rows(0, height, expected)
    source = OverwrittenRows(norm, x, None, "silu", StripBuffer(store, 0))
    for index in order:
        first, last = index * rows, (index + 1) * rows
        above, below = x.halo(first, last)
        out = torch.empty(1, last - first + above + below, WIDTH, 8, dtype=dtype).permute(0, 3, 1, 2)
        source.write_haloed_rows(first, last, out)
        torch.testing.assert_close(out, expected[:, :, first - above : last + below])
        source.keep_borders(first, last)
        x.reserve(first, last).fill_(torch.nan)
    assert not source._kept and not source._were_read


def test_few_borders_are_kept():
    """From top to bottom, one: the row above the next strip."""
    store = MapStore(torch.float32, CPU)
    x = store.allocate(8, 12, WIDTH)
    x.write(0, values(8, height=12))
    source = OverwrittenRows(nn.GroupNorm(4, 8), x, None, None, StripBuffer(store, 0))
    for first in range(0, 12, 3):
        above, below = x.halo(first, first + 3)
        source.write_haloed_rows(first, first + 3, torch.empty(1, 8, 3 + above + below, WIDTH))
        source.keep_borders(first, first + 3)
        assert list(source._kept) == ([(first + 2, first + 3)] if below else [])


# --- Blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workers, rows", [(1, 4), (2, 4), (2, 1)])
@pytest.mark.parametrize("budget", [None, 0], ids=["memory", "files"])
@pytest.mark.parametrize("channels", [(64, 32), (96, 32), (96, 64)], ids=str)
def test_blocks_match_whole_maps(monkeypatch, channels, budget, workers, rows, dtype):
    """With fewer channels, then with as many, then upsampled. The first strip of each map is written late."""
    (first, second), upsample = (block(n, channels[1], dtype) for n in channels), Upsample(channels[1], True).to(dtype)
    reserve = FeatureMap.reserve

    def late_reserve(self, first, last):
        time.sleep(0.01 if first == 0 and workers > 1 else 0)
        return reserve(self, first, last)

    monkeypatch.setattr(FeatureMap, "reserve", late_reserve)
    torch.set_num_threads(workers)
    run, x = runner(dtype, budget, workers, rows), values(channels[0], dtype)
    out = run.run_layer(first, run.store_input(x))
    out = run.run_layer(second, out)
    assert not out.is_compact
    out = run.run_layer(upsample, out)
    assert out.is_compact
    expected = nn.Sequential(*(copy.deepcopy(layer).double() for layer in (first, second, upsample)))(x.double())
    assert_close(run.features(out), expected, slack=10)
    assert len(run.store._files) == (budget == 0)


@pytest.mark.parametrize("channels, maps", [((64, 32), 1), ((96, 32), 1), ((96, 64), 1 + 2 / 3), ((64, 64), 2)], ids=str)
def test_maps_of_a_block(channels, maps):
    """With at most half the channels of its input, a block allocates no map."""
    run, layer = runner(), block(*channels)
    x = run.store_input(values(channels[0]))
    sizes, allocate = [], run.store.allocate_storage
    run.store.allocate_storage = lambda count: sizes.append(count) or allocate(count)
    out = run.run_layer(layer, x)
    assert out.storage is x.storage
    assert 1 + sum(sizes) / (channels[0] * HEIGHT * WIDTH) == pytest.approx(maps)
    sizes.clear()
    run.run_layer(block(channels[1], channels[1]), out)
    assert bool(sizes) == (maps > 1)


def test_peak_memory_of_a_block_and_its_successor():
    """One map, and strips of four rows."""
    run, first, second = runner(), block(64, 32), block(32, 32)
    x = run.store_input(torch.randn(1, 64, 256, 64))
    with PeakBytes(nn.ModuleList([first, second])) as memory:
        run.run_layer(second, run.run_layer(first, x))
    assert 1 <= memory.peak / (64 * 256 * 64 * 4) < 1.2


def test_an_upsampling_sees_no_wide_storage():
    """It holds its input without gaps, a quarter of its result, and no longer the strips of the block before."""
    run = runner(rows=64)
    x = run.run_layer(block(64, 32), run.store_input(torch.randn(1, 64, 128, 64)))
    layer, result = Upsample(32, True), 4 * 32 * 128 * 64 * 4
    run.rows = 4
    with PeakBytes(layer) as memory:
        run.run_layer(layer, x)
    assert 1.25 <= memory.peak / result < 1.45
