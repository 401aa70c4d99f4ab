"""Feature maps: their storage in memory and in files, their budget, and their moments."""

import tempfile
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PeakBytes, draw
from spies import record_calls
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from movq_ext.model import feature_maps
from movq_ext.model.feature_maps import FeatureMap, FileStorage, MapStore, MemoryStorage, Runs, upcast
from movq_ext.ops.moments import Moments

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(params=["memory", "file"])
def make_storage(request):
    files = []

    def make(count, dtype=torch.float32):
        if request.param == "memory":
            return MemoryStorage(torch.full((count,), torch.nan, dtype=dtype))
        files.append(tempfile.TemporaryFile())
        return FileStorage(files[-1], dtype, CPU)

    yield make
    for file in files:
        file.close()


@pytest.fixture
def files(monkeypatch):
    """The temporary files and their folders."""
    return record_calls(monkeypatch, feature_maps.tempfile, "TemporaryFile", lambda file, dir: (file, dir))


def rows(first, last, channels=3, width=4, dtype=torch.float32):
    """Rows first to last - 1 of a map, each value different."""
    values = torch.arange(first * width * channels, last * width * channels, dtype=dtype)
    return values.view(1, last - first, width, channels).permute(0, 3, 1, 2)


# --- Storage


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_committed_values_are_read_back(make_storage, dtype):
    storage = make_storage(20, dtype)
    for first, count in ((12, 8), (0, 5), (5, 7), (3, 4)):  # in any order, and over older values
        run = Runs(first, count)
        buffer = storage.reserve(run)
        assert buffer.shape == (1, count) and buffer.dtype == storage.dtype == dtype
        storage.commit(run, buffer.copy_(torch.arange(first, first + count) + count))
    expected = torch.tensor([5, 6, 7, *range(7, 11), *range(14, 19), *range(20, 28)], dtype=dtype)
    for first, count in ((0, 20), (4, 6), (19, 1)):
        assert torch.equal(storage.read(Runs(first, count))[0], expected[first : first + count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_between_runs_are_left_alone(make_storage, dtype):
    storage, everything = make_storage(20, dtype), Runs(0, 20)
    storage.commit(everything, storage.reserve(everything).copy_(torch.arange(20)))
    runs = Runs(2, 3, count=3, pitch=7)  # the last one ends before the storage does
    assert storage.read(runs).tolist() == [[2, 3, 4], [9, 10, 11], [16, 17, 18]]
    buffer = storage.reserve(runs)
    assert buffer.shape == (3, 3) and buffer.is_contiguous()
    storage.commit(runs, buffer.copy_(-storage.read(runs)))
    expected = [-i if i in (2, 3, 4, 9, 10, 11, 16, 17, 18) else i for i in range(20)]
    assert storage.read(everything)[0].tolist() == expected


def test_memory_is_not_copied():
    values = torch.zeros(8)
    storage = MemoryStorage(values)
    assert storage.reserve(Runs(2, 3)).data_ptr() == storage.read(Runs(2, 1)).data_ptr() == values[2:].data_ptr()
    assert storage.read(Runs(2, 2, count=2, pitch=4)).data_ptr() == values[2:].data_ptr()


def test_a_file_that_was_cut_short():
    with tempfile.TemporaryFile() as file:
        storage = FileStorage(file, torch.float32, CPU)
        storage.commit(Runs(0, 10), torch.ones(1, 10))
        file.truncate(30)
        assert torch.equal(storage.read(Runs(0, 7)), torch.ones(1, 7))
        with pytest.raises(OSError, match="expected 16 bytes in a temporary file of feature maps, got 6"):
            storage.read(Runs(6, 4))


# --- Maps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_written_rows_are_read_back(make_storage, dtype):
    x = FeatureMap(3, 6, 4, make_storage(3 * 6 * 4, dtype))
    for first, last in ((0, 1), (1, 4), (4, 6)):
        x.write(first, rows(first, last, dtype=dtype))
    for first in range(6):
        for last in range(first + 1, 7):
            assert torch.equal(x.read(first, last), rows(first, last, dtype=dtype))
    assert x.read(0, 6).is_contiguous(memory_format=torch.channels_last) and x.dtype == dtype


def test_moments_are_those_of_all_written_rows(make_storage):
    x = FeatureMap(3, 6, 4, make_storage(3 * 6 * 4))
    for first, last in ((0, 1), (1, 4), (4, 6)):
        buffer = x.reserve(first, last)
        x.commit(first, buffer.copy_(rows(first, last)))
    values = rows(0, 6, dtype=torch.float64)
    assert x.moments.count == 24
    torch.testing.assert_close(x.moments.mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(x.moments.m2 / 24, values.var((0, 2, 3), correction=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_take_little_memory(dtype):
    """They copy no values, 16-bit ones neither."""
    strip, moments = (draw(1, 8, 64, 100) + 20).to(dtype).contiguous(memory_format=torch.channels_last), Moments()
    with PeakBytes() as memory:
        moments.add(strip)
    assert memory.peak < 1.5 * strip.nbytes  # with the strip itself
    values = strip.double()
    assert moments.count == 6400
    torch.testing.assert_close(moments.mean, values.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.m2 / 6400, values.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mean", [1e4, -300.0])
@pytest.mark.parametrize("first_is_flat", [False, True])
def test_moments_of_values_far_from_zero(mean, first_is_flat):
    """The means are more accurate than the values: neighbours of 10000 in float32 are 1e-3 apart."""
    strip = (draw(1, 8, 80, 100).double() + mean).float()
    if first_is_flat:
        strip[:, :, :20] = mean / 2
    moments, values = Moments(), strip.double()
    moments.add(strip.contiguous(memory_format=torch.channels_last))
    deviation = values.std((0, 2, 3))
    assert ((moments.mean - values.mean((0, 2, 3))).abs() < 5e-4 * deviation).all()
    torch.testing.assert_close(moments.m2 / 8000, values.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_moments_of_equal_values():
    """Their variance is zero, not a negative rounding error."""
    moments = Moments()
    moments.add(torch.full((1, 8, 80, 100), 1 / 3).contiguous(memory_format=torch.channels_last))
    assert (0 <= moments.m2).all() and (moments.m2 < 1e-9).all()
    torch.testing.assert_close(moments.mean, torch.full((8,), 1 / 3, dtype=torch.float64), rtol=1e-6, atol=0)


def test_moments_of_a_strip_take_few_operators():
    """Their number does not grow with the strip. In narrow models each takes longer to start than to read its values."""

    class Count(TorchDispatchMode):
        operators = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operators += not func.is_view
            return func(*args, **(kwargs or {}))

    for rows in (40, 400):
        strip, moments = draw(1, 32, rows, 64).contiguous(memory_format=torch.channels_last), Moments()
        with Count() as count:
            moments.add(strip)
        assert count.operators <= 10


@pytest.mark.parametrize("channels", [3, 2, 1])
@pytest.mark.parametrize("spans", [[(0, 1), (1, 4), (4, 6)], [(4, 6), (0, 1), (1, 4)]])
def test_a_successor_overwrites_its_own_rows_only(make_storage, channels, spans):
    """So strips may be written in any order."""
    x = FeatureMap(3, 6, 4, make_storage(3 * 6 * 4))
    x.write(0, rows(0, 6))
    successor = x.reuse_storage(channels)
    assert (successor.channels, successor.height, successor.width) == (channels, 6, 4) and successor.storage is x.storage
    assert successor.is_compact == (channels == 3)
    unwritten = set(range(6))
    for first, last in spans:
        successor.write(first, -rows(first, last, channels))
        unwritten -= set(range(first, last))
        assert all(torch.equal(x.read(row, row + 1), rows(row, row + 1)) for row in unwritten)
    assert torch.equal(successor.read(0, 6), -rows(0, 6, channels))
    assert successor.moments.count == 24 and (successor.moments.mean < 0).all() and (x.moments.mean > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_side_by_side_in_one_storage(make_storage, dtype):
    wide = FeatureMap(7, 6, 4, make_storage(7 * 6 * 4, dtype))
    left = wide.reuse_storage(3)
    right = left.beside(4)
    assert wide.beside(1) is None and left.beside(5) is None and right.beside(1) is None
    for first, last in ((4, 6), (0, 1), (1, 4)):
        left.write(first, rows(first, last, 3, dtype=dtype))
        right.write(first, -rows(first, last, 4, dtype=dtype))
    for first, last in ((0, 6), (2, 3), (1, 5)):
        assert torch.equal(left.read(first, last), rows(first, last, 3, dtype=dtype))
        assert torch.equal(right.read(first, last), -rows(first, last, 4, dtype=dtype))
    values = rows(0, 6, 4, dtype=dtype).double()
    torch.testing.assert_close(right.moments.mean, -values.mean((0, 2, 3)), rtol=1e-2, atol=0)


@pytest.mark.parametrize("last", [2, 3])  # one row, or two
def test_a_strip_of_a_narrower_map_is_stored_when_it_is_committed(make_storage, last):
    """Until then, the rows that it takes the place of stay readable."""
    x = FeatureMap(3, 6, 4, make_storage(3 * 6 * 4))
    x.write(0, rows(0, 6))
    out = x.reuse_storage(2)
    buffer = out.reserve(1, last).fill_(7)
    assert buffer.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x.read(0, 6), rows(0, 6))
    out.commit_unmeasured(1, buffer)
    assert (out.read(1, last) == 7).all() and torch.equal(x.read(last, 6), rows(last, 6))


def test_a_successor_has_no_more_channels():
    x = FeatureMap(3, 6, 4, MemoryStorage(torch.zeros(3 * 6 * 4)))
    with pytest.raises(AssertionError):
        x.reuse_storage(4)


def test_the_halo_ends_at_the_maps_edges():
    x = FeatureMap(1, 6, 1, MemoryStorage(torch.zeros(6)))
    assert [x.halo(*span) for span in ((0, 6), (0, 5), (1, 6), (2, 3))] == [(0, 0), (0, 1), (1, 0), (1, 1)]


# --- Budget


def test_maps_beyond_the_budget_go_to_files(files, tmp_path):
    map_bytes = 3 * 6 * 4 * 2
    with MapStore(torch.bfloat16, CPU, 2 * map_bytes + 1, str(tmp_path)) as store:
        maps = [store.allocate(3, 6, 4) for _ in range(4)]
        assert [type(x.storage) for x in maps] == [MemoryStorage] * 2 + [FileStorage] * 2
        assert [folder for _, folder in files] == [str(tmp_path)] * 2
        for i, x in enumerate(maps):
            x.write(0, torch.full((1, 3, 6, 4), float(i)))
        assert all((x.read(0, 6) == i).all() for i, x in enumerate(maps))
        store.release(maps[0])
        assert isinstance(store.allocate(3, 6, 4).storage, MemoryStorage)
        assert isinstance(store.allocate(1, 1, 1).storage, FileStorage)


@pytest.mark.parametrize("budget, storage", [(None, MemoryStorage), (0, FileStorage)])
def test_no_limit_and_no_memory(files, budget, storage):
    with MapStore(torch.float32, CPU, budget) as store:
        assert all(type(store.allocate(3, 60, 40).storage) is storage for _ in range(3))
    assert len(files) == (3 if budget == 0 else 0)


def test_files_are_closed_on_release_and_on_exit(files):
    with pytest.raises(KeyError), MapStore(torch.float32, CPU, 0) as store:
        first, *_ = (store.allocate(3, 6, 4) for _ in range(3))
        store.release(first.reuse_storage(2))
        assert [file.closed for file, _ in files] == [True, False, False]
        raise KeyError
    assert all(file.closed for file, _ in files)


def test_a_released_buffer_is_reused_if_it_is_large_enough():
    store = MapStore(torch.float32, CPU)
    x = store.allocate(3, 6, 4)
    address = x.storage.values.data_ptr()
    store.release(x)
    smaller = store.allocate(3, 2, 4)
    assert smaller.storage.values.data_ptr() == address
    store.release(smaller)
    larger = store.allocate(3, 7, 4)
    assert larger.storage.values.numel() == 3 * 7 * 4


def test_a_released_buffer_smaller_than_the_last_map_is_freed():
    """It would be kept for nothing beside that map, and while callers hold its own."""
    store = MapStore(torch.float32, CPU)
    small = store.allocate(3, 3, 4)
    buffer = weakref.ref(small.storage.values)
    large = store.allocate(3, 6, 4)
    store.release(small)
    assert buffer() is None
    address = large.storage.values.data_ptr()
    store.release(large)
    assert store.allocate(3, 6, 4).storage.values.data_ptr() == address


def test_a_released_buffer_counts_whole_against_the_budget():
    map_bytes = 3 * 6 * 4 * 4
    store = MapStore(torch.float32, CPU, map_bytes + 3 * 2 * 4 * 4)
    first, small = store.allocate(3, 6, 4), store.allocate(3, 2, 4)
    store.release(first)
    store.allocate(3, 2, 4)  # in the buffer of 6 rows
    assert isinstance(store.allocate(3, 2, 4).storage, FileStorage)
    store.release(small)
    assert isinstance(store.allocate(3, 2, 4).storage, MemoryStorage)


# --- Moments


@given(
    heights=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    width=st.integers(1, 7),
    groups=st.sampled_from([1, 2, 4, 8]),
    offset=st.sampled_from([0.0, 5.0, -300.0]),
)
def test_moments_match_float64(heights, width, groups, offset):
    generator = torch.Generator().manual_seed(sum(heights))
    x = torch.randn(1, 8, sum(heights), width, generator=generator) * torch.arange(1, 9)[:, None, None] + offset
    moments = Moments()
    for strip in x.split(heights, dim=2):
        moments.add(strip)
    mean, rstd = moments.group_statistics(groups, 1e-6)
    grouped = x.double().reshape(groups, -1)
    assert mean.dtype == rstd.dtype == torch.float64 and mean.shape == rstd.shape == (8,)
    torch.testing.assert_close(mean, grouped.mean(1).repeat_interleave(8 // groups), rtol=1e-5, atol=1e-5)
    expected = (grouped.var(1, correction=0) + 1e-6).rsqrt().repeat_interleave(8 // groups)
    assert_close(rstd.float(), expected, slack=50)


@pytest.mark.parametrize("mean", [0, 20, 4096])
@pytest.mark.parametrize("width", [64, 75])
@pytest.mark.parametrize("channels", [32, 128, 512])
def test_moments_are_as_accurate_as_group_norm(channels, width, mean):
    """As PyTorch's in NCHW, which is the more accurate layout."""
    x = (draw(1, channels, 64, width) + mean).float()
    _, peer_mean, peer_rstd = torch.native_group_norm(x, None, None, 1, channels, 64 * width, channels, 0)
    moments, values = Moments(), x.double()
    moments.add(x.contiguous(memory_format=torch.channels_last))
    expected, deviation = values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0)

    def error(mean, deviations):
        return float(((mean - expected) / deviation).norm() + (deviations / deviation - 1).norm())

    ours = error(moments.mean, (moments.m2 / moments.count).sqrt())
    assert ours < 1.2 * error(peer_mean[0].double(), 1 / peer_rstd[0].double())


def test_moments_with_a_large_mean():
    x = (draw(1, 8, 40, 30) + 4096).float()
    moments = Moments()
    for strip in x.split([1, 30, 2, 7], dim=2):
        moments.add(strip)
    mean, rstd = moments.group_statistics(4, 1e-6)
    grouped = x.double().reshape(4, -1)
    expected = (grouped.var(1, correction=0) + 1e-6).rsqrt()
    torch.testing.assert_close(mean[::2], grouped.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd[::2], expected, rtol=3e-5, atol=0)  # float32 values are 5e-4 apart


def test_moments_of_no_rows():
    with pytest.raises(AssertionError, match="no rows were written"):
        Moments().group_statistics(1, 1e-6)


@pytest.mark.parametrize("dtype, expected", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                             (torch.float32, torch.float32), (torch.float64, torch.float64)])  # fmt: skip
def test_upcast(dtype, expected):
    x = torch.ones(3, dtype=dtype)
    assert upcast(x).dtype == expected and (upcast(x) is x) == (dtype == expected)
