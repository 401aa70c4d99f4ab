"""The native operators against the published formulas in float64, and how they choose a way to compute."""

import published
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PeakBytes
from spies import record_calls
from tolerances import assert_close, relative_error
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from movq_ext.ops import native
from movq_ext.ops.options import NormOptions

LAYOUTS = [torch.contiguous_format, torch.channels_last]
F64 = torch.float64
GRIDS = [((8, 8), (4, 2)), ((8, 8), (1, 1)), ((7, 9), (3, 4)), ((5, 5), (7, 11)), ((41, 49), (1, 1)), ((9, 27), (3, 9))]


def draw(*shape, dtype=F64, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x


# --- Spatial norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("f_grid", "zq_grid"), GRIDS)
def test_spatial_norm_is_the_published_formula(f_grid, zq_grid, layout, activation, affine):
    f, y, b = draw(2, 6, *f_grid, layout=layout), draw(2, 6, *zq_grid), draw(2, 6, *zq_grid) - 1
    weight, bias = (draw(6), draw(6) + 1) if affine else (None, None)
    out = native.spatial_norm(f, y, b, NormOptions(weight, bias, 3, 1e-5, activation))
    assert_close(out, published.spatial_norm(f, y, b, weight, bias, 3, 1e-5, activation))
    out = native.spatial_norm(f, None, None, NormOptions(weight, bias, 3, 1e-5, activation))
    assert_close(out, published.spatial_norm(f, None, None, weight, bias, 3, 1e-5, activation))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spatial_norm_leaves_its_arguments_alone(layout):
    maps = [draw(2, 6, 8, 4, layout=layout), draw(2, 6, 4, 2), draw(2, 6, 4, 2)]
    options = NormOptions(draw(6), draw(6), 3, activation="silu", f_bias=draw(6))
    before = [x.clone() for x in (*maps, options.weight, options.bias, options.f_bias)]
    native.spatial_norm(*maps, options)
    assert all(map(torch.equal, (*maps, options.weight, options.bias, options.f_bias), before))


@pytest.mark.parametrize("zq_grid", [(4, 2), (3, 5)])
def test_spatial_norm_is_the_same_where_gradients_are_recorded(zq_grid):
    """Computing in place and computing a new tensor give the same result up to rounding."""
    f, y, b = draw(2, 6, 8, 8, dtype=torch.float32), draw(2, 6, *zq_grid, dtype=torch.float32), draw(2, 6, *zq_grid).float() + 1
    options = NormOptions(None, None, 3, activation="silu")
    recorded = native.spatial_norm(f.clone().requires_grad_(), y, b, options)
    assert relative_error(native.spatial_norm(f, y, b, options), recorded) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_large_mean_costs_no_more_than_its_rounding(layout, recorded):
    """torch's group_norm computes variances in channels_last as E[x^2] - E[x]^2, which is off by 1e-3 here."""
    f = (draw(2, 6, 16, 24) + 100).float().contiguous(memory_format=layout).requires_grad_(recorded)
    y, b, weight, bias = draw(2, 6, 4, 4), draw(2, 6, 4, 4) + 1, draw(6), draw(6) + 1
    before, dout = f.detach().clone(), draw(2, 6, 16, 24).float()
    out = native.spatial_norm(f, y.float(), b.float(), NormOptions(weight.float(), bias.float(), 3, activation="silu"))
    exact = f.detach().double().requires_grad_()
    expected = published.spatial_norm(exact, y, b, weight, bias, 3, activation="silu")
    assert torch.equal(f, before) and relative_error(out, expected) < 1e-5
    if recorded:
        assert relative_error(*(torch.autograd.grad(x, y, dout)[0] for x, y in ((out, f), (expected, exact)))) < 2e-5


def test_a_large_mean_costs_a_map_of_one_pixel_no_accuracy():
    """It is contiguous in both layouts."""
    f = (draw(2, 64, 1, 1) + 100).float().as_strided((2, 64, 1, 1), (64, 1, 64, 64))
    options = NormOptions(None, None, 4)
    assert relative_error(native.spatial_norm(f, None, None, options), F.group_norm(f.double(), 4, eps=options.eps)) < 2e-5


@pytest.mark.parametrize("zq_grid", [(4, 4), (3, 5), None])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_norm_in_channels_last_is_an_affine_map_in_inference(monkeypatch, zq_grid, recorded):
    """The modulation is combined with the norm on zq's grid: torch's group norm would write one map more."""
    called = record_calls(monkeypatch, torch, "group_norm", lambda *_: None)
    f = draw(2, 6, 16, 24, dtype=torch.float32, layout=torch.channels_last).requires_grad_(recorded)
    y, b = (None, None) if zq_grid is None else (draw(2, 6, *zq_grid).float() + offset for offset in (0, 1))
    weight, bias = draw(6).float(), draw(6).float() + 1
    out = native.spatial_norm(f, y, b, NormOptions(weight, bias, 3, activation="silu"))
    exact = [None if x is None else x.double() for x in (f, y, b, weight, bias)]
    assert relative_error(out, published.spatial_norm(*exact, 3, activation="silu")) < 1e-6
    assert len(called) == int(recorded) and out.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("value", [100.3, 1000.7])
def test_a_constant_map_is_normalised_to_zero(value):
    f = torch.full((2, 6, 16, 24), value).contiguous(memory_format=torch.channels_last)
    assert native.spatial_norm(f, None, None, NormOptions(None, None, 3)).abs().max() < 1e-6


@torch.no_grad()
def test_an_affine_norm_keeps_the_accuracy_of_a_large_mean():
    f = draw(2, 6, 16, 24, dtype=torch.float32, layout=torch.channels_last) + 4096
    out = native.spatial_norm(f, None, None, NormOptions(None, None, 3))
    assert relative_error(out, published.spatial_norm(f.double(), None, None, None, None, 3)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("size, zq_grid, maps", [(24, None, 1), (32, None, 1), (24, (24, 24), 1), (32, (8, 8), 1.2)])
def test_an_affine_norm_allocates_its_result_only(size, zq_grid, maps):
    f = draw(1, 64, size, size, dtype=torch.float32, layout=torch.channels_last)
    y, b = (None, None) if zq_grid is None else (draw(1, 64, *zq_grid, dtype=torch.float32, layout=torch.channels_last),) * 2
    with PeakBytes(None, *(x for x in (f, y) if x is not None)) as memory:
        native.spatial_norm(f, y, b, NormOptions(None, None, 32, activation="silu"))
    assert memory.peak / f.nbytes < maps + 0.3


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)], ids=["weight", "bias", "both"])
@pytest.mark.parametrize("size", [(4, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f_needs_gradients", [False, True])
def test_gradients_of_the_parameters_only(trained, size, dtype, f_needs_gradients):
    """torch's own backward of a group norm in channels_last crashes the process."""
    f = draw(2, 6, *size).to(dtype).as_strided((2, 6, *size), (6 * size[0] * size[1], 1, 6 * size[1], 6))
    parameters = [draw(6).to(dtype).requires_grad_(index in trained) for index in (0, 1)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in parameters]
    options = NormOptions(*parameters, 2)
    expected = F.group_norm(f.double().clone(memory_format=torch.contiguous_format), 2, *exact, options.eps)
    out = native.spatial_norm(f.requires_grad_(f_needs_gradients), None, None, options)
    assert out.is_contiguous(memory_format=torch.channels_last)
    found, right = (torch.autograd.grad(y.sum(), [p[i] for i in trained]) for y, p in ((out, parameters), (expected, exact)))
    for gradient, expected_gradient in zip(found, right, strict=True):
        assert relative_error(gradient, expected_gradient) < (2e-5 if dtype == torch.float32 else 2e-2)


def test_f_bias_is_added_first():
    f, y, b, f_bias = draw(2, 6, 8, 8), draw(2, 6, 2, 4), draw(2, 6, 2, 4) + 1, draw(6)
    out = native.spatial_norm(f, y, b, NormOptions(None, None, 3, f_bias=f_bias))
    assert_close(out, published.spatial_norm(f + f_bias[:, None, None], y, b, None, None, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_mode_derivatives(layout):
    f, y, b = draw(2, 6, 4, 4, layout=layout).requires_grad_(), draw(2, 6, 2, 2), draw(2, 6, 2, 2) + 1
    norm = lambda f: native.spatial_norm(f, y, b, NormOptions(None, None, 3, activation="silu"))
    assert torch.autograd.gradcheck(norm, [f], check_forward_ad=True)


def test_vmap():
    f, y, b = draw(3, 2, 6, 4, 4), draw(2, 6, 2, 2), draw(2, 6, 2, 2) + 1
    norm = lambda f: native.spatial_norm(f, y, b, NormOptions(None, None, 3, activation="silu"))
    assert_close(torch.vmap(norm)(f), torch.stack([norm(x) for x in f]))


# --- The resize of a modulation


def float32_rule(small, large):
    """Return, for every index of the large grid, the index of the small grid that torch's nearest resize reads."""
    return F.interpolate(torch.arange(small, dtype=torch.float32)[None, None], size=large, mode="nearest")[0, 0].long()


def test_torch_repeats_cells_exactly_at_power_of_two_ratios_and_not_at_all_others():
    inexact = set()
    for ratio in range(1, 2049):
        for small in range(1, 2048 // ratio + 1):
            exact = torch.equal(float32_rule(small, small * ratio), torch.arange(small * ratio) // ratio)
            assert exact or not native.is_power_of_two_ratio(small, small * ratio)
            inexact |= set() if exact else {ratio}
    assert sorted(inexact)[:8] == [41, 47, 55, 61, 82, 83, 94, 97]
    assert float32_rule(2, 82)[41] == 0  # the pixel of is_power_of_two_ratio's docstring


def test_power_of_two_ratios():
    powers = {2**exponent for exponent in range(12)}
    for small in range(1, 50):
        for large in range(1, 2000):
            assert native.is_power_of_two_ratio(small, large) == (large % small == 0 and large // small in powers)


@pytest.mark.parametrize("factor", range(1, 70))
def test_integer_ratios_follow_torch_nearest(factor):
    """floor(dst * (1 / factor)) in float32 is not dst // factor for every factor (41 and 47, say)."""
    # float64 would not do: there torch computes the index in float64.
    f = draw(1, 3, 3 * factor, 2 * factor, dtype=torch.float32)
    y, b, options = draw(1, 3, 3, 2, dtype=torch.float32), draw(1, 3, 3, 2).float() - 1, NormOptions(None, None, 1)
    up = [F.interpolate(zq, size=f.shape[2:], mode="nearest") for zq in (y, b)]
    assert torch.equal(native.spatial_norm(f, y, b, options), native.spatial_norm(f, *up, options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", [(1, 1), (2, 4), (3, 1), (5, 7)])
def test_scale_by_cells_is_modulation_after_the_resize(cell, layout):
    scale, shift = draw(2, 6, 3, 2), draw(2, 6, 3, 2) + 1
    x = draw(2, 6, 3 * cell[0], 2 * cell[1], layout=layout)
    up = lambda zq: zq.repeat_interleave(cell[0], 2).repeat_interleave(cell[1], 3)
    expected = x * up(scale) + up(shift)
    out = native.scale_by_cells(x, scale, shift)
    assert out.data_ptr() != x.data_ptr()
    assert_close(out, expected)
    strides = x.stride()
    assert native.scale_by_cells(x, scale, shift, out=x) is x and x.stride() == strides
    assert_close(x, expected)


def test_scale_by_cells_writes_no_resized_map():
    x, scale = draw(1, 4, 64, 64), draw(1, 4, 4, 4)
    with LargestTensor() as largest:
        native.scale_by_cells(x, scale, scale, out=x)
    assert largest.elements == x.numel()
    assert largest.storages == {x.untyped_storage().data_ptr(), scale.untyped_storage().data_ptr()}


def bordered_index(large, cells):
    """Return the row of a bordered map for every row of pixels: a cell has one each for its first, inner and last rows."""
    size = large // cells
    return [3 * (pixel // size) + (0 if pixel % size == 0 else 2 if pixel % size == size - 1 else 1) for pixel in range(large)]


@settings(max_examples=60, deadline=None)
@given(
    cells=st.tuples(st.integers(1, 4), st.integers(1, 4)), cell=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    channels_last=st.booleans(),
)  # fmt: skip
def test_borders_are_spread_over_cells(cells, cell, channels_last):
    height, width = cells[0] * cell[0], cells[1] * cell[1]
    zq = draw(2, 6, 3 * cells[0], 3 * cells[1], layout=LAYOUTS[channels_last])
    f = draw(2, 6, height, width)
    expected = zq[:, :, bordered_index(height, cells[0])][:, :, :, bordered_index(width, cells[1])]
    assert native.is_bordered(zq, f) and torch.equal(native.spread_borders(zq, f), expected)
    out = native.spatial_norm(f, zq, zq + 1, NormOptions(None, None, 3, bordered=True))
    assert_close(out, published.spatial_norm(f, expected, expected + 1, None, None, 3))


@pytest.mark.parametrize(("zq_grid", "f_grid", "expected"), [
    ((3, 3), (2, 2), True), ((3, 6), (5, 4), True), ((3, 3), (1, 2), False), ((3, 3), (2, 1), False),
    ((2, 3), (4, 4), False), ((3, 4), (4, 4), False), ((6, 3), (5, 4), False), ((3, 6), (4, 2), False),
])  # fmt: skip
def test_is_bordered(zq_grid, f_grid, expected):
    assert native.is_bordered(draw(1, 1, *zq_grid), draw(1, 1, *f_grid)) == expected


# --- Writing in place


class Subclass(torch.Tensor):
    pass


def test_results_of_plain_tensors_may_be_overwritten():
    x, parameter = draw(2, 3), torch.nn.Parameter(draw(3))
    assert native.is_inference() and native.is_inference(x)
    with torch.no_grad():
        assert native.is_inference(x, parameter, draw(2).requires_grad_())
    with torch.inference_mode():
        assert native.is_inference(x, draw(2))


def test_results_that_something_records_may_not_be_overwritten():
    x, seen = draw(2, 3), []

    def check(y):
        seen.append(native.is_inference(x, y))
        return y.sum()

    assert not native.is_inference(x, draw(2).requires_grad_())
    assert not native.is_inference(x, torch.nn.Parameter(draw(3)))
    with torch.no_grad():
        assert not native.is_inference(x, draw(2).as_subclass(Subclass))
        with forward_ad.dual_level():
            assert not native.is_inference(x)
        for transform in (torch.vmap, torch.func.grad):
            transform(check)(draw(3))
    assert seen == [False, False]


@torch.no_grad()
def test_compiled_programs_do_not_write_in_place():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 10 * native.is_inference(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.zeros(2))


# --- Attention


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("channels", [1, 20, 64])
def test_attention_is_the_published_formula(channels, scale):
    maps = [draw(2, channels, 3, 5), draw(2, channels, 3, 5) - 1, draw(2, channels, 3, 5) + 1]
    out = native.attention(*(x.flatten(2).mT.unsqueeze(1) for x in maps), scale)
    assert_close(out.squeeze(1).mT.reshape(maps[0].shape), published.attention(*maps, scale))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result, and the storages of all results."""

    def __init__(self):
        super().__init__()
        self.elements, self.storages = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
                self.storages.add(x.untyped_storage().data_ptr())
        return out


def test_no_backend_makes_all_scores_at_once():
    q = torch.randn(1, 1, 5000, 4)
    with sdpa_kernel(SDPBackend.MATH):
        whole = F.scaled_dot_product_attention(q, q, q)
        with LargestTensor() as largest:
            out = native.attention(q, q, q, None)
    assert 5000 * 4 < largest.elements <= native.MAX_SCORE_ELEMENTS == 4096**2
    assert_close(out, whole.double())


def test_shared_kv_attention_bounds_the_scores_too():
    q, kv = torch.randn(1, 1, 50, 4), torch.randn(1, 1, 5000, 4)
    with sdpa_kernel(SDPBackend.MATH), pytest.MonkeyPatch.context() as patch, LargestTensor() as largest:
        patch.setattr(native, "MAX_SCORE_ELEMENTS", 5000 * 20)
        out = native.shared_kv_attention(q, kv, 0.7)
    assert 5000 * 4 < largest.elements <= 5000 * 20
    assert_close(out, (q.double() @ kv.double().mT * 0.7).softmax(3) @ kv.double(), slack=2)


# --- The epilogue of a convolution


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_and_residual_are_added_in_place(layout):
    x, bias, residual = draw(2, 6, 4, 5, layout=layout), draw(6), draw(2, 6, 4, 5) - 1
    for b, r in ((bias, residual), (bias, None), (None, residual)):
        out = x.clone()
        expected = x + (0 if b is None else b[:, None, None]) + (0 if r is None else r)
        assert native.add_bias_residual_(out, b, r) is out and out.stride() == x.stride()
        assert_close(out, expected)
    expected = 2 * x + bias[:, None, None]
    assert_close(native.add_bias_residual_(x, bias, x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_1x1_convolution_is_one_product_with_its_bias(layout, batch):
    """In NCHW too: F.linear of strided pixels multiplies row by row, and rounds before it adds the bias.

    A single image needs no copy.
    """
    names = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    x, weight, bias = torch.randn(batch, 5, 3, 4).contiguous(memory_format=layout), torch.randn(7, 5, 1, 1), torch.randn(7)
    with torch.no_grad(), Products():
        out = native.multiply_pixels(x, weight, bias)
    assert names.count("addmm") == 1 and not {"bmm", "add", "add_"} & set(names)
    assert ("clone" in names) == (batch > 1 and layout == torch.contiguous_format)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, F.conv2d(x, weight, bias))
