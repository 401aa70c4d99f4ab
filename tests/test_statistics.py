"""Statistics left by the kernel that writes a map for the norm that reads it next: when, at what cost, and by which path."""

from types import SimpleNamespace

import pytest
import torch
from kernels import backends, epilogue, spatial_norm, upsampling
from kernels.spatial_norm import case
from models import draw, latents, make_decoder
from tolerances import assert_close

import movq_ext
from movq_ext.model.layers import input_groups
from movq_ext.ops import attention_backends, extension, paths, registration, self_test, statistics
from movq_ext.ops.functional import add_bias_residual_with_statistics_, fused_spatial_norm, upsample_conv_with_statistics
from movq_ext.ops.options import NormOptions

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LAYOUTS = ("nchw", "channels_last")


def emulators():
    return SimpleNamespace(add=epilogue.Emulator(), norm=spatial_norm.Emulator(), upsampling=upsampling.Emulator())


def gpu():
    return SimpleNamespace(add=epilogue.Gpu(), norm=spatial_norm.Gpu(), upsampling=upsampling.Gpu())


backend = backends(emulator=emulators, gpu=gpu)
counted = backends(emulator=emulators)


def chunk_of(x, groups, *others):
    chunk = statistics.chunk_pixels(x, groups, *others)
    assert chunk
    return chunk


# --- The norm with statistics


@pytest.mark.parametrize("shape, groups, zq_size", [((2, 64, 8, 16), 8, (2, 4)), ((1, 128, 16, 16), 32, (16, 16)),
                                                    ((1, 32, 8, 24), 4, (3, 5)), ((2, 32, 8, 8), 2, None)], ids=str)  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_the_norm_is_the_same_with_and_without_statistics(backend, shape, groups, zq_size, layout, dtype):
    c = case(shape, zq_size, dtype, layout)
    left = backend.add.add_with_statistics_(c.f, c.bias, c.dout, groups, chunk_of(c.f, groups))
    norm = c.f, c.zq_y, c.zq_b, c.weight, c.bias, groups, 1e-6, True
    out, mean, rstd = backend.norm.forward(*norm, statistics=left)
    own, own_mean, own_rstd = backend.norm.forward(*norm)
    torch.testing.assert_close(mean, own_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(rstd, own_rstd, rtol=2e-6, atol=0)
    # The last bit of 16-bit results may differ where float32 rounds to either side of a tie.
    assert_close(out, own.double(), slack=0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_accuracy(backend, layout):
    c = case((1, 32, 16, 24), (2, 3), F32, layout)
    c.f.mul_(0.5).add_(3e4)
    left = backend.add.add_with_statistics_(c.f, None, c.dout, 4, chunk_of(c.f, 4))
    norm = c.f, c.zq_y, c.zq_b, c.weight, c.bias, 4, 1e-6, False
    exact = registration.spatial_norm_forward_cpu(*(x.double() for x in norm[:5]), *norm[5:])[0]

    def error(out):
        return (out - exact).norm() / exact.norm()

    half_of_the_last_bit_of_the_mean = 3e4 * 2**-24
    limit = max(error(backend.norm.forward(*norm)[0]), half_of_the_last_bit_of_the_mean)
    assert error(backend.norm.forward(*norm, statistics=left)[0]) <= limit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_group(backend, layout):
    c = case((2, 64, 8, 8), (2, 2), BF16, layout)
    c.f[0, 9, 2, 2], c.dout[1, 63, 7, 7] = float("nan"), float("inf")
    left = backend.add.add_with_statistics_(c.f, c.bias, c.dout, 8, chunk_of(c.f, 8))
    out = backend.norm.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 8, 1e-6, True, statistics=left)[0]
    finite = torch.ones(2, 8, dtype=torch.bool)
    finite[0, 1] = finite[1, 7] = False
    assert torch.equal(out.isfinite().unflatten(1, (8, 8)).all(4).all(3).all(2), finite)
    assert not out[0, 8:16].isfinite().any() and not out[1, 56:].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_norm_reads_f_once(counted, layout, dtype):
    """The two passes together: statistics cost fewer bytes than a tenth of the read that they save."""
    c = case((1, 128, 96, 96), (12, 12), dtype, layout)
    counted.add.seeds = counted.norm.seeds = (0,)
    left = counted.add.add_with_statistics_(c.f, c.bias, c.dout, 32, chunk_of(c.f, 32))
    size = c.f.numel() * c.f.element_size()
    assert counted.add.cost.buffers["x"].read_bytes == counted.add.cost.buffers["x"].written_bytes == size
    counted.norm.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 32, 1e-6, True, statistics=left)
    launches, buffers = counted.norm.cost.launches, counted.norm.cost.buffers
    assert [launch.kernel for launch in launches] == ["spatial_norm merge_statistics", "spatial_norm modulate"]
    assert buffers["f"].read_bytes == buffers["f"].read_sectors * 32 == buffers["out"].written_bytes == size
    read, written = buffers["statistics"].read_bytes, counted.add.cost.buffers["statistics"].written_bytes
    assert read == written == left.numel() * 4 and read + written <= 0.26 * size
    assert buffers["workspace"].written_bytes == 16 * 128  # coefficients


# --- Interleaving


@pytest.mark.parametrize("shape, groups", [((2, 64, 3, 20), 8), ((1, 72, 4, 5), 18), ((1, 64, 2, 40), 2)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_statistics_of_interleaved_windows(backend, shape, groups, dtype):
    batch, channels, height, width = shape
    windows = case((batch, 4 * channels, height + 1, width + 1), None, dtype, "channels_last").f
    bias = torch.linspace(-1, 1, channels)
    columns = 16 if height == 4 else statistics.chunk_columns(windows, groups, bias)
    out, left = backend.upsampling.interleave_with_statistics(windows, bias, groups, columns)
    assert torch.equal(out, registration.interleave_windows_cpu(windows, bias))
    expected = registration.interleave_windows_statistics_cpu(windows, bias, groups, columns)[1]
    for actual, wanted in zip(left.unbind(3), expected.unbind(3), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


# --- When


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 512, 32, 32), (1, 256, 64, 64), (3, 128, 40, 40), (1, 128, 1024, 1024)])
def test_parts_cost_little_and_fill_the_gpu(shape, layout, dtype):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    chunk = chunk_of(x, 32)
    left = registration.add_bias_residual_statistics_fake(x, None, None, 32, chunk)
    size = x.numel() * dtype.itemsize
    assert 2 * left.numel() * 4 <= size / (4 if size < 8 << 20 else 16)  # written and read
    if layout == "channels_last":  # a block leaves one part of each group
        assert left.shape[0] * left.shape[2] >= min(512, size // 4096)


@pytest.mark.parametrize(
    "shape, layout, groups",
    [
        ((1, 64, 8, 8), "channels_last", 0),
        ((1, 64, 8, 8), "channels_last", 5),
        ((1, 96, 8, 8), "channels_last", 16),  # 6 channels a group: an access of 8 holds parts of two
        ((1, 36, 8, 8), "channels_last", 9),  # a pixel is not a whole number of accesses
        ((1, 4096, 8, 8), "channels_last", 32),
        ((1, 64, 5, 5), "nchw", 8),
    ],
)
def test_sizes_without_statistics(shape, layout, groups):
    assert statistics.chunk_pixels(case(shape, None, BF16, layout).f, groups) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unaligned_tensors_have_no_statistics(layout):
    aligned, unaligned = (case((1, 64, 8, 8), None, BF16, layout, offset=offset).f for offset in (0, 1))
    bias = torch.zeros(65)[1:]
    assert statistics.chunk_pixels(aligned, 8, None, aligned)
    assert statistics.chunk_pixels(unaligned, 8) is statistics.chunk_pixels(aligned, 8, bias) is None
    windows = case((1, 256, 5, 5), None, BF16, "channels_last").f
    assert statistics.chunk_columns(windows, 8, None) and statistics.chunk_columns(windows, 8, bias) is None


# --- The path through a decoder


@pytest.fixture
def norms(monkeypatch):
    """Pretend that tensors are on a GPU, with CPU implementations of the kernels. Records the statistics of every norm."""
    seen = []

    def norm(f, *arguments):
        left = (*arguments, None, None, None)[9]
        if left is not None:
            mean, m2, count, _ = left.double().unbind(3)
            values = f.double().reshape(f.shape[0], arguments[4], -1)
            total_mean = (mean * count).sum(2) / count.sum(2)
            torch.testing.assert_close(total_mean, values.mean(2), rtol=1e-5, atol=1e-6)
            total_m2 = (m2 + count * (mean - total_mean[:, :, None]) ** 2).sum(2)
            torch.testing.assert_close(total_m2, ((values - values.mean(2, keepdim=True)) ** 2).sum(2), rtol=1e-5, atol=0)
        seen.append(left)
        return registration.spatial_norm_forward_cpu(f, *arguments)

    for name, implementation in {**registration.CPU_IMPLEMENTATIONS, "spatial_norm_forward": norm}.items():
        monkeypatch.setattr(torch.ops.movq_ext, name, implementation, raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(self_test, "_results", {})
    monkeypatch.setenv(self_test.VARIABLE, "0")
    for module in (paths, attention_backends):
        monkeypatch.setattr(module, "device_reason", lambda index: None)
    monkeypatch.setattr(attention_backends, "device_capability", lambda index: None)
    extension.warn_once.cache_clear()
    return seen


@torch.no_grad()
def test_every_norm_after_a_kernel_of_ours_takes_its_statistics(norms):
    decoder, z, zq = make_decoder(ch=128), *latents((4, 4), batch=2)
    image = decoder._forward_fused(z, zq)
    taken = [left is not None for left in norms]
    norms.clear()
    expected = decoder.forward_with_features_output(z, zq)[0]  # layer by layer
    assert not any(left is not None for left in norms)
    assert_close(image, expected.double(), slack=10)
    blocks = sum(isinstance(layer, movq_ext.ResnetBlock) for layer in decoder.layers())
    assert len(taken) == len(norms) and taken.count(False) == blocks + 1  # norm2 follows a convolution, the first norm conv_in


@torch.no_grad()
def test_a_decoder_without_norm_out_leaves_no_statistics_at_the_end(norms, monkeypatch):
    decoder, z, zq = make_decoder(ch=128, give_pre_end=True), *latents((4, 4), batch=1)
    left = []

    def add(*arguments):
        left.append(registration.add_bias_residual_statistics_cpu(*arguments))
        return left[-1]

    monkeypatch.setattr(torch.ops.movq_ext, "add_bias_residual_statistics_", add, raising=False)
    decoder._forward_fused(z, zq)
    assert len(left) == sum(taken is not None for taken in norms)


@torch.no_grad()
def test_hooks_and_replaced_layers_never_see_stale_statistics(norms, monkeypatch):
    """The fixture compares statistics with the map that the norm gets. A GPU's path is taken whatever the device is called."""
    monkeypatch.setattr("movq_ext.model.decoder.decode_in_strips", lambda decoder, z, zq: decoder._forward_fused(z, zq))
    decoder, z, zq = make_decoder(ch=128), *latents((4, 4), batch=1)
    decoder(z, zq)
    assert any(left is not None for left in norms)
    block = decoder.up[0].block[0]
    for module in (block, block.conv2, block.norm1):
        handle = module.register_forward_hook(lambda module, inputs, out: 2 * out + 1)
        norms.clear()
        decoder(z, zq)
        assert not any(left is not None for left in norms)
        handle.remove()

    class Doubled(movq_ext.ResnetBlock):
        def forward(self, x, temb=None, zq=None):
            return 2 * super().forward(x, temb, zq)

    block.__class__ = Doubled
    norms.clear()
    decoder(z, zq)
    assert not any(left is not None for left in norms)


@torch.no_grad()
def test_a_norm_of_other_groups_gets_its_own(norms):
    decoder, z, zq = make_decoder(ch=128), *latents((4, 4), batch=1)
    block = decoder.up[0].block[1]
    block.norm1.norm_layer = torch.nn.GroupNorm(4, block.in_channels)
    assert input_groups(block) == 4
    decoder._forward_fused(z, zq)
    assert {left.shape[1] for left in norms if left is not None} == {4, 32}


def test_input_groups():
    assert [input_groups(layer) for layer in (None, torch.nn.Conv2d(32, 32, 1), movq_ext.Upsample(32, True))] == [0, 0, 0]
    layers = movq_ext.ResnetBlock(in_channels=32), movq_ext.AttnBlock(64, 4), movq_ext.SpatialNorm(6, 4, num_groups=3)
    assert [input_groups(layer) for layer in layers] == [32, 32, 3]


@torch.no_grad()
def test_an_upsampling_leaves_statistics(norms):
    x, weight, bias = (draw(*shape).float() for shape in ((2, 32, 6, 8), (64, 32, 3, 3), (64,)))
    x = x.contiguous(memory_format=torch.channels_last)
    for method in ("transposed", "windows", "direct"):
        values, left = upsample_conv_with_statistics(x, weight, bias, 8, method)
        norm = NormOptions(None, None, 8)
        expected = fused_spatial_norm(values, None, None, norm)
        torch.testing.assert_close(fused_spatial_norm(values, None, None, NormOptions(None, None, 8, statistics=left)), expected)
        assert norms[-1] is left is not None
        assert upsample_conv_with_statistics(x, weight, None, 8, method).statistics is None or method == "windows"
        assert upsample_conv_with_statistics(x, weight, bias, 0, method).statistics is None


def test_the_native_path_leaves_none():
    x = draw(1, 32, 4, 4)
    out, left = add_bias_residual_with_statistics_(x, None, x, 8)
    assert out is x and left is None
    assert upsample_conv_with_statistics(x, draw(32, 32, 3, 3), draw(32), 8).statistics is None


def test_errors_name_the_statistics():
    f, left = draw(2, 32, 4, 4).float(), torch.zeros(2, 8, 3, 4)
    for message, error, options in [
        (r"statistics must have shape \(2, 8, parts, 4\), got \(2, 4, 3, 4\)", ValueError, dict(statistics=left[:, :4])),
        ("statistics must be float32, got torch.float64", TypeError, dict(statistics=left.double())),
        ("statistics must not be given with f_bias", ValueError, dict(statistics=left, f_bias=torch.zeros(32))),
    ]:
        with pytest.raises(error, match=message):
            fused_spatial_norm(f, None, None, NormOptions(None, None, 8, **options))
    with pytest.raises(ValueError, match="spatial_norm with statistics records none"):
        fused_spatial_norm(f.requires_grad_(), None, None, NormOptions(None, None, 8, statistics=left))
