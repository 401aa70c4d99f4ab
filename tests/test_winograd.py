"""Winograd convolutions of strips: values, their error, shapes that no filter divides, and when they are used."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch.utils.flop_counter import FlopCounterMode

from movq_ext.ops.onednn import Convolution
from movq_ext.ops.winograd import COLUMNS, PRODUCTS, ROWS, WinogradConvolution, is_faster


def draw(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def arguments(channels, out_channels, height, width, dtype=torch.float32, bias=True):
    """Weight, bias, input and accumulator of a convolution of rows and their neighbours."""
    weight = draw(out_channels, channels, 3, 3, dtype=dtype) / (9 * channels) ** 0.5
    x, out = draw(1, channels, height + 2, width, dtype=dtype), draw(1, out_channels, height, width, dtype=dtype)
    x, out = (t.contiguous(memory_format=torch.channels_last) for t in (x, out))
    return weight, draw(out_channels, dtype=dtype) if bias else None, x, out


def expected_sum(weight, bias, x, out):
    return out.double() + F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_bytes", [1, 3000, 1 << 20], ids=["smallest blocks", "some blocks", "one block"])
@pytest.mark.parametrize("height, width", [(4, 2), (8, 40), (9, 7), (3, 5), (14, 33), (4, 1), (1, 1)])
def test_the_convolution_is_added_to_the_output(height, width, block_bytes, dtype):
    weight, bias, x, out = arguments(3, 5, height, width, dtype)
    expected, strides = expected_sum(weight, bias, x, out), out.stride()
    WinogradConvolution(weight, bias, block_bytes).add_to(out, x)
    assert_close(out, expected)
    assert out.dtype == dtype and out.stride() == strides


def test_without_a_bias():
    weight, bias, x, out = arguments(8, 4, 8, 8, bias=False)
    expected = expected_sum(weight, bias, x, out)
    WinogradConvolution(weight, bias, 1 << 20).add_to(out, x)
    assert_close(out, expected)


def test_one_convolution_serves_strips_of_several_heights():
    weight, bias, x, _ = arguments(4, 4, 12, 6)
    convolution = WinogradConvolution(weight, bias, 1 << 20)
    for rows in (12, 4, 8, 12):
        out = torch.zeros(1, 4, rows, 6).contiguous(memory_format=torch.channels_last)
        convolution.add_to(out, x[:, :, : rows + 2])
        assert_close(out, expected_sum(weight, bias, x[:, :, : rows + 2], torch.zeros_like(out)))


@pytest.mark.parametrize("filter", [ROWS, COLUMNS])
def test_taps_are_those_of_the_points(filter):
    """A product's factor is the taps' polynomial at a point, over the differences between that point and the others."""
    points = {4: (0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5)), 2: (0, 1, -1)}[filter.OUTPUTS]
    for taps, point in zip(filter.TAPS, points, strict=False):
        scale = torch.tensor([abs(point - other) for other in points if other != point], dtype=torch.float64).prod()
        assert [abs(tap) for tap in taps] == pytest.approx([float(abs(point) ** power / scale) for power in range(3)], abs=1e-15)
    assert filter.TAPS[-1] == (0, 0, 1) and len(filter.TAPS) == filter.FACTORS == len(points) + 1 == filter.OUTPUTS + 2


@pytest.mark.parametrize("channels, largest, ratio", [(128, 2.8e-7, 1.15), (256, 3.3e-7, 0.85)])
def test_the_error_is_at_most_the_direct_convolutions(channels, largest, ratio):
    """With SiLU's positive mean, as in a decoder. With the usual points, 0, ±1, ±2 and infinity, it is 1.5 times as large."""
    weight, bias, x, _ = arguments(channels, 64, 16, 16)
    x = F.silu(x)
    errors = []
    for convolution in (WinogradConvolution(weight, bias, 1 << 24), Convolution(weight, bias, (0, 1), x.shape)):
        out = torch.zeros(1, 64, 16, 16).contiguous(memory_format=torch.channels_last)
        expected = expected_sum(weight, bias, x, out)
        convolution.add_to(out, x)
        errors.append(float((out - expected).norm() / expected.norm()))
    assert errors[0] < largest
    assert errors[0] < ratio * errors[1] or not torch.backends.mkldnn.is_available()


def test_operations():
    """A third of the direct convolution's, and its weight's factors."""
    weight, bias, x, out = arguments(16, 32, 8, 8)
    with FlopCounterMode(display=False) as counted:
        convolution = WinogradConvolution(weight, bias, 1 << 20)
    assert counted.get_total_flops() == 2 * 9 * PRODUCTS * weight[0, :, 0, 0].numel() * 32
    with FlopCounterMode(display=False) as counted:
        convolution.add_to(out, x)
    assert counted.get_total_flops() == 2 * 9 * 16 * 32 * 8 * 8 // 3


def test_memory_of_a_block():
    weight, bias, x, out = arguments(16, 16, 64, 64)
    convolution = WinogradConvolution(weight, bias, 1 << 18)
    convolution.add_to(out, x)
    assert convolution.factors.nbytes + convolution.block_memory.nbytes <= 1 << 18


LIMIT = 40 << 20


@pytest.mark.parametrize(
    "channels, out_channels, strips, expected",
    [
        (512, 512, [(32, 32)], True),
        (512, 512, [(8, 8)], False),  # the weight's factors cost more than they save
        (128, 128, [(32, 256)] * 8, True),
        (128, 128, [(3, 4096)] * 99, False),  # strips of fewer than four rows are convolved directly
        (64, 64, [(256, 256)], False),  # the passes cost more
        (128, 3, [(256, 256)], False),
        (4, 512, [(64, 64)], False),
        (1024, 1024, [(64, 64)], False),  # 100 MB of factors
    ],
)
def test_large_layers_are_faster(channels, out_channels, strips, expected):
    assert is_faster(torch.empty(out_channels, channels, 3, 3), strips, LIMIT) == expected


def test_only_float32_and_float64_outside_autocast():
    def chosen(dtype=torch.float32, device="cpu", kernel=3):
        return is_faster(torch.empty(256, 256, kernel, kernel, dtype=dtype, device=device), [(256, 256)], LIMIT)

    assert chosen() and chosen(torch.float64)
    assert not chosen(torch.bfloat16) and not chosen(torch.float16) and not chosen(kernel=1) and not chosen(device="meta")
    with torch.autocast("cpu"):
        assert not chosen()


def test_only_where_products_are_not_rounded():
    """Direct convolutions do not follow the setting for matrix products."""
    weight, products = torch.empty(256, 256, 3, 3), torch.backends.mkldnn.matmul
    before = products.fp32_precision
    try:
        for precision, expected in (("ieee", True), ("tf32", False), ("bf16", False), ("none", True)):
            products.fp32_precision = precision
            assert is_faster(weight, [(256, 256)], LIMIT) == expected
            assert is_faster(weight.double(), [(256, 256)], LIMIT)
    finally:
        products.fp32_precision = before
