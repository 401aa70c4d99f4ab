"""Upsampling by nine products for four pixels, against the convolution of the doubled map."""

import pytest
import torch
import torch.nn.functional as F
from models import draw
from tolerances import assert_close, relative_error
from torch.utils.flop_counter import FlopCounterMode

from movq_ext.ops.upsampling import fold_upsampling
from movq_ext.ops.winograd_upsampling import MIN_CHANNELS, MIN_PIXELS, WinogradUpsampling, winograd_upsampling_is_faster

PLENTY = 1 << 26
HALOS = [(above, below) for above in (0, 1) for below in (0, 1)]


def arguments(channels, out_channels, height, width, dtype=torch.float32):
    """The weight, the bias, rows with a row above and below them, and memory for the result, full of NaN."""
    weight, bias = draw(out_channels, channels, 3, 3).to(dtype), draw(out_channels).to(dtype)
    x = draw(1, channels, height + 2, width).to(dtype).contiguous(memory_format=torch.channels_last)
    out = torch.full((1, 2 * height, 2 * width, out_channels), torch.nan, dtype=dtype).permute(0, 3, 1, 2)
    return weight, bias, x, out


def doubled_convolution(weight, bias, x, dtype=torch.float64):
    """The pixels of all but the first and the last row of x."""
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(F.interpolate(x.to(dtype), scale_factor=2.0), weight.to(dtype), bias, padding=1)[:, :, 2:-2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("height, width", [(1, 1), (5, 3), (8, 6), (3, 50)])
def test_the_pixels_of_a_doubled_map(height, width, has_bias, dtype):
    """In one block or several, the last with fewer rows and columns; at borders of the map, and between other rows."""
    weight, bias, x, out = arguments(3, 4, height, width, dtype)
    bias = bias if has_bias else None
    for above, below in HALOS:
        rows = x.clone()
        rows[:, :, :1] *= above
        rows[:, :, height + 1 :] *= below
        for values in (300, 1000, 1 << 20):
            convolution = WinogradUpsampling(weight, bias, (9 * 3 * 4 + values) * dtype.itemsize)
            convolution.write_to(out.fill_(torch.nan), rows[:, :, 1 - above : height + 1 + below], (above, below))
            assert_close(out, doubled_convolution(weight, bias, rows))


def test_weights_in_every_layout_and_threads():
    weight, bias, x, out = arguments(8, 6, 4, 4)
    expected = doubled_convolution(weight, bias, x)
    for threads in (1, 2, 5):
        for layout in (torch.contiguous_format, torch.channels_last):
            WinogradUpsampling(weight.contiguous(memory_format=layout), bias, PLENTY, threads).write_to(out, x, (1, 1))
            assert_close(out, expected)


@pytest.mark.parametrize("channels", [MIN_CHANNELS, 256, 512])
def test_errors(channels):
    """At most 0.8 times the error of convolving the doubled map in channels_last, and 1.3 times the error with folded weights."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight, bias, x, out = arguments(channels, 32, 12, 16)
        weight.copy_(torch.randn(weight.shape, generator=generator)).div_((9 * channels) ** 0.5)
        x.copy_(torch.randn(x.shape, generator=generator))
        WinogradUpsampling(weight, bias, PLENTY).write_to(out, x, (1, 1))
        expected = doubled_convolution(weight, bias, x)
        doubled = doubled_convolution(weight, bias, x, torch.float32)
        folded = F.conv_transpose2d(x, fold_upsampling(weight), bias, stride=2, padding=1)[:, :, 2:-2]
        error = relative_error(out, expected)
        assert error < 0.8 * relative_error(doubled, expected)
        assert error < 1.3 * relative_error(folded, expected)


def test_operations():
    """Nine products for four pixels and for a column of zeros. Each factor of a weight is a sum of up to nine taps."""
    weight, bias, x, out = arguments(16, 32, 8, 8)
    with FlopCounterMode(display=False) as counted:
        convolution = WinogradUpsampling(weight, bias, PLENTY)
    assert counted.get_total_flops() == 2 * 9 * 9 * 16 * 32
    with FlopCounterMode(display=False) as counted:
        convolution.write_to(out, x, (1, 1))
    assert counted.get_total_flops() == 2 * 9 * 8 * (8 + 1) * 16 * 32


def test_blocks_fit_in_memory(monkeypatch):
    sizes, write_block = [], WinogradUpsampling._write_block

    def record(self, out, values, sums, pitch):
        sizes.append((out.shape[0], out.shape[2], (values.numel() + sums.numel()) * values.itemsize))
        write_block(self, out, values, sums, pitch)

    monkeypatch.setattr(WinogradUpsampling, "_write_block", record)
    weight, bias, x, out = arguments(8, 8, 20, 64)
    factors = 9 * 8 * 8 * 4
    for limit, rows, columns in ((1 << 20, 20, 64), (110 << 10, 2, 64), (73 << 10, 1, 64), (50 << 10, 1, 32), (30 << 10, 1, 16)):
        sizes.clear()
        WinogradUpsampling(weight, bias, limit, 2).write_to(out, x, (1, 1))
        assert {size[:2] for size in sizes} == {(rows, columns)}
        assert 2 * max(size[2] for size in sizes) + factors <= limit
    sizes.clear()
    WinogradUpsampling(weight, bias, 0).write_to(out, x, (1, 1))
    assert {size[:2] for size in sizes} == {(1, 16)}  # the smallest


@pytest.mark.usefixtures("few_channels")
def test_factors_fit_in_memory():
    weight = draw(8, 8, 3, 3).float()
    limit = 9 * 8 * 8 * 4 * 3 // 2
    assert winograd_upsampling_is_faster(weight, 16, limit) and not winograd_upsampling_is_faster(weight, 16, limit - 1)
    assert winograd_upsampling_is_faster(weight.double(), 16, 2 * limit)


def test_few_channels_or_pixels_take_folded_weights():
    assert winograd_upsampling_is_faster(draw(16, MIN_CHANNELS, 3, 3), MIN_PIXELS, PLENTY)
    assert not winograd_upsampling_is_faster(draw(16, MIN_CHANNELS - 1, 3, 3), MIN_PIXELS, PLENTY)
    assert not winograd_upsampling_is_faster(draw(16, MIN_CHANNELS, 3, 3), MIN_PIXELS - 1, PLENTY)


@pytest.mark.usefixtures("few_channels")
def test_only_exact_products_on_a_cpu():
    weight = draw(8, 8, 3, 3).float()
    assert winograd_upsampling_is_faster(weight, 16, PLENTY)
    assert not winograd_upsampling_is_faster(weight.bfloat16(), 16, PLENTY)
    assert not winograd_upsampling_is_faster(weight.half(), 16, PLENTY)
    assert not winograd_upsampling_is_faster(weight.to("meta"), 16, PLENTY)
    with torch.autocast("cpu", torch.bfloat16):
        assert not winograd_upsampling_is_faster(weight, 16, PLENTY)
