"""The kernel of the epilogue: the same cases on the emulator everywhere, and on a GPU if there is one."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import backends, usable
from kernels.epilogue import Emulator, Gpu
from kernels.spatial_norm import case
from tolerances import assert_close

from movq_ext.ops.functional import add_bias_residual_

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
backend = backends(emulator=Emulator, gpu=Gpu)

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


# --- Costs, counted by the emulator


counted = backends(emulator=Emulator)


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
