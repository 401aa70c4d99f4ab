"""The torch side of the operators with loops in place of the kernels: layouts, copies and results."""

import emulator
import pytest
import torch
import torch_side
from operators import (
    CLIP,
    GROUPS,
    LAYOUTS,
    attention_arguments,
    detached,
    epilogue_arguments,
    norm_arguments,
    shared_kv_arguments,
)
from tolerances import assert_close
from torch_side import operators, sliced

from movq_ext.ops.registration import CPU_IMPLEMENTATIONS

pytestmark = pytest.mark.skipif(not emulator.available(), reason="needs Linux and a host C++ compiler")

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def fake():
    """The fake CUDA runtime, once the operators exist."""
    return torch_side.build()[1]


def assert_same(results, expected, exact_strides=True):
    for result, want in zip(results, expected, strict=True):
        assert result.dtype == want.dtype and (result.stride() == want.stride() or not exact_strides)
        assert_close(result, want, slack=3.0)


# --- Spatial norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zq_size, affine", [((2, 4), torch.float32), ((3, 5), None), (None, torch.float32)])
def test_spatial_norm(dtype, layout, zq_size, affine):
    inputs, dout = norm_arguments(dtype, layout, zq_size, affine)
    forward = *detached(inputs), GROUPS, EPS, True
    results = operators.spatial_norm_forward(*forward)
    assert_same(results, CPU_IMPLEMENTATIONS["spatial_norm_forward"](*forward))
    backward = dout, *detached(inputs), *results[1:], GROUPS, True
    assert_same(operators.spatial_norm_backward(*backward), CPU_IMPLEMENTATIONS["spatial_norm_backward"](*backward))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spatial_norm_copies_strided_arguments_and_those_in_another_layout(layout):
    inputs, dout = norm_arguments(layout=layout)
    f, zq_y, zq_b, weight, bias = detached(inputs)
    given = sliced(f), zq_y.contiguous(), zq_b.contiguous(memory_format=torch.channels_last), sliced(weight), sliced(bias)
    results = operators.spatial_norm_forward(*given, GROUPS, EPS, True, sliced(bias))
    assert_same(results, CPU_IMPLEMENTATIONS["spatial_norm_forward"](*given, GROUPS, EPS, True, bias))
    backward = sliced(dout), *given, *results[1:], GROUPS, True
    assert_same(operators.spatial_norm_backward(*backward), CPU_IMPLEMENTATIONS["spatial_norm_backward"](*backward))


@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (3, 1, 1, 1), (1, 8, 1, 5), (1, 1, 4, 3), (2, 8, 4, 3)])
@pytest.mark.parametrize("permutation", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2), (3, 1, 2, 0)])
def test_layouts_of_spatial_norm_match_the_fake_implementation(shape, permutation):
    """The result's strides are part of a compiled graph, so ambiguous layouts must be read as PyTorch reads them."""
    f = torch.randn([shape[i] for i in permutation]).permute([permutation.index(i) for i in range(4)])
    assert f.shape == shape
    for x in (f, f.repeat_interleave(2, dim=3)[..., ::2], f.expand(2, *shape[1:]) if shape[0] == 1 else f):
        arguments = x, None, None, None, None, 1, EPS, False
        assert_same(operators.spatial_norm_forward(*arguments), CPU_IMPLEMENTATIONS["spatial_norm_forward"](*arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clip", [CLIP, (2, 1, False), (8, 2, False)], ids=str)
def test_the_spatial_norm_of_a_clip(layout, clip):
    inputs, dout = norm_arguments(layout=layout, zq_size=(4, 3))
    inputs = detached(inputs)
    forward = *inputs, GROUPS, EPS, True, None, False, None, *clip
    results = operators.spatial_norm_forward(*forward)
    assert_same(results, CPU_IMPLEMENTATIONS["spatial_norm_forward"](*forward))
    backward = dout, *inputs, *results[1:], GROUPS, True, *clip
    assert_same(operators.spatial_norm_backward(*backward), CPU_IMPLEMENTATIONS["spatial_norm_backward"](*backward))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clip", [CLIP, (1, 1, False)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_result_goes_behind_other_frames(layout, clip, batch):
    inputs, _ = norm_arguments(layout=layout)
    f, zq_y, zq_b, weight, bias = detached(inputs)
    f, zq_y, zq_b = (x[:batch] for x in (f, zq_y, zq_b))
    arguments = f, zq_y, zq_b, weight, bias, GROUPS, EPS, True
    expected, *_ = CPU_IMPLEMENTATIONS["spatial_norm_forward"](*arguments, None, False, None, *clip)
    padded = torch.full_like(torch.cat([f, f], dim=2), 7)
    assert operators.spatial_norm_into(padded[:, :, 8:], *arguments, *clip) is None
    assert_close(padded[:, :, 8:], expected)
    assert (padded[:, :, :8] == 7).all()
    f = f.clone()
    operators.spatial_norm_into(f, f, *arguments[1:], *clip)
    assert_close(f, expected)


def test_the_batch_stride_of_one_channels_last_image_does_not_matter():
    inputs, _ = norm_arguments(layout="channels_last", zq_size=(4, 3))
    f, zq_y, zq_b, weight, bias = detached(inputs)
    arguments = zq_y[:1], zq_b[:1], weight, bias, GROUPS, EPS, True
    expected, *_ = CPU_IMPLEMENTATIONS["spatial_norm_forward"](f[:1], *arguments, None, False, None, *CLIP)
    f = f[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]
    assert f.stride(0) == f.shape[1]
    operators.spatial_norm_into(f, f, *arguments, *CLIP)
    assert_close(f, expected)


def test_a_bordered_latent():
    f, y, b, weight, bias = detached(norm_arguments(zq_size=(6, 9))[0])
    arguments = f, y, b, weight, bias, GROUPS, EPS, True, torch.ones(32), True
    assert_same(operators.spatial_norm_forward(*arguments), CPU_IMPLEMENTATIONS["spatial_norm_forward"](*arguments))


# --- Attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 20])  # 20 elements of 16 bits are padded
@pytest.mark.parametrize("name, arguments", [("attention", attention_arguments), ("shared_kv_attention", shared_kv_arguments)])
def test_attention(name, arguments, size, dtype):
    inputs, dout = arguments(dtype, size)
    inputs = detached(inputs)
    strided = [
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs
    ]  # heads beside each other, as projections leave them
    for given in (inputs, strided, [sliced(x) for x in inputs]):
        results = getattr(operators, f"{name}_forward")(*given, 0.2)
        assert_same(results, CPU_IMPLEMENTATIONS[f"{name}_forward"](*inputs, 0.2))
        backward = getattr(operators, f"{name}_backward")(sliced(dout), *given, *results, 0.2)
        assert_same(backward, CPU_IMPLEMENTATIONS[f"{name}_backward"](dout, *inputs, *results, 0.2))


def test_only_unaligned_attention_arguments_are_copied():
    def copies(*inputs):
        with torch.profiler.profile() as profile:
            operators.attention_forward(*inputs, 0.2)
        return sum(event.name == "aten::copy_" for event in profile.events())

    q, k, v = detached(attention_arguments()[0])
    assert copies(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))) == 0
    assert copies(q, sliced(k), v) == 1


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("size, runs", [(128, True), (24, False)])
def test_hopper_kernels_run_only_where_they_can(fake, present, size, runs):
    """A program that was exported for them may meet another device."""
    (q, kv), dout = shared_kv_arguments(torch.bfloat16, size)
    q, kv = q.detach(), kv.detach()
    fake.set_hopper(present)
    try:
        fake.take_events()
        out, lse = operators.shared_kv_attention_forward(q, kv, 0.1, True)
        grads = operators.shared_kv_attention_backward(dout, q, kv, out, lse, 0.1, True)
        assert fake.take_events().decode().count("hopper") == 2 * (present and runs)
        operators.shared_kv_attention_forward(q, kv, 0.1)
        assert b"hopper" not in fake.take_events()
    finally:
        fake.set_hopper(False)
    assert_same((out, lse), CPU_IMPLEMENTATIONS["shared_kv_attention_forward"](q, kv, 0.1))
    assert_same(grads, CPU_IMPLEMENTATIONS["shared_kv_attention_backward"](dout, q, kv, out, lse, 0.1))


# --- Epilogue


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue(dtype, layout):
    x, bias, residual = epilogue_arguments(dtype, layout)
    for b, r in ((bias, residual), (sliced(bias), None), (None, sliced(residual)), (bias, residual.contiguous())):
        out, expected = x.clone(), x.clone()
        assert operators.add_bias_residual_(out, b, r) is None
        CPU_IMPLEMENTATIONS["add_bias_residual_"](expected, b, r)
        assert torch.equal(out, expected) and out.stride() == x.stride()


def test_epilogue_takes_x_as_its_residual_but_no_other_overlap():
    storage = torch.arange(100.0)
    x = storage[:96].view(2, 3, 4, 4)
    operators.add_bias_residual_(x, None, x)
    assert torch.equal(x, 2 * torch.arange(96.0).view(2, 3, 4, 4))
    with pytest.raises(ValueError, match="residual must be x itself or not overlap it, got one that starts 16 bytes after x"):
        operators.add_bias_residual_(x, None, storage[4:].view(2, 3, 4, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue_with_statistics(dtype, layout):
    x, bias, residual = epilogue_arguments(dtype, layout)
    for groups, chunk in ((8, 40), (1, 96), (4, 1000)):
        for b, r in ((bias, residual), (None, sliced(residual))):
            out, expected = x.clone(), x.clone()
            statistics = operators.add_bias_residual_statistics_(out, b, r, groups, chunk)
            assert_same([statistics], [CPU_IMPLEMENTATIONS["add_bias_residual_statistics_"](expected, b, r, groups, chunk)])
            assert torch.equal(out, expected) and out.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_spatial_norm_takes_statistics(dtype, layout):
    (f, *others), _ = norm_arguments(dtype, layout)
    f = f.detach()
    statistics = operators.add_bias_residual_statistics_(f, None, torch.zeros_like(f), GROUPS, 40)
    norm = f, *detached(others), GROUPS, EPS, True
    results = operators.spatial_norm_forward(*norm, None, False, statistics)
    assert_same(results, CPU_IMPLEMENTATIONS["spatial_norm_forward"](*norm))
    statistics[1, 2, 0, 0] += 1  # they are what the launcher gets
    others = operators.spatial_norm_forward(*norm, None, False, statistics)
    differs = (others[0] != results[0]).unflatten(1, (GROUPS, -1)).any(4).any(3).any(2)
    assert differs[1, 2] and differs.sum() == 1


# --- Upsampling


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_of_an_upsampling(dtype, layout):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    weight = torch.randn(6, 5, 3, 3).to(dtype).contiguous(memory_format=memory_format)
    for windows in (False, True):
        expected = CPU_IMPLEMENTATIONS["fold_upsampling"](weight, windows)
        assert_same([operators.fold_upsampling(weight, windows)], [expected])
        assert_same([operators.fold_upsampling(sliced(weight), windows)], [expected])
    dfolded = torch.randn(5, 6, 4, 4).to(dtype)
    for channels_last in (False, True):
        expected = CPU_IMPLEMENTATIONS["fold_upsampling_backward"](dfolded, channels_last)
        assert_same([operators.fold_upsampling_backward(dfolded, channels_last)], [expected])


@pytest.mark.parametrize("dtype", DTYPES)
def test_interleaved_windows(dtype):
    windows, bias = torch.randn(2, 12, 4, 3).to(dtype), torch.randn(3)
    for given, b in ((windows, bias), (sliced(windows), sliced(bias)), (windows, None), (windows, bias.to(dtype))):
        assert_same([operators.interleave_windows(given, b)], [CPU_IMPLEMENTATIONS["interleave_windows"](given, b)])
        results = operators.interleave_windows_statistics(given, b, 3, 3)
        assert_same(results, CPU_IMPLEMENTATIONS["interleave_windows_statistics"](given, b, 3, 3))
