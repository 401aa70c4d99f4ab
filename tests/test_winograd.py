"""Winograd convolutions of strips: values, their error, shapes that no filter divides, and when they are used."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from models import KANDINSKY, PeakBytes, latents, make_decoder
from spies import record_calls
from tolerances import assert_close, relative_error
from torch.utils.flop_counter import FlopCounterMode

from movq_ext.model import strip_rows
from movq_ext.ops.onednn import Convolution
from movq_ext.ops.winograd import WinogradConvolution, fastest_tile
from movq_ext.ops.winograd_filters import FOUR_OUTPUTS, TILES, TWO_OUTPUTS, MinimalFilter

SQUARE, FLAT = TILES  # 4x4 and 4x2 pixels
each_tile = pytest.mark.parametrize("tile", TILES, ids=["4x4", "4x2"])


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


@each_tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_bytes", [1, 6000, 1 << 20], ids=["smallest blocks", "some blocks", "one block"])
@pytest.mark.parametrize("height, width", [(4, 2), (8, 40), (9, 7), (3, 5), (14, 33), (4, 1), (1, 1)])
def test_the_convolution_is_added_to_the_output_or_written(height, width, block_bytes, dtype, tile):
    weight, bias, x, out = arguments(3, 5, height, width, dtype)
    expected, strides = expected_sum(weight, bias, x, out), out.stride()
    convolution = WinogradConvolution(weight, bias, tile, 2 * 36 * 3 * 5 * dtype.itemsize + block_bytes)
    convolution.add_to(out, x)
    assert_close(out, expected)
    out.fill_(float("nan"))
    convolution.write_to(out, x)
    assert_close(out, expected_sum(weight, bias, x, torch.zeros_like(out)))
    assert out.dtype == dtype and out.stride() == strides


@each_tile
def test_without_a_bias(tile):
    weight, bias, x, out = arguments(8, 4, 8, 8, bias=False)
    expected = expected_sum(weight, bias, x, out)
    WinogradConvolution(weight, bias, tile, 1 << 20).add_to(out, x)
    assert_close(out, expected)


@each_tile
def test_one_convolution_serves_strips_of_several_heights(tile):
    weight, bias, x, _ = arguments(4, 4, 12, 6)
    convolution = WinogradConvolution(weight, bias, tile, 1 << 20)
    for rows in (12, 4, 8, 12):
        out = torch.zeros(1, 4, rows, 6).contiguous(memory_format=torch.channels_last)
        convolution.add_to(out, x[:, :, : rows + 2])
        assert_close(out, expected_sum(weight, bias, x[:, :, : rows + 2], torch.zeros_like(out)))


@each_tile
def test_threads_share_a_convolution(tile):
    weight, bias, x, out = arguments(16, 16, 64, 32)
    convolution = WinogradConvolution(weight, bias, tile, 1 << 18)

    @torch.no_grad()
    def convolve(number):
        result = torch.empty_like(out)
        convolution.write_to(result, number * x)
        return result

    with ThreadPoolExecutor(4) as threads:
        for number, result in enumerate(threads.map(convolve, range(16))):
            assert_close(result, expected_sum(weight, bias, number * x, torch.zeros_like(out)))


@each_tile
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_not_finite_spreads_to_the_tiles_that_read_it(tile, value):
    weight, bias, x, out = arguments(4, 4, 16, 16)
    x[0, 1, 6, 8] = value  # rows 4 to 6 of the output read it: x has one row more above
    WinogradConvolution(weight, bias, tile, 1 << 20).write_to(out, x)
    rows, columns = slice(4, 8), slice(4, 12) if tile is SQUARE else slice(6, 10)
    assert out[..., rows, columns].isnan().all()
    assert int(out.isfinite().sum()) == out.numel() - out[..., rows, columns].numel()


@pytest.mark.parametrize("filter, points", [(FOUR_OUTPUTS, (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)), (TWO_OUTPUTS, (0, 1, -1))])
def test_taps_are_those_of_the_points(filter, points):
    """A product's factor is the taps' polynomial at a point, over the differences between that point and the others."""
    for taps, point in zip(filter.from_taps.tolist(), points, strict=False):
        scale = math.prod(abs(point - other) for other in points if other != point)
        assert [abs(tap) for tap in taps] == pytest.approx([abs(point) ** power / scale for power in range(3)], abs=1e-15)
    assert filter.from_taps[-1].tolist() == [0, 0, 1]
    assert filter.products == len(points) + 1 == filter.outputs + 2


@pytest.mark.parametrize(
    "points, taps", [((0,), 2), ((0, 1, -1), 2), ((0, 1, -1), 3), ((0, 1, -1, 2, -2), 3), ((0.5, -0.5, 3), 4)]
)
def test_a_filter_equals_the_direct_sum(taps, points):
    filter = MinimalFilter(taps, points)
    values, weights = draw(filter.products, dtype=torch.float64), draw(taps, dtype=torch.float64)
    outputs = filter.to_outputs @ ((filter.from_taps @ weights) * (filter.from_values @ values))
    assert_close(outputs, F.conv1d(values[None, None], weights[None, None])[0, 0])


def relative_errors(tile, channels):
    """Return the errors of a Winograd and of a direct convolution. With SiLU's positive mean, as in a decoder."""
    weight, bias, x, _ = arguments(channels, 64, 16, 16)
    x = F.silu(x)
    errors = []
    for convolution in (WinogradConvolution(weight, bias, tile, 1 << 24), Convolution(weight, bias, (0, 1), x.shape)):
        out = torch.zeros(1, 64, 16, 16).contiguous(memory_format=torch.channels_last)
        expected = expected_sum(weight, bias, x, out)
        convolution.add_to(out, x)
        errors.append(float((out - expected).norm() / expected.norm()))
    return errors


@pytest.mark.parametrize("channels, largest, ratio", [(128, 2.8e-7, 1.15), (256, 3.3e-7, 0.85)])
def test_the_error_is_at_most_the_direct_convolutions(channels, largest, ratio):
    """With the usual points, 0, ±1, ±2 and infinity, it is 1.5 times as large."""
    winograd, direct = relative_errors(FLAT, channels)
    assert winograd < largest
    assert winograd < ratio * direct or not torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("channels, largest", [(128, 4.8e-7), (256, 5.1e-7)])
def test_the_error_of_square_tiles(channels, largest):
    """It may exceed the direct convolution's, but grows less with the channels."""
    assert relative_errors(SQUARE, channels)[0] < largest


@torch.no_grad()
def test_the_error_of_a_decode_is_at_most_that_of_direct_convolutions(monkeypatch):
    blocks = record_calls(monkeypatch, WinogradConvolution, "_write_block", lambda result, convolution, *_: convolution.tile)
    decoder = make_decoder(**KANDINSKY | dict(num_res_blocks=1))
    z, _ = latents((8, 8), 1)
    expected = copy.deepcopy(decoder).double().requires_grad_()(z.double(), z.double())  # layer by layer
    winograd = relative_error(decoder(z, z), expected)
    assert set(blocks) == set(TILES)
    monkeypatch.setattr(strip_rows, "fastest_tile", lambda *_: None)
    assert winograd <= relative_error(decoder(z, z), expected) or not torch.backends.mkldnn.is_available()


@each_tile
def test_operations(tile):
    """Products, a quarter or a third of the direct convolution's, transforms, and the weight's factors."""
    weight, bias, x, out = arguments(16, 32, 8, 8)
    with FlopCounterMode(display=False) as counted:
        convolution = WinogradConvolution(weight, bias, tile, 1 << 20)
    assert counted.get_total_flops() == 2 * 9 * tile.products * 16 * 32
    with FlopCounterMode(display=False) as counted:
        convolution.add_to(out, x)
    rows, columns = tile
    tiles, between = 64 // tile.outputs, rows.products * 8 * 2  # row factors: of two rows of tiles with 8 columns
    multiplications = tiles * tile.products * 16 * 32
    transforms = 16 * between * rows.products + 16 * tiles * tile.products * columns.products
    transforms += 32 * between * columns.products + 32 * 64 * (rows.products + 1)  # and the bias
    assert counted.get_total_flops() == 2 * (multiplications + transforms)


@each_tile
@pytest.mark.parametrize("limit, height, width", [(18, 64, 64), (18, 8, 600), (20, 64, 64), (0, 64, 64)])
def test_memory_of_a_block(tile, limit, height, width):
    """The limit holds unless the smallest block exceeds it."""
    weight, bias, x, out = arguments(16, 16, height, width)
    convolution = WinogradConvolution(weight, bias, tile, 1 << limit)
    with PeakBytes() as memory:
        convolution.add_to(out, x)
    smallest = convolution.factors.nbytes + (100 << 10)
    assert memory.peak - x.nbytes - out.nbytes <= max(1 << limit, smallest)


def test_blocks_of_a_strip_are_equally_large(monkeypatch):
    """Half of a block would take almost as long as a whole one where the weight's factors exceed the cache."""
    blocks = record_calls(monkeypatch, WinogradConvolution, "_write_block", lambda result, convolution, out, *_: out.shape[0])
    weight, bias, x, out = arguments(4, 4, 32, 16)
    WinogradConvolution(weight, bias, SQUARE, 36 * 16 * 4 + 30000).add_to(out, x)  # six rows of tiles take 28 KB
    assert blocks == [16, 16]


LIMIT = 40 << 20


@pytest.mark.parametrize(
    "channels, out_channels, strips, expected",
    [
        (512, 512, [(32, 32)], FLAT),  # square tiles take 38 MB of factors
        (512, 512, [(8, 8)], None),  # the weight's factors cost more than they save
        (256, 256, [(32, 128)] * 4, SQUARE),
        (128, 128, [(32, 256)] * 8, SQUARE),
        (128, 128, [(3, 4096)] * 99, SQUARE),
        (128, 128, [(1, 4096)] * 99, None),  # a row of tiles computes four rows
        (32, 32, [(256, 256)], None),  # the transforms cost more
        (128, 3, [(256, 256)], None),
        (4, 512, [(64, 64)], None),
        (1024, 1024, [(64, 64)], None),  # 100 MB of factors
    ],
)
def test_large_layers_are_faster(channels, out_channels, strips, expected):
    assert fastest_tile(torch.empty(out_channels, channels, 3, 3), strips, LIMIT) == expected


def test_only_float32_and_float64_outside_autocast():
    def chosen(dtype=torch.float32, device="cpu", kernel=3):
        weight = torch.empty(256, 256, kernel, kernel, dtype=dtype, device=device)
        return fastest_tile(weight, [(256, 256)], LIMIT) is not None

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
            assert (fastest_tile(weight, [(256, 256)], LIMIT) is not None) == expected
            assert fastest_tile(weight.double(), [(256, 256)], LIMIT) is not None
    finally:
        products.fp32_precision = before
