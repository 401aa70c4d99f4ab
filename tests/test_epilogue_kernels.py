"""The kernel of the epilogue: the same cases on the emulator everywhere, and on a GPU if there is one."""

import emulator
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import backends, epilogue, spatial_norm, usable
from kernels.epilogue import Emulator, Gpu
from kernels.spatial_norm import case
from tolerances import assert_close

from movq_ext.ops.functional import add_bias_residual_

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
backend = backends(emulator=Emulator, gpu=Gpu)
counted = backends(emulator=Emulator)
NORMS = {Emulator: spatial_norm.Emulator, Gpu: spatial_norm.Gpu}

# Shapes of x. The cases named `small` are for slow sanitizers.
SHAPES = {
    "small": (2, 32, 8, 16),
    "small-odd": (1, 6, 5, 7),
    "one-pixel": (3, 40, 1, 1),
    "one-channel": (2, 1, 24, 40),
    "channels-beside-a-block": (1, 24, 13, 16),
    "more-channels-than-a-block": (2, 2056, 1, 3),
    "one-value": (1, 1, 1, 1),
    "many-images": (70, 3, 4, 4),
}
LAYOUTS = ("nchw", "channels_last")
CASES = [
    pytest.param(shape, dtype, layout, offset, id=f"{name}-{str(dtype)[6:]}-{layout}{'-unaligned' * (offset > 0)}")
    for name, shape in SHAPES.items()
    for layout in LAYOUTS
    for dtype, offset in ((F32, 0), (BF16, 0), *(((F16, 0), (F16, 1)) if "small" in name else ()))
]


def total(x, bias, residual):
    """Return the sum in float64."""
    out = x.double()
    out = out if bias is None else out + bias.double()[:, None, None]
    return out if residual is None else out + residual.double()


@pytest.mark.parametrize("shape, dtype, layout, offset", CASES)
@pytest.mark.parametrize("given_", ["bias", "residual", "both", "both-float-bias"])
def test_it_adds_bias_and_residual(backend, shape, dtype, layout, offset, given_):
    c = case(shape, None, dtype, layout, affine=F32 if given_ == "both-float-bias" else dtype, offset=offset)
    bias, residual = None if given_ == "residual" else c.bias, None if given_ == "bias" else c.dout
    expected, strides = total(c.f, bias, residual), c.f.stride()
    out = backend.add_(c.f, bias, residual)
    assert_close(out, expected)
    assert out.stride() == strides


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_thread_crosses_channels(backend, layout):
    c = case((3, 67, 61, 53), None, F32, layout)  # 2 rounds of single elements per thread
    backend.seeds = (0,)
    expected = total(c.f, c.bias, c.dout)
    assert_close(backend.add_(c.f, c.bias, c.dout), expected)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sum_is_rounded_once(backend, dtype, layout):
    c = case((1, 32, 8, 8), None, dtype, layout)
    expected = (c.f.float() + c.bias[:, None, None] + c.dout.float()).to(dtype)
    twice = c.f + c.bias.to(dtype)[:, None, None] + c.dout
    assert torch.equal(backend.add_(c.f, c.bias, c.dout), expected) and not torch.equal(twice, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_residual_may_be_x_itself(backend, layout):
    c = case((2, 32, 4, 8), None, F32, layout)
    expected = total(c.f, c.bias, c.f)
    assert_close(backend.add_(c.f, c.bias, c.f), expected)


@pytest.mark.parametrize("unaligned", ["bias", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_unaligned_tensor_forces_single_element_accesses(backend, layout, unaligned):
    c, d = (case((1, 32, 4, 8), None, BF16, layout, offset=offset) for offset in (0, 1))
    bias = torch.cat([torch.zeros(1), c.bias])[1:] if unaligned == "bias" else c.bias
    residual = d.dout if unaligned == "residual" else c.dout
    expected = total(c.f, bias, residual)
    assert_close(backend.add_(c.f, bias, residual), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_elements(backend, layout):
    c = case((2, 32, 4, 8), None, BF16, layout)
    c.f[0, 3, 1, 1], c.dout[1, 31, 3, 7], c.bias[5] = float("nan"), float("inf"), -float("inf")
    out = backend.add_(c.f, c.bias, c.dout)
    expected = torch.zeros(out.shape, dtype=torch.bool)
    expected[:, 5] = expected[0, 3, 1, 1] = expected[1, 31, 3, 7] = True
    assert torch.equal(out.isfinite(), ~expected)
    assert out[0, 3, 1, 1].isnan() and out[1, 31, 3, 7] == float("inf") and (out[:, 5] == -float("inf")).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(backend, data):
    shape = [data.draw(st.integers(1, maximum)) for maximum in (3, 80, 20, 40)]
    dtype, layout = data.draw(st.sampled_from([F32, BF16, F16])), data.draw(st.sampled_from(LAYOUTS))
    c = case(shape, None, dtype, layout, affine=data.draw(st.sampled_from([F32, dtype])), offset=data.draw(st.integers(0, 1)))
    bias, residual = data.draw(st.sampled_from([(c.bias, c.dout), (c.bias, None), (None, c.dout)]))
    expected = total(c.f, bias, residual)
    assert_close(backend.add_(c.f, bias, residual), expected)


# --- Statistics of the sum


def merged(statistics):
    """Return mean, variance and count of every image and group in float64, from the statistics of its parts."""
    mean, m2, count, zero = statistics.double().unbind(3)
    assert (zero == 0).all() and (count > 0).all()
    total = count.sum(2)
    centre = (mean * count).sum(2) / total
    return centre, (m2 + count * (mean - centre[:, :, None]) ** 2).sum(2) / total, total


def moments(x, groups):
    values = x.double().reshape(x.shape[0], groups, -1)
    return values.mean(2), values.var(2, correction=0), torch.full(values.shape[:2], values.shape[2], dtype=torch.float64)


# Shape, groups and pixels of a chunk. Both quads of an access belong to one group, to two, or to the only one.
STATISTICS_CASES = {
    "two-quads-of-a-group": ((2, 64, 8, 24), 4, 64),
    "two-groups-of-an-access": ((1, 128, 16, 16), 32, 80),
    "groups-of-many-quads": ((1, 1024, 1, 8), 2, 8),
    "one-group": ((3, 40, 6, 8), 1, 16),
    "one-chunk": ((2, 32, 8, 8), 8, 4096),
    "columns-beside-a-warp": ((1, 24, 9, 24), 6, 40),
    "one-pixel": ((70, 32, 1, 8), 8, 8),
}


@pytest.mark.parametrize("name", STATISTICS_CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_statistics_of_the_sum(backend, dtype, layout, name):
    shape, groups, chunk = STATISTICS_CASES[name]
    c = case(shape, None, dtype, layout)
    residual = None if dtype == F16 else c.dout
    expected = total(c.f, c.bias, residual)
    statistics = backend.add_with_statistics_(c.f, c.bias, residual, groups, chunk)
    assert_close(c.f, expected)
    mean, variance, count = merged(statistics)
    exact_mean, exact_variance, exact_count = moments(c.f, groups)  # of the rounded values
    assert torch.equal(count, exact_count)
    torch.testing.assert_close(mean, exact_mean, rtol=0, atol=3e-7)
    torch.testing.assert_close(variance, exact_variance, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [1e2, 1e4, 1e5])
def test_statistics_do_not_cancel(backend, layout, mean):
    """At most twice the error of the norm's own pass, which has Welford's update for every value."""
    c = case((1, 32, 32, 32), None, F32, layout)
    c.f.mul_(0.5).add_(mean)
    statistics = backend.add_with_statistics_(c.f, None, c.dout, 8, 64)
    exact_mean, exact_variance, _ = moments(c.f, 8)
    actual_mean, variance, _ = merged(statistics)
    _, own_mean, own_rstd = NORMS[type(backend)]().forward(c.f, None, None, None, None, 8, 0.0, False)
    own_variance = own_rstd.double() ** -2

    def error(values, exact):
        return ((values - exact) / exact).abs().max()

    assert error(actual_mean, exact_mean) <= 2 * error(own_mean, exact_mean) + 2**-24
    assert error(variance, exact_variance) <= 2 * error(own_variance, exact_variance) + 2**-22


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_group(backend, layout, dtype):
    c = case((2, 32, 4, 16), None, dtype, layout)
    c.f[0, 5, 1, 1], c.dout[1, 31, 3, 7] = float("nan"), float("inf")
    mean, variance, _ = merged(backend.add_with_statistics_(c.f, c.bias, c.dout, 8, 16))
    finite = torch.ones(2, 8, dtype=torch.bool)
    finite[0, 1] = finite[1, 7] = False
    assert torch.equal(variance.isfinite(), finite) and torch.equal(mean.isfinite(), finite)


@pytest.mark.parametrize(
    "shape, layout, groups, chunk, offset",
    [
        ((1, 24, 8, 8), "channels_last", 4, 16, 0),  # 6 channels a group
        ((1, 4096, 1, 8), "channels_last", 32, 8, 0),  # more than a block reads of a pixel
        ((1, 32, 8, 8), "channels_last", 5, 8, 0),
        ((1, 32, 8, 8), "channels_last", 8, 0, 0),
        ((1, 32, 8, 8), "channels_last", 8, 8, 1),
        ((1, 32, 5, 5), "nchw", 8, 8, 0),
        ((1, 32, 8, 8), "nchw", 8, 12, 0),
    ],
)
def test_sizes_without_statistics_are_an_error(counted, shape, layout, groups, chunk, offset):
    c = case(shape, None, BF16, layout, offset=offset)
    library = epilogue.library()
    problem = dict(batch=1, channels=shape[1], pixels=shape[2] * shape[3], dtype=2, bias_dtype=0, groups=groups)
    arguments = dict(**problem, chunk_pixels=chunk, channels_last=layout == "channels_last", x=c.f, bias=c.bias, residual=c.dout)
    with pytest.raises(emulator.EmulatorError, match="expected sizes and alignment for which"):
        library.call("add", **arguments, statistics=torch.zeros(1 << 16), seeds=(0,))


# --- Costs, counted by the emulator


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pass_in_whole_sectors_and_wide_requests(counted, layout, dtype):
    c = case((1, 128, 96, 96), None, dtype, layout)  # several rounds per thread, and a block that is not full
    counted.seeds = (0,)
    counted.add_(c.f, c.bias, c.dout)
    size, (launch,) = c.f.numel() * c.f.element_size(), counted.cost.launches
    x, residual = counted.cost.buffers["x"], counted.cost.buffers["residual"]
    assert x.read_bytes == residual.read_bytes == x.written_bytes == size
    assert x.read_sectors * 32 == residual.read_sectors * 32 == x.written_sectors * 32 == size
    for requests in (x.read_requests, residual.read_requests, x.write_requests):
        assert requests * 32 * 16 == size  # 32 lanes of 16 bytes
    assert launch.shared_bytes == 0 and launch.grid[0] >= min(1024, size // 16 // 256)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_cost_no_reads_and_few_writes(counted, layout, dtype):
    c = case((1, 128, 64, 96), None, dtype, layout)
    counted.seeds = (0,)
    chunk = 128 if layout == "channels_last" else 2048
    statistics = counted.add_with_statistics_(c.f, c.bias, c.dout, 32, chunk)
    size, (launch,) = c.f.numel() * c.f.element_size(), counted.cost.launches
    x, residual, written = (counted.cost.buffers[name] for name in ("x", "residual", "statistics"))
    assert x.read_sectors * 32 == residual.read_sectors * 32 == x.written_sectors * 32 == size
    for requests in (x.read_requests, residual.read_requests, x.write_requests):
        assert requests * 32 * 16 == size  # 32 lanes of 16 bytes
    assert written.read_bytes == 0 and written.written_bytes == statistics.numel() * 4 <= 0.02 * size
    assert launch.bank_conflicts == 0


@pytest.mark.parametrize(
    "shape, layout, groups",
    [((1, 512, 2, 4), "nchw", 32), ((1, 8, 16, 16), "channels_last", 2), ((1, 16, 16, 16), "channels_last", 1)],
)
def test_statistics_of_narrow_rows_need_little_shared_memory(backend, shape, layout, groups):
    """Four blocks fit on every GPU's multiprocessor, 100 KB on the smallest."""
    c = case(shape, None, BF16, layout)
    chunk = shape[2] * shape[3]
    mean, variance, count = merged(backend.add_with_statistics_(c.f, c.bias, c.dout, groups, chunk))
    exact_mean, exact_variance, exact_count = moments(c.f, groups)
    assert torch.equal(count, exact_count)
    torch.testing.assert_close(mean, exact_mean, rtol=0, atol=3e-7)
    torch.testing.assert_close(variance, exact_variance, rtol=1e-6, atol=0)
    if isinstance(backend, Emulator):
        assert backend.cost.launches[0].shared_bytes <= 16 << 10


def test_no_block_of_statistics_takes_more_than_16_kib(counted):
    """Every block of 256 threads with accesses of one or two quads, and every width of a group."""

    def quad_bytes(**plan):
        result = torch.zeros(1, dtype=torch.int32)
        epilogue.library().call("quad_bytes", **plan, bytes=result, seeds=(0,))
        return result.item()

    for quads in (1, 2):
        for accesses in (1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 64, 85, 128, 255, 256):
            rows, columns = 256 // accesses, accesses * quads
            assert quad_bytes(rows=rows, columns=columns, group_rows=1, group_columns=columns) <= 16 << 10
            for group_columns in (width for width in range(1, columns + 1) if columns % width == 0):
                assert quad_bytes(rows=rows, columns=columns, group_rows=rows, group_columns=group_columns) <= 16 << 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_thread_reads_the_bias_once_per_channel(counted, layout):
    c = case((1, 512, 128, 96), None, BF16, layout)  # 3 rounds per thread
    counted.seeds = (0,)
    counted.add_(c.f, c.bias, c.dout)
    threads = counted.cost.launches[0].grid[0] * 256
    thread_bytes = 8 * 4 if layout == "channels_last" else 4
    assert counted.cost.buffers["bias"].read_bytes <= threads * thread_bytes * (1 if layout == "channels_last" else 2)


@pytest.mark.skipif(not usable("gpu"), reason="needs a GPU and the extension")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_more_than_two_to_the_31_elements_on_a_gpu(layout):
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    one = torch.randn(1, 64, 1024, 1024, device="cuda", dtype=BF16)
    x = one.expand(33, -1, -1, -1).contiguous(memory_format=layout)
    assert x.numel() > 2**31
    bias = torch.randn(64, device="cuda")
    add_bias_residual_(x, bias, x)
    expected = (one.float() + bias[:, None, None] + one.float()).bfloat16()  # in the kernel's order, because each sum is rounded
    assert torch.equal(x[:1], expected) and torch.equal(x[-1:], expected)
