"""Batched modulations against conv_y and conv_b of each norm."""

import pytest
import torch
import torch.nn.functional as F
from models import draw, latents, make_decoder
from spies import record_calls
from tolerances import assert_close, relative_error

from movq_ext import SpatialNorm
from movq_ext.model import modulation
from movq_ext.model.modulation import Modulations, can_convolve_cells, convolve_cells, modulate


def norms(*channels, zq=5, **changes):
    torch.manual_seed(0)
    return [SpatialNorm(c, zq, num_groups=8, **changes).double() for c in channels]


@pytest.fixture
def batch_sizes(monkeypatch):
    """The number of norms in each batched product, in order."""
    return record_calls(monkeypatch, modulation, "multiply", lambda result, batch, zq: len(batch.norms))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_modulate_matches_the_convolutions_of_each_norm(layout):
    zq = torch.randn(3, 5, 4, 7, dtype=torch.float64).contiguous(memory_format=layout)
    layers = norms(16, 16, 16)
    for layer, modulated in zip(layers, modulate(layers, zq), strict=True):
        for map_, expected in zip(modulated, (layer.conv_y(zq), layer.conv_b(zq)), strict=True):
            assert map_.is_contiguous(memory_format=torch.channels_last)
            assert_close(map_, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_single_norm_takes_a_product_for_each_convolution_on_a_gpu(batch_sizes, monkeypatch, layout):
    monkeypatch.setattr(modulation, "runs_kernels", lambda x: True)
    zq, (layer, *others) = torch.randn(3, 5, 4, 7, dtype=torch.float64).contiguous(memory_format=layout), norms(16, 16)
    for map_, conv in zip(*modulate([layer], zq), (layer.conv_y, layer.conv_b), strict=True):
        assert map_.is_contiguous(memory_format=torch.channels_last)
        assert_close(map_, conv(zq))
    assert batch_sizes == []
    modulate([layer, *others], zq)
    assert batch_sizes == [2]


@pytest.mark.parametrize("max_bytes, sizes", [(1 << 30, [4, 1]), (1, [1, 1, 1, 1, 1]), (2 * 2 * 16 * 28 * 8, [2, 2, 1])])
def test_batches_stay_under_the_byte_limit(batch_sizes, max_bytes, sizes):
    zq, layers = torch.randn(1, 5, 4, 7, dtype=torch.float64), norms(16, 16, 16, 16, 8)
    modulations = Modulations(zq, layers, max_bytes)
    assert batch_sizes == []
    for layer in layers:
        y, b = modulations[layer]
        assert_close(y, layer.conv_y(zq))
        assert_close(b, layer.conv_b(zq))
    assert batch_sizes == sizes
    assert_close(modulations[layers[0]][0], layers[0].conv_y(zq))
    assert batch_sizes == [*sizes, sizes[0]]  # the first batch was freed, and is computed again


def test_norms_outside_the_batches_are_computed_alone(batch_sizes):
    zq, (listed, unlisted, without_bias) = torch.randn(1, 5, 4, 7, dtype=torch.float64), norms(16, 16, 16)
    without_bias.conv_y = torch.nn.Conv2d(5, 16, 1, bias=False).double()
    modulations = Modulations(zq, [listed, without_bias])
    for layer in (listed, unlisted, without_bias):
        y, b = modulations[layer]
        assert_close(y, layer.conv_y(zq))
        assert_close(b, layer.conv_b(zq))
    assert batch_sizes == [1, 1]  # of the listed norm, and of the unlisted one


def test_a_decode_computes_one_product_per_width(batch_sizes):
    """On devices other than the CPU. Here under autocast, which takes the same path."""
    decoder, (z, zq) = make_decoder(ch_mult=(1, 2, 2)), latents()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder(z, zq)
    assert batch_sizes == [16, 4]  # of 64 and of 32 channels


def test_a_hooked_decoder_calls_its_layers():
    decoder, (z, zq) = make_decoder(), latents()
    with torch.no_grad():
        wanted, seen = decoder(z, zq), []
        decoder.norm_out.conv_y.register_forward_hook(lambda layer, inputs, out: seen.append(out))
        assert_close(decoder(z, zq), wanted.double(), slack=5)
        assert len(seen) == 1


def test_norms_that_are_no_product_are_called(batch_sizes):
    decoder, (z, zq) = make_decoder(), latents()
    torch.manual_seed(1)
    decoder.norm_out.conv_y = torch.nn.Conv2d(5, 32, 1, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = decoder(z, zq)
        batch_sizes.clear()
        with torch.no_grad():
            assert relative_error(decoder(z, zq), wanted) < 2e-2
    assert batch_sizes == [12, 3]  # of 64 and of 32 channels, without norm_out


@pytest.mark.parametrize("cell", [(4, 4), (8, 4), (4, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_convolve_cells_gives_the_first_inner_and_last_values_of_each_cell(cell, bias):
    conv, zq = torch.nn.Conv2d(5, 5, 3, padding=1, bias=bias).double(), draw(2, 5, 3, 4)
    size = [cells * pixels for cells, pixels in zip(zq.shape[2:], cell, strict=True)]
    assert can_convolve_cells(zq, size)
    resized = conv(F.interpolate(zq, size=size, mode="nearest"))
    rows, columns = (
        [first + offset for first in range(0, pixels, step) for offset in (0, 1, step - 1)]
        for pixels, step in zip(size, cell, strict=True)
    )
    assert_close(convolve_cells(conv, zq), resized[:, :, rows][:, :, :, columns])


@pytest.mark.parametrize("size", [(6, 16), (12, 8), (9, 12), (12, 15)], ids=["2x", "narrow", "3x", "not whole"])
def test_small_and_uneven_cells_are_not_convolved(size):
    assert not can_convolve_cells(draw(1, 5, 3, 4), size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [4, 7, 16])
def test_the_bias_is_part_of_the_product_in_16_bits(batch_sizes, monkeypatch, dtype, channels):
    """On a GPU. The bias is added in float32, before the result is rounded once."""
    monkeypatch.setattr(modulation, "runs_kernels", lambda x: True)
    layers = [layer.to(dtype) for layer in norms(16, 16, zq=channels)]
    zq = torch.randn(2, channels, 4, 7).to(dtype)
    weight, bias = modulation._concatenate(layers, zq)
    assert bias is None and weight.shape == (64, 8 * -(-(channels + 1) // 8))
    for layer, modulated in zip(layers, modulate(layers, zq), strict=True):
        for map_, conv in zip(modulated, (layer.conv_y, layer.conv_b), strict=True):
            exact = F.conv2d(zq.double(), conv.weight.double(), conv.bias.double())
            assert map_.is_contiguous(memory_format=torch.channels_last)
            assert ((map_ - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6).all()


def test_other_dtypes_keep_the_bias_apart(monkeypatch):
    """In float32 TF32 would round it, and with weights in another dtype autocast converts each of the three."""
    monkeypatch.setattr(modulation, "runs_kernels", lambda x: True)
    (layer,) = norms(16)
    for dtype, weight_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        assert modulation._concatenate([layer.to(weight_dtype)], torch.zeros(1, 5, 2, 2, dtype=dtype))[1] is not None
