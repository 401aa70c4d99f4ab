"""The kernels of SpatialNorm: the same cases on the emulator everywhere, and on a GPU if there is one."""

from types import SimpleNamespace

import published
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import backends, usable
from kernels.spatial_norm import Emulator, Gpu, case, is_channels_last
from tolerances import RELATIVE, relative_error

import movq_ext
from movq_ext.ops.paths import MAX_MAP_PIXELS

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
backend = backends(emulator=Emulator, gpu=Gpu)
counted = backends(emulator=Emulator)


# (shape of f, groups, zq's height and width). The cases named `small` are for slow sanitizers.
SHAPES = {
    "small-whole-ratio": ((2, 32, 8, 16), 8, (2, 4)),
    "small-no-zq": ((1, 32, 8, 8), 32, None),
    "same-grid": ((1, 64, 4, 8), 4, (4, 8)),
    "two-by-two-cells": ((2, 8, 12, 16), 2, (6, 8)),
    "one-pixel": ((2, 32, 1, 1), 8, (1, 1)),
    "one-value-a-group": ((1, 32, 1, 1), 32, None),
    "prime": ((1, 6, 7, 13), 2, (3, 5)),
    "three-channels-a-group": ((1, 96, 6, 8), 32, (3, 2)),
    "not-whole-ratio": ((1, 16, 12, 24), 4, (5, 7)),
    "thinned-zq": ((1, 16, 4, 8), 4, (9, 16)),
    "one-cell": ((1, 16, 24, 40), 2, (1, 1)),
    "one-cell-of-eight": ((1, 64, 2, 4), 8, (1, 1)),
    "long-rows": ((1, 4, 2, 4224), 2, (1, 70)),
    "one-column": ((1, 32, 67, 1), 8, (5, 1)),
    "wide-group": ((1, 1032, 2, 8), 2, (1, 2)),
    "one-group": ((3, 24, 5, 8), 1, (5, 1)),
    "one-row-of-two": ((1, 16, 1, 16), 2, (2, 8)),  # as many pixels in zq as in f
}
LAYOUTS = ("nchw", "channels_last")
CASES = [
    pytest.param(*SHAPES[name], dtype, layout, offset, id=f"{name}-{str(dtype)[6:]}-{layout}{'-unaligned' * (offset > 0)}")
    for name in SHAPES
    for layout in LAYOUTS
    for dtype, offset in ((F32, 0), (BF16, 0), *(((F16, 0), (F16, 1)) if "small" in name or name == "prime" else ()))
]


def float64(x):
    return None if x is None else x.double()


def expected_forward(c, groups, eps, silu):
    return published.spatial_norm(*map(float64, (c.f, c.zq_y, c.zq_b, c.weight, c.bias)), groups, eps, "silu" if silu else None)


def expected_backward(c, groups, eps, silu):
    inputs = [None if x is None else x.double().requires_grad_() for x in (c.f, c.zq_y, c.zq_b, c.weight, c.bias)]
    out = published.spatial_norm(*inputs, groups, eps, "silu" if silu else None)
    grads = iter(torch.autograd.grad(out, [x for x in inputs if x is not None], c.dout.double()))
    return [None if x is None else next(grads) for x in inputs]


def assert_close(actual, expected, slack=1.0):
    """Compare with the float64 result, relative to its norm, or relative to 1 if it is almost zero."""
    if float(expected.norm()) < 1e-6 * expected.numel() ** 0.5:
        assert float(actual.double().abs().max()) < 1e-2
        return
    error, allowed = relative_error(actual, expected), slack * RELATIVE[actual.dtype]
    assert error <= allowed, f"relative error {error:.2e} > {allowed:.2e} ({actual.dtype})"


@pytest.mark.parametrize("shape, groups, zq_size, dtype, layout, offset", CASES)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
def test_forward_and_backward_match_the_published_formula(backend, shape, groups, zq_size, dtype, layout, offset, silu):
    c = case(shape, zq_size, dtype, layout, affine=dtype if silu else F32, offset=offset)
    out, mean, rstd = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, groups, 1e-6, silu)
    if out.shape[1] > 1 and out.shape[2:].numel() > 1:
        assert is_channels_last(out) == (layout == "channels_last")
    assert_close(out, expected_forward(c, groups, 1e-6, silu))
    grads = backend.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, groups, silu)
    wanted = expected_backward(c, groups, 1e-6, silu)
    for name, grad, expected in zip(("f", "zq_y", "zq_b", "weight", "bias"), grads, wanted, strict=True):
        assert (grad is None) == (expected is None)
        if grad is not None:
            assert grad.shape == expected.shape
            try:
                assert_close(grad, expected, slack=2.0)
            except AssertionError as error:
                raise AssertionError(f"gradient of {name}: {error}") from None


# --- f_bias and bordered zq


def biased(c, dtype, level=0.0):
    """Return an f_bias, and the case in float64 with f_bias already added to f."""
    f_bias = (torch.randn(c.f.shape[1], generator=torch.Generator().manual_seed(1)) + level).to(dtype)
    maps = {name: float64(x) for name, x in vars(c).items()}
    return f_bias, SimpleNamespace(**{**maps, "f": c.f.double() + f_bias.double()[:, None, None]})


@pytest.mark.parametrize("shape, groups, zq_size, dtype, layout, offset", CASES)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
def test_f_bias_is_added_before_the_norm(backend, shape, groups, zq_size, dtype, layout, offset, silu):
    c = case(shape, zq_size, dtype, layout, offset=offset)
    f_bias, sums = biased(c, dtype if silu else F32)
    out, mean, rstd = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, groups, 1e-2, silu, f_bias)
    assert_close(out, expected_forward(sums, groups, 1e-2, silu), slack=2.0)
    grouped = sums.f.reshape(shape[0], groups, -1)
    assert_near(mean, grouped.mean(2))
    assert_near(rstd, (grouped.var(2, correction=0) + 1e-2).rsqrt())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape, groups", [((1, 32, 16, 16), 8), ((1, 2064, 4, 8), 2), ((1, 6, 7, 13), 2)], ids=["tile", "wide-group", "single"]
)
def test_a_large_f_bias_costs_no_accuracy(backend, shape, groups, layout):
    """The mean is rounded to half an ulp, 2^-15 here. The variance loses nothing."""
    c = case(shape, None, F32, layout, affine=None)
    f_bias, sums = biased(c, F32, level=1000.0)
    out, _, rstd = backend.forward(c.f, None, None, None, None, groups, 1e-6, False, f_bias)
    assert relative_error(out, expected_forward(sums, groups, 1e-6, False)) < 2**-14
    grouped = sums.f.reshape(1, groups, -1)
    assert relative_error(rstd, (grouped.var(2, correction=0) + 1e-6).rsqrt()) < 1e-5


# Bordered zq: (rows, columns) of a cell, and of the grid of cells.
BORDERED = {"small-four-by-two": ((4, 2), (2, 8)), "large-cells": ((8, 16), (2, 3)), "three-is-every-pixel": ((3, 3), (2, 5)),
            "seven-by-five": ((7, 5), (3, 2)), "one-cell": ((12, 40), (1, 1))}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", BORDERED)
def test_bordered_zq(backend, name, dtype, layout):
    cell, grid = BORDERED[name]
    c = case(
        (2, 16, *(size * many for size, many in zip(cell, grid, strict=True))), tuple(3 * many for many in grid), dtype, layout
    )
    rows, columns = (
        [3 * i + part for i in range(many) for part in [0, *[1] * (size - 2), 2]] for size, many in zip(cell, grid, strict=True)
    )
    y, b = (zq.double()[:, :, rows][:, :, :, columns] for zq in (c.zq_y, c.zq_b))
    out, _, _ = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 4, 1e-6, True, bordered=True)
    assert_close(out, published.spatial_norm(c.f.double(), y, b, c.weight.double(), c.bias.double(), 4, 1e-6, "silu"))


@pytest.mark.parametrize("channel", [0, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_in_f_bias_stays_in_its_group(backend, layout, channel):
    c = case((1, 16, 4, 8), (2, 2), F32, layout)
    f_bias = torch.zeros(16)
    f_bias[channel] = float("nan")
    out, _, _ = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 4, 1e-6, True, f_bias)
    expected = torch.zeros(1, 16, dtype=torch.bool)
    expected[:, channel // 4 * 4 : channel // 4 * 4 + 4] = True
    assert torch.equal(out.isnan().flatten(2).any(2), expected) and torch.equal(out.isnan().flatten(2).all(2), expected)


# --- Launches


@pytest.mark.parametrize("layout", LAYOUTS)
def test_later_kernels_are_dependent_launches(counted, layout):
    """The emulator fails if a dependent kernel uses what another one writes before it waits."""
    c = case((1, 32, 16, 32), (4, 8), BF16, layout)
    counted.seeds = (0,)
    _, mean, rstd = counted.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 4, 1e-6, True)
    assert [launch.dependent for launch in counted.cost.launches] == [False, True, True]
    counted.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, 4, True)
    assert [launch.dependent for launch in counted.cost.launches] == [False, True, True, True]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_code_of_earlier_targets_has_no_dependent_launches(counted, layout):
    """In code for sm_80 no kernel waits for the previous one, so on a Hopper GPU too it must not start before that ends."""
    c = case((1, 32, 16, 32), (4, 8), BF16, layout)
    counted.seeds, counted.dependent_launches = (0,), False
    _, mean, rstd = counted.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 4, 1e-6, True)
    assert [launch.dependent for launch in counted.cost.launches] == [False] * 3
    counted.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, 4, True)
    assert [launch.dependent for launch in counted.cost.launches] == [False] * 4


@pytest.mark.parametrize("channels, rows, zq_size", [(32, 2, (128, 128)), (32, 2, (64, 32)), (64, 4, (64, 32))])
def test_threads_of_large_maps_take_two_columns_in_channels_last(counted, channels, rows, zq_size):
    """And two rows at once. With four rows, and as many in a cell, the second two rows reuse what the first loaded from zq."""
    c = case((1, channels, 256, 256), zq_size, F32, "channels_last")
    counted.seeds = (0,)
    out, _, _ = counted.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 32, 1e-6, True)
    assert_close(out, expected_forward(c, 32, 1e-6, True))
    launch, buffers = launch_named(counted.cost, "spatial_norm modulate"), counted.cost.buffers
    assert threads(launch) * rows * 2 * 16 == buffers["out"].written_bytes == buffers["out"].written_sectors * 32
    reads_of_a_cell = 256 // zq_size[0] // rows * (256 // zq_size[1] // 2)
    assert buffers["zq_y"].read_bytes == reads_of_a_cell * c.zq_y.numel() * 4


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_small_cells_in_nchw_are_loaded_once(counted, dtype):
    c = case((2, 6, 44, 72), (22, 36), dtype, "nchw")
    counted.seeds = (0,)
    out, _, _ = counted.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 2, 1e-6, True)
    assert_close(out, expected_forward(c, 2, 1e-6, True))
    for zq in ("zq_y", "zq_b"):
        assert counted.cost.buffers[zq].read_bytes == c.zq_y.numel() * c.zq_y.element_size()


# --- Extreme values


def test_one_pixel_of_f_and_a_row_of_zq_in_channels_last(backend):
    c = case((1, 2, 1, 1), (1, 2), F32, "channels_last", affine=None)
    out, _, _ = backend.forward(c.f, c.zq_y, c.zq_b, None, None, 1, 1e-2, False)
    assert_close(out, expected_forward(c, 1, 1e-2, False))


def test_nan_and_infinity_stay_in_their_group(backend):
    c = case((2, 32, 4, 8), (2, 2), F32, "nchw")
    c.f[0, 3, 1, 1] = float("nan")
    c.f[1, 31, 0, 0] = float("inf")
    out, mean, rstd = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 8, 1e-6, True)
    bad = out.isnan().flatten(2).any(2)
    expected = torch.zeros(2, 32, dtype=torch.bool)
    expected[0, 0:4] = expected[1, 28:32] = True
    assert torch.equal(bad, expected)
    df = backend.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, 8, True)[0]
    assert torch.equal(df.isnan().flatten(2).any(2), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_accuracy(backend, layout):
    """E[x^2] - E[x]^2 in float32 would have no correct digit here. Only the mean is rounded, to half an ulp."""
    c = case((1, 32, 16, 16), None, F32, layout)
    f = c.f + 4096.0
    out, _, _ = backend.forward(f, None, None, None, None, 8, 1e-6, False)
    assert relative_error(out, published.spatial_norm(f.double(), None, None, None, None, 8)) < 2**-12 * 1.5


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_group_is_normalized_by_eps_alone(backend, value):
    f = torch.full((1, 32, 4, 4), value)
    out, mean, rstd = backend.forward(f, None, None, None, None, 8, 1e-4, False)
    assert torch.equal(out, torch.zeros_like(f)) and torch.equal(mean, torch.full((1, 8), value))
    torch.testing.assert_close(rstd, torch.full((1, 8), 100.0))


@pytest.mark.parametrize("zq_size, offset", [((2, 4), 0), ((4, 8), 0), ((3, 5), 0), ((2, 4), 1), (None, 0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_silu_of_the_largest_values(backend, layout, zq_size, offset):
    """log2(e) times them would overflow. Above 2.36e38 the result is 2.36e38, so that it is finite as well."""
    c = case((1, 16, 4, 8), zq_size, BF16, layout, offset=offset)
    for largest in (-3e38, 3e38):
        if zq_size is None:
            c.bias = torch.full_like(c.bias, largest)
        else:
            c.zq_b = torch.full_like(c.zq_b, largest)
        out, _, _ = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 2, 1e-6, True)
        if largest < 0:
            assert (out == 0).all() and out.signbit().all()  # as torch.nn.functional.silu
        else:
            assert float(out.min()) == float(out.max()) == pytest.approx(torch.finfo(F32).max / 1.442695, rel=2**-8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(backend, data):
    groups = data.draw(st.sampled_from([1, 2, 3, 8, 32]))
    channels = groups * data.draw(st.integers(1, 9))
    size = [data.draw(st.integers(1, 20)) for _ in range(2)]
    zq_size = data.draw(st.none() | st.tuples(st.integers(1, 24), st.integers(1, 24)))
    dtype, layout = data.draw(st.sampled_from([F32, BF16, F16])), data.draw(st.sampled_from(LAYOUTS))
    silu = data.draw(st.booleans())
    c = case(
        (data.draw(st.integers(1, 2)), channels, *size),
        zq_size,
        dtype,
        layout,
        affine=data.draw(st.sampled_from([None, F32, dtype])),
        offset=data.draw(st.integers(0, 1)),
    )
    eps = 1e-2  # with a tiny eps the gradients of groups of one value would be all rounding error
    f_bias, sums = biased(c, data.draw(st.sampled_from([F32, dtype])))
    out, _, _ = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, groups, eps, silu, f_bias)
    assert_close(out, expected_forward(sums, groups, eps, silu), slack=2.0)
    out, mean, rstd = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, groups, eps, silu)
    assert_close(out, expected_forward(c, groups, eps, silu), slack=2.0)
    grads = backend.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, groups, silu)
    for grad, expected in zip(grads, expected_backward(c, groups, eps, silu), strict=True):
        if grad is not None:
            assert_near(grad, expected)


def assert_near(actual, expected):
    """Compare relative to the largest element, for gradients that almost cancel."""
    scale = max(float(expected.abs().max()), 1.0)
    assert float((actual.double() - expected).abs().max()) <= 8 * RELATIVE[actual.dtype] * scale


# --- Costs, counted by the emulator


def launch_named(cost, name):
    return next(launch for launch in cost.launches if launch.kernel == name)


def threads(launch):
    return launch.grid[0] * launch.block[0]


def thread_channels(f):
    """Return how many channels a thread with accesses of 16 bytes owns."""
    return 16 // f.element_size() if is_channels_last(f) else 1


def statistics_bytes(cost, f):
    """Return the bytes of partial statistics and coefficients that move between the passes.

    Each thread of the output reads the coefficients of its channels, 16 bytes a channel. They come from memory once.
    """
    coefficients = 16 * f.shape[0] * f.shape[1]
    workspace, modulate = cost.buffers["workspace"], launch_named(cost, "spatial_norm modulate")
    from_cache = workspace.read_bytes - (workspace.written_bytes - coefficients)
    assert 0 < from_cache <= 16 * thread_channels(f) * threads(modulate)
    return 2 * workspace.written_bytes


BUDGET_CASES = [pytest.param(layout, dtype, id=f"{layout}-{str(dtype)[6:]}") for layout in LAYOUTS for dtype in (F32, BF16)]


@pytest.mark.parametrize("layout, dtype", BUDGET_CASES)
def test_forward_reads_f_twice_and_writes_it_once(counted, layout, dtype):
    c = case((1, 128, 128, 128), (8, 8), dtype, layout)
    counted.seeds = (0,)
    counted.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 32, 1e-6, True)
    size, cost = c.f.numel() * c.f.element_size(), counted.cost
    assert cost.buffers["f"].read_bytes == 2 * size and cost.buffers["out"].written_bytes == size
    # The small tensors come from memory once and then from the cache. The partial statistics are written and read.
    small = sum(t.numel() * t.element_size() for t in (c.zq_y, c.zq_b, c.weight, c.bias)) + 2 * 4 * 32
    others = small + statistics_bytes(cost, c.f)
    assert others <= 0.02 * 3 * size, f"{others / (3 * size):.2%} of the bytes of f and out"
    # Whole sectors: every byte that moves was requested.
    assert cost.buffers["f"].read_sectors * 32 == 2 * size and cost.buffers["out"].written_sectors * 32 == size
    assert {launch.kernel: launch.bank_conflicts for launch in cost.launches if launch.bank_conflicts} == {}
    # The three blocks that the launch bounds allow also fit into the 100 KiB of the smallest multiprocessor.
    assert 3 * max(launch.shared_bytes + 1024 for launch in cost.launches) <= 100 << 10


@pytest.mark.parametrize("layout, dtype", BUDGET_CASES)
def test_f_bias_costs_no_pass(counted, layout, dtype):
    """f and out move the same bytes as without it; the bias is read with the statistics and in the merge, from the cache."""
    c = case((1, 128, 128, 128), (8, 8), dtype, layout)
    counted.seeds = (0,)
    counted.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 32, 1e-6, True, torch.ones(128))
    size, cost = c.f.numel() * c.f.element_size(), counted.cost
    assert cost.buffers["f"].read_bytes == cost.buffers["f"].read_sectors * 32 == 2 * size
    assert cost.buffers["out"].written_bytes == cost.buffers["out"].written_sectors * 32 == size
    assert statistics_bytes(cost, c.f) <= 0.02 * 3 * size
    statistics = launch_named(cost, "spatial_norm statistics")
    assert cost.buffers["f_bias"].read_bytes <= 4 * (thread_channels(c.f) * threads(statistics) + 128)
    assert {launch.kernel: launch.bank_conflicts for launch in cost.launches if launch.bank_conflicts} == {}
    assert 3 * max(launch.shared_bytes + 1024 for launch in cost.launches) <= 100 << 10


@pytest.mark.parametrize("layout, dtype", BUDGET_CASES)
def test_backward_reads_f_and_dout_twice_and_writes_df_once(counted, layout, dtype):
    c = case((1, 64, 64, 64), (8, 8), dtype, layout)
    _, mean, rstd = counted.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 32, 1e-6, True)
    counted.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, 32, True)
    size, cost = c.f.numel() * c.f.element_size(), counted.cost
    for name in ("f", "dout"):
        assert cost.buffers[name].read_bytes == 2 * size and cost.buffers[name].read_sectors * 32 == 2 * size
    assert cost.buffers["df"].written_bytes == size and cost.buffers["df"].written_sectors * 32 == size
    assert cost.buffers["dzq_y"].written_bytes == c.zq_y.numel() * c.zq_y.element_size()


@pytest.mark.parametrize("zq_size", [(1, 1), (2, 2), (8, 8), (8, 16), (16, 32), (32, 64), None], ids=str)
@pytest.mark.parametrize("layout, dtype", BUDGET_CASES)
def test_backward_has_no_bank_conflicts(counted, layout, dtype, zq_size):
    """Cells of 1 to 64 columns, with each of the kernels that sum over cells."""
    c = case((1, 64, 32, 64), zq_size, dtype, layout)
    counted.seeds = (0,)
    _, mean, rstd = counted.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 32, 1e-6, True)
    counted.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, 32, True)
    assert {launch.kernel: launch.bank_conflicts for launch in counted.cost.launches if launch.bank_conflicts} == {}


def test_python_and_the_kernels_have_the_same_pixel_limit(counted):
    assert counted.max_map_pixels() == MAX_MAP_PIXELS


@pytest.mark.parametrize("pixels", [1, 2, 5, 64, 4096])
def test_channels_last_statistics_fit_into_the_shared_memory_of_every_gpu(counted, pixels):
    """Any number of channels per group, in 2 to 64 groups: blocks have 48 KB without asking the driver for more."""
    needed = {groups: counted.interleaved_statistics_shared_bytes(groups, pixels) for groups in range(2, 65)}
    assert max(needed.values()) <= 48 << 10, max(needed.items(), key=lambda item: item[1])


@pytest.mark.parametrize("channels, dtype", [(376, BF16), (840, BF16), (184, F32), (24, F32)])
def test_channels_last_groups_that_share_accesses(counted, channels, dtype):
    """No access of 16 bytes divides a group's channels: blocks keep the moments of each channel."""
    c = case((1, channels, 6, 9), (2, 3), dtype, "channels_last")
    out, *_ = counted.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 8, 1e-6, True)
    assert_close(out, expected_forward(c, 8, 1e-6, True))
    statistics = launch_named(counted.cost, "spatial_norm statistics")
    assert statistics.shared_bytes <= 48 << 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_image_fills_a_gpu(counted, layout):
    """The passes over f have far more blocks than batch * groups = 32."""
    c = case((1, 512, 16, 16), (4, 4), BF16, layout)
    counted.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 32, 1e-6, True)
    grids = {launch.kernel: launch.grid[0] for launch in counted.cost.launches}
    assert min(grids["spatial_norm statistics"], grids["spatial_norm modulate"]) >= 64, grids


@pytest.mark.skipif(not usable("gpu"), reason="needs a GPU and the extension")
def test_more_than_two_to_the_31_elements_on_a_gpu():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    f = torch.randn(1, 64, 1024, 1024, device="cuda", dtype=BF16).expand(33, -1, -1, -1).contiguous()
    y, b = (torch.randn(1, 64, 8, 8, device="cuda", dtype=BF16).expand(33, -1, -1, -1).contiguous() for _ in range(2))
    assert f.numel() > 2**31
    out = movq_ext.spatial_norm(f, y, b, None, None, 32)
    assert torch.equal(out[0], out[-1]) and not out[-1].isnan().any()
