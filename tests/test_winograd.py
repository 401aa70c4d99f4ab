"""Winograd convolutions of strips: values, their error, shapes that no filter divides, and when they are used."""

import copy
import functools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from models import KANDINSKY, PeakBytes, latents, make_decoder
from spies import record_calls
from tolerances import assert_close, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from movq_ext.model import strip_rows
from movq_ext.ops import winograd
from movq_ext.ops.onednn import Convolution
from movq_ext.ops.winograd import WinogradConvolution, winograd_is_faster
from movq_ext.ops.winograd_filters import MIN_CHANNELS, TILE, ColumnTransforms, MinimalFilter, Tile

without_onednn = not torch.backends.mkldnn.is_available()  # then the direct convolution has another error


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
@pytest.mark.parametrize("block_bytes", [1, 6000, 1 << 20], ids=["smallest blocks", "some blocks", "one block"])
@pytest.mark.parametrize("height, width", [(4, 2), (8, 40), (9, 7), (3, 5), (14, 33), (4, 1), (1, 1)])
def test_the_convolution_is_added_to_the_output_or_written(height, width, block_bytes, dtype):
    weight, bias, x, out = arguments(3, 5, height, width, dtype)
    expected, strides = expected_sum(weight, bias, x, out), out.stride()
    convolution = WinogradConvolution(weight, bias, 2 * 36 * 3 * 5 * dtype.itemsize + block_bytes)
    convolution.add_to(out, x)
    assert_close(out, expected)
    out.fill_(float("nan"))
    convolution.write_to(out, x)
    assert_close(out, expected_sum(weight, bias, x, torch.zeros_like(out)))
    assert out.dtype == dtype and out.stride() == strides


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("columns, threads", [(1, 1), (10, 2), (1 << 14, 2)], ids=["one channel", "two", "all"])
def test_factors(monkeypatch, columns, threads, layout):
    """Of weights in every layout, computed in parts."""
    monkeypatch.setattr(winograd, "PART_COLUMNS", columns)
    weight = draw(5, 3, 3, 3).contiguous(memory_format=layout)
    factors = WinogradConvolution(weight, None, 1 << 20, threads).factors  # (rows.products, columns.products, taps, out, in)
    expected = TILE.rows.from_taps @ weight.double() @ TILE.columns.from_taps.T
    assert_close(factors, expected.permute(2, 3, 0, 1)[:, :, None])


class CopySources(TorchDispatchMode):
    """Records the sources of copies."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.sources.append(args[int(function is torch.ops.aten.copy_.default)])
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("taps", [1, 3])
def test_weights_are_copied_in_whole_pixels_or_not_at_all(taps):
    """A copy of single values takes longer than the factors: 10% of a decode, with weights in channels_last."""
    shape = (8, 6, 3, 3) if taps == 1 else (8, 6, taps, 3, 3)
    layout = torch.channels_last if taps == 1 else torch.channels_last_3d
    with CopySources() as copies:
        WinogradConvolution(draw(*shape), None, 1 << 20)
    assert not copies.sources
    weight = draw(*shape).contiguous(memory_format=layout)
    with CopySources() as copies:
        WinogradConvolution(weight, None, 1 << 20)
    assert len(copies.sources) == taps
    assert all(source.shape == (9, 8, 6) and source.stride(-1) == 1 for source in copies.sources)


@pytest.mark.parametrize("channels, threads", [(6, 1), (6, 2), (7, 3), (2, 4)])
def test_each_thread_computes_factors(monkeypatch, channels, threads):
    parts = []
    monkeypatch.setattr(winograd, "run_in_threads", lambda function, items, workers: parts.extend(items))
    WinogradConvolution(draw(channels, 5, 3, 3), None, 1 << 20, threads)
    assert len(parts) == min(channels, threads)


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


def test_threads_share_a_convolution():
    weight, bias, x, out = arguments(16, 16, 64, 32)
    convolution = WinogradConvolution(weight, bias, 1 << 18)

    @torch.no_grad()
    def convolve(number):
        result = torch.empty_like(out)
        convolution.write_to(result, number * x)
        return result

    with ThreadPoolExecutor(4) as threads:
        for number, result in enumerate(threads.map(convolve, range(16))):
            assert_close(result, expected_sum(weight, bias, number * x, torch.zeros_like(out)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_not_finite_spreads_to_the_tiles_that_read_it(value):
    weight, bias, x, out = arguments(4, 4, 16, 16)
    x[0, 1, 6, 8] = value  # rows 4 to 6 of the output read it: x has one row more above
    WinogradConvolution(weight, bias, 1 << 20).write_to(out, x)
    rows, columns = slice(4, 8), slice(7, 10)  # of all columns, those that read it
    assert out[..., rows, columns].isnan().all()
    assert int(out.isfinite().sum()) == out.numel() - out[..., rows, columns].numel()


def test_values_up_to_3e37_do_not_overflow():
    weight, bias, x, out = arguments(16, 16, 8, 8)
    x = (3e37 * x).clamp(-3e37, 3e37)
    WinogradConvolution(weight, bias, 1 << 20).write_to(out, x)
    assert_close(out, expected_sum(weight, bias, x, torch.zeros_like(out)))


@pytest.mark.parametrize("filter, points", [(TILE.rows, (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)), (TILE.columns, (0, 1, -1))])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (1, 2, 3, 5)])
def test_columns_are_transformed_by_sums(shape, dtype):
    """The sums equal the products with the matrices of TILE.columns."""
    values, products = draw(3, 4, *shape, dtype=dtype), draw(*shape, 4, dtype=dtype).movedim(-1, 0)
    factors, sums = torch.empty(4, *shape, dtype=dtype), torch.empty(3, *shape, 2, dtype=dtype).movedim(-1, 1)
    transforms = ColumnTransforms(values, factors, products, sums)
    for row in range(3):
        transforms.write_factors(row)
        assert_close(factors, torch.tensordot(TILE.columns.from_values, values[row].double(), 1))
        transforms.write_sums(row)
        assert_close(sums[row], torch.tensordot(TILE.columns.to_outputs, products.double(), 1))


class ColumnProducts:
    """`ColumnTransforms` for any filter: products with its matrices."""

    def __init__(self, columns, values, factors, products, sums):
        self.columns, self.values, self.factors, self.products, self.sums = columns, values, factors, products, sums

    def write_factors(self, row):
        multiply_matrix(self.columns.from_values, self.values[row], self.factors)

    def write_sums(self, row):
        multiply_matrix(self.columns.to_outputs, self.products, self.sums[row])


def multiply_matrix(matrix, values, out):
    out.copy_(torch.tensordot(matrix.to(values.dtype), values, 1))


def relative_errors(channels, out_channels, seed):
    """Return the errors of a Winograd and of a direct convolution. With SiLU's positive mean, as in a decoder."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    bias = torch.randn(out_channels, generator=generator)
    x = F.silu(torch.randn(1, channels, 18, 16, generator=generator)).contiguous(memory_format=torch.channels_last)
    errors = []
    for convolution in (WinogradConvolution(weight, bias, 1 << 26), Convolution(weight, bias, (0, 1), x.shape)):
        out = torch.zeros(1, out_channels, 16, 16).contiguous(memory_format=torch.channels_last)
        expected = expected_sum(weight, bias, x, out)
        convolution.add_to(out, x)
        errors.append(relative_error(out, expected))
    return errors


def mean_ratio(errors):
    """Return the mean ratio of Winograd's error to the direct convolution's. Fails if any ratio exceeds 1.02."""
    ratios = [winograd / direct for winograd, direct in errors]
    assert max(ratios) <= 1.02
    return sum(ratios) / len(ratios)


@pytest.mark.skipif(without_onednn, reason="compares with oneDNN")
@pytest.mark.parametrize(
    "channels, out_channels, largest",
    [(96, 96, 5.5e-7), (128, 128, 6.2e-7), (192, 96, 7.5e-7), (256, 128, 6.2e-7), (256, 256, 6.2e-7), (512, 512, 7.2e-7)],
)
def test_the_error_is_at_most_the_direct_convolutions(channels, out_channels, largest):
    errors = [relative_errors(channels, out_channels, seed) for seed in range(3)]
    assert channels >= MIN_CHANNELS and mean_ratio(errors) <= 1
    assert max(winograd for winograd, _ in errors) < largest


@pytest.mark.skipif(without_onednn, reason="compares with oneDNN")
@pytest.mark.parametrize("outputs", [3, 4])
@pytest.mark.parametrize("channels", [128, 256])
def test_larger_tiles_are_less_exact(monkeypatch, channels, outputs):
    """F(3, 3) or F(4, 3) on columns is faster than F(2, 3), but its error exceeds the direct convolution's."""
    columns = TILE.rows if outputs == 4 else MinimalFilter(3, (0, 2 / 3, -2 / 3, 3 / 2))
    monkeypatch.setattr(winograd, "TILE", Tile(TILE.rows, columns))
    monkeypatch.setattr(winograd, "ColumnTransforms", functools.partial(ColumnProducts, columns))
    for seed in range(3):
        larger, direct = relative_errors(channels, 64, seed)
        assert 1.02 * direct < larger < 1.1e-6


MODELS = {
    "128 to 512 channels": (KANDINSKY | dict(ch_mult=(1, 2, 4), num_res_blocks=1), (8, 8)),
    "128 and 256 channels": (KANDINSKY | dict(ch_mult=(1, 2), num_res_blocks=1, mid_attn=False), (16, 32)),
}


@pytest.mark.skipif(without_onednn, reason="compares with oneDNN")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("in_strips")
@torch.no_grad()
def test_the_error_of_a_decode_is_at_most_that_of_direct_convolutions(monkeypatch, name):
    blocks = record_calls(monkeypatch, WinogradConvolution, "_write_block", lambda *_: True)
    config, grid = MODELS[name]
    errors = []
    for seed in range(3):
        decoder = make_decoder(seed, **config)
        z, _ = latents(grid, 1)
        expected = copy.deepcopy(decoder).double().requires_grad_()(z.double(), z.double())  # layer by layer
        blocks.clear()
        winograd_error = relative_error(decoder(z, z), expected)
        assert blocks
        with monkeypatch.context() as patch:
            patch.setattr(strip_rows, "winograd_is_faster", lambda *_: False)
            errors.append((winograd_error, relative_error(decoder(z, z), expected)))
    assert mean_ratio(errors) <= 1


def test_operations():
    """Products, a third of the direct convolution's, transforms, and the weight's factors."""
    weight, bias, x, out = arguments(16, 32, 8, 8)
    with FlopCounterMode(display=False) as counted:
        convolution = WinogradConvolution(weight, bias, 1 << 20)
    assert counted.get_total_flops() == 2 * 9 * TILE.products * 16 * 32
    with FlopCounterMode(display=False) as counted:
        convolution.add_to(out, x)
    rows = TILE.rows
    tiles, between = 64 // TILE.outputs, rows.products * 8 * 2  # row factors: of two rows of tiles with 8 columns
    multiplications = tiles * TILE.products * 16 * 32
    transforms = 16 * between * rows.products + 32 * 64 * (rows.products + 1)  # and the bias; columns only take additions
    assert counted.get_total_flops() == 2 * (multiplications + transforms)


@pytest.mark.parametrize("limit, height, width", [(18, 64, 64), (18, 8, 600), (20, 64, 64), (0, 64, 64)])
def test_memory_of_a_block(limit, height, width):
    """The limit holds unless the smallest block exceeds it."""
    weight, bias, x, out = arguments(16, 16, height, width)
    convolution = WinogradConvolution(weight, bias, 1 << limit)
    with PeakBytes() as memory:
        convolution.add_to(out, x)
    smallest = convolution.factors.nbytes + (100 << 10)
    assert memory.peak - x.nbytes - out.nbytes <= max(1 << limit, smallest)


def test_blocks_of_a_strip_are_equally_large(monkeypatch):
    """Half of a block would take almost as long as a whole one where the weight's factors exceed the cache."""
    blocks = record_calls(monkeypatch, WinogradConvolution, "_write_block", lambda result, convolution, out, *_: out.shape[1])
    weight, bias, x, out = arguments(4, 4, 32, 16)
    WinogradConvolution(weight, bias, 24 * 16 * 4 + 30000).add_to(out, x)  # six rows of tiles take 27 KB
    assert blocks == [16, 16]


LIMIT = 40 << 20


@pytest.mark.parametrize(
    "channels, out_channels, strips, expected",
    [
        (512, 512, [(32, 32)], True),  # 25 MB of factors
        (512, 512, [(16, 32)] * 2, True),
        (512, 512, [(16, 16)], True),
        (512, 512, [(8, 16)] * 2, False),  # each strip reads all factors
        (512, 512, [(8, 8)], False),  # the weight's factors cost more than they save
        (256, 256, [(8, 32)] * 4, True),
        (256, 256, [(8, 16)] * 2, False),
        (256, 256, [(32, 128)] * 4, True),
        (128, 128, [(32, 32)], True),
        (128, 128, [(16, 32)] * 2, False),  # the operators take longer to start than they save
        (128, 128, [(32, 256)] * 8, True),
        (128, 128, [(3, 4096)] * 99, True),
        (128, 128, [(1, 4096)] * 99, False),  # a row of tiles computes four rows
        (32, 32, [(256, 256)], False),  # the transforms cost more
        (128, 3, [(256, 256)], False),
        (4, 512, [(64, 64)], False),
        (95, 512, [(256, 256)], False),  # not as exact
        (96, 512, [(256, 256)], True),
        (1024, 1024, [(64, 64)], False),  # 100 MB of factors
    ],
)
def test_large_layers_are_faster(channels, out_channels, strips, expected):
    assert winograd_is_faster(torch.empty(out_channels, channels, 3, 3), strips, LIMIT) == expected


def test_only_float32_and_float64_outside_autocast():
    def chosen(dtype=torch.float32, device="cpu", kernel=3):
        weight = torch.empty(256, 256, kernel, kernel, dtype=dtype, device=device)
        return winograd_is_faster(weight, [(256, 256)], LIMIT)

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
            assert winograd_is_faster(weight, [(256, 256)], LIMIT) == expected
            assert winograd_is_faster(weight.double(), [(256, 256)], LIMIT)
    finally:
        products.fp32_precision = before
