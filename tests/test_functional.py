"""The public operators: the published formulas in every dtype, gradients, and the choice of a path."""

import inspect
import textwrap

import published
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel

from movq_ext import attention, explain, shared_kv_attention, spatial_attention, spatial_norm
from movq_ext.ops import paths
from movq_ext.ops.functional import add_bias_residual_, fused_spatial_norm, spatial_shared_kv_attention
from movq_ext.ops.options import NormOptions

GRIDS = [((8, 8), (8, 8)), ((8, 8), (1, 1)), ((16, 8), (4, 4)), ((7, 9), (3, 4)), ((5, 5), (7, 11)),
         ((1, 1), (1, 1)), ((1, 13), (2, 5)), ((41, 49), (1, 1)), ((9, 27), (3, 9))]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def norm_arguments(channels=6, groups=3, f_grid=(8, 8), zq_grid=(4, 4), batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    maps = draw(batch, channels, *f_grid) * 3 + 5, draw(batch, channels, *zq_grid), draw(batch, channels, *zq_grid)
    return *maps, draw(channels), draw(channels), groups


def in_double(arguments):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("f_grid", "zq_grid"), GRIDS)
def test_spatial_norm_is_the_formula(f_grid, zq_grid, dtype, activation):
    arguments = norm_arguments(f_grid=f_grid, zq_grid=zq_grid, dtype=dtype)
    expected = published.spatial_norm(*in_double(arguments), activation=activation)
    out = spatial_norm(*arguments, activation=activation)
    assert out.dtype == dtype
    assert_close(out, expected, slack=2)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), groups=st.integers(1, 4), per_group=st.integers(1, 4),
    f_grid=st.tuples(st.integers(1, 20), st.integers(1, 20)), zq_grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    channels_last=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_spatial_norm_on_any_shape(batch, groups, per_group, f_grid, zq_grid, channels_last, seed):
    arguments = list(norm_arguments(groups * per_group, groups, f_grid, zq_grid, batch, seed=seed))
    expected = published.spatial_norm(*arguments)
    if channels_last:
        arguments[0] = arguments[0].to(memory_format=torch.channels_last)
    few = per_group * f_grid[0] * f_grid[1] < 4  # values per group; if they nearly agree, 1 / sqrt(eps) amplifies their rounding
    assert_close(spatial_norm(*arguments), expected, slack=100.0 if few else 1.0)


def test_without_a_latent_it_is_group_norm():
    f, _, _, weight, bias, groups = norm_arguments()
    assert_close(spatial_norm(f, None, None, weight, bias, groups, 1e-5), F.group_norm(f, groups, weight, bias, 1e-5))
    assert_close(spatial_norm(f, None, None, None, None, groups), published.group_norm(f, groups, None, None, 1e-6))


def test_groups_of_one_value_give_the_bias():
    f, _, _, weight, bias, _ = norm_arguments(channels=3, groups=3, f_grid=(1, 1), batch=1)
    assert_close(spatial_norm(f, None, None, weight, bias, 3), bias.view(1, 3, 1, 1))


def test_statistics_survive_a_large_mean():
    """E[x^2] - E[x]^2 would lose every digit here."""
    f, y, b, weight, bias, groups = norm_arguments(dtype=torch.float32)
    f = f - f.mean() + 4096
    expected = published.spatial_norm(*in_double((f, y, b, weight, bias, groups)))
    assert_close(spatial_norm(f, y, b, weight, bias, groups), expected, slack=1000)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("zq_grid", [(2, 2), (3, 2), (4, 6)])
def test_spatial_norm_gradients(zq_grid, activation):
    arguments = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in norm_arguments(f_grid=(4, 6), zq_grid=zq_grid)]
    assert torch.autograd.gradcheck(lambda *a: spatial_norm(*a, activation=activation), arguments)
    assert torch.autograd.gradgradcheck(lambda *a: spatial_norm(*a, activation=activation), arguments)


def attention_arguments(batch=2, channels=8, grid=(3, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, *grid, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (16, 16)])
@pytest.mark.parametrize("channels", [1, 32, 512])
def test_attention_is_the_formula(channels, grid, dtype, scale):
    arguments = attention_arguments(1, channels, grid, dtype)
    out = spatial_attention(*arguments, scale=scale)
    assert out.dtype == dtype
    assert_close(out, published.attention(*in_double(arguments), scale), slack=50 if scale else 3)


def test_attention_takes_channels_last():
    arguments = attention_arguments()
    out = spatial_attention(*(x.to(memory_format=torch.channels_last) for x in arguments))
    assert_close(out, published.attention(*arguments))


def test_attention_gradients():
    assert torch.autograd.gradcheck(spatial_attention, [x.requires_grad_() for x in attention_arguments(1, 3, (2, 2))])


def test_attention_of_several_heads_and_more_keys_than_queries():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 8, generator=generator, dtype=torch.float64) for tokens in (5, 7, 7))
    assert_close(attention(q, k, v, 0.3), (q @ k.mT * 0.3).softmax(3) @ v)
    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in (q, k, v)])


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_kv_attention_is_the_formula(dtype, scale):
    q, h, _ = attention_arguments(2, 32, (3, 5), dtype)
    expected = published.attention(q.double(), h.double(), h.double(), scale)
    out = spatial_shared_kv_attention(q, h, scale)
    assert out.dtype == dtype
    assert_close(out, expected, slack=50 if scale else 3)
    tokens = shared_kv_attention(*(x.flatten(2).mT.unsqueeze(1) for x in (q, h)), scale)
    assert torch.equal(tokens.squeeze(1).mT.unflatten(2, (3, 5)), out)


def test_shared_kv_attention_adds_the_gradients_of_keys_and_values():
    generator = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(2, 3, tokens, 4, generator=generator, dtype=torch.float64).requires_grad_() for tokens in (5, 7))
    assert torch.autograd.gradcheck(shared_kv_attention, (q, kv))
    with sdpa_kernel(SDPBackend.MATH):  # the only backend that can be differentiated twice
        assert torch.autograd.gradgradcheck(shared_kv_attention, (q, kv))
    k, v = (kv.detach().requires_grad_() for _ in range(2))
    dk, dv = torch.autograd.grad(attention(q, k, v).sin().sum(), (k, v))
    (dkv,) = torch.autograd.grad(shared_kv_attention(q, kv).sin().sum(), kv)
    assert_close(dkv, dk + dv)


def test_keys_and_values_can_be_absorbed_into_queries_and_output():
    """As the docstring of shared_kv_attention says."""
    h, query, key, value = (torch.randn(1, 1, n, 6, dtype=torch.float64) for n in (9, 6, 6, 6))
    expected = attention(h @ query, h @ key, h @ value, 0.3)
    assert_close(shared_kv_attention(h @ query @ key.mT, h, 0.3) @ value, expected, slack=10)


def code_in_docstring(function):
    """The block that the docstring announces with ``::``."""
    lines = inspect.getdoc(function).partition("::\n\n")[2].splitlines()
    return textwrap.dedent("\n".join(lines[: next(i for i, line in enumerate(lines) if line and not line.startswith(" "))]))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_docstrings_give_equivalent_code(activation):
    f, zq_y, zq_b, weight, bias, groups = norm_arguments()
    names = dict(f=f, zq_y=zq_y, zq_b=zq_b, weight=weight, bias=bias, groups=groups, eps=1e-3, activation=activation)
    exec(code_in_docstring(spatial_norm), scope := {"F": F, **names})
    assert_close(spatial_norm(**names), scope["out"])
    names = dict(zip("qkv", attention_arguments(), strict=True), scale=0.3)
    exec(code_in_docstring(spatial_attention), scope := {"F": F, "H": 3, "W": 5, **names})
    assert_close(spatial_attention(**names), scope["out"])


def test_nan_spreads_over_its_group_only():
    f, *rest = norm_arguments()
    f[0, 0, 0, 0] = float("nan")
    out = spatial_norm(f, *rest)
    assert out[0, :2].isnan().all() and not out[0, 2:].isnan().any() and not out[1].isnan().any()


def test_the_kernels_refuse_maps_of_more_pixels_than_int32_holds(monkeypatch):
    monkeypatch.setattr(paths, "device_reason", lambda index: None)
    reason = paths.why_native(torch.empty(1, 1, 2**16, 2**15, device="meta"))
    assert reason == "the CUDA kernels take at most 2147418111 pixels, got shape (1, 1, 65536, 32768)"
    assert paths.why_native(torch.empty(1, 1, 2**16, 2**15 - 2, device="meta")) is None


def test_explain_names_the_path_and_the_reason():
    x = torch.zeros(2, 4, 3, 3)
    assert explain(x, "attention") == explain(x, "spatial_attention") == explain(x, "shared_kv_attention") == explain(x)
    names = "spatial_norm, upsample_conv, spatial_attention, attention, shared_kv_attention"
    with pytest.raises(ValueError, match=f"operator must be one of {names}, got 'conv'"):
        explain(x, "conv")
    assert explain(torch.zeros(1)) == "native: the CUDA kernels do not run on cpu tensors"


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_f_bias_is_added_first(dtype, bias_dtype):
    f, *rest = norm_arguments(dtype=dtype)
    f_bias = torch.linspace(-1, 1, 6, dtype=torch.float64).to(bias_dtype or dtype)
    before = f.clone()
    expected = published.spatial_norm(f.double() + f_bias.double()[:, None, None], *in_double(rest), activation="silu")
    *maps, weight, bias, groups = rest
    out = fused_spatial_norm(f, *maps, NormOptions(weight, bias, groups, activation="silu", f_bias=f_bias))
    assert torch.equal(f, before) and out.dtype == dtype
    assert_close(out, expected, slack=2)


# --- The epilogue of a convolution


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bias_and_residual_are_added_in_place(layout, dtype, bias_dtype):
    x, residual, _, bias, *_ = norm_arguments(zq_grid=(8, 8), dtype=dtype)
    x, bias = x.to(memory_format=layout), bias.to(bias_dtype or dtype)
    for b, r in ((bias, residual), (bias, None), (None, residual)):
        out = x.clone()
        expected = x.double() + (0 if b is None else b.double()[:, None, None]) + (0 if r is None else r.double())
        assert add_bias_residual_(out, b, r) is out and out.stride() == x.stride()
        assert_close(out, expected)
    expected = 2 * x.double() + bias.double()[:, None, None]
    assert_close(add_bias_residual_(x, bias, x), expected)


def test_the_epilogue_takes_parameters_under_no_grad():
    x, bias = torch.randn(2, 6, 4, 4), torch.nn.Parameter(torch.randn(6))
    expected = x.double() + bias.detach().double()[:, None, None]
    with torch.no_grad():
        assert_close(add_bias_residual_(x, bias, None), expected)
