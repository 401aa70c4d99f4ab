import published
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from movq_ext import attention, explain, spatial_attention, spatial_norm
from movq_ext.ops import functional
from movq_ext.ops.functional import add_bias_residual_, fused_spatial_norm
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
    few = per_group * f_grid[0] * f_grid[1] < 4  # values of a group: where they are alike, their rounding / eps ** 0.5 is left
    assert_close(spatial_norm(*arguments), expected, slack=100.0 if few else 1.0)


def test_without_a_latent_it_is_group_norm():
    f, _, _, weight, bias, groups = norm_arguments()
    assert_close(spatial_norm(f, None, None, weight, bias, groups, 1e-5), F.group_norm(f, groups, weight, bias, 1e-5))
    assert_close(spatial_norm(f, None, None, None, None, groups), published.group_norm(f, groups, None, None, 1e-6))


def test_one_value_a_group_is_the_bias():
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


def test_attention_of_heads_and_other_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 8, generator=generator, dtype=torch.float64) for tokens in (5, 7, 7))
    assert_close(attention(q, k, v, 0.3), (q @ k.mT * 0.3).softmax(3) @ v)
    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in (q, k, v)])


def test_nan_passes_through():
    f, *rest = norm_arguments()
    f[0, 0, 0, 0] = float("nan")
    out = spatial_norm(f, *rest)
    assert out[0, :2].isnan().all() and not out[0, 2:].isnan().any() and not out[1].isnan().any()


F_, Y, B, WEIGHT, BIAS, GROUPS = norm_arguments()
BAD_NORM = {
    "rank": (ValueError, r"f must have 4 dimensions .* got shape \(6, 8, 8\)", dict(f=F_[0])),
    "empty": (ValueError, r"f must not be empty, got shape \(0, 6, 8, 8\)", dict(f=F_[:0])),
    "integer": (TypeError, r"f must be floating point, got torch.int64", dict(f=F_.long())),
    "zero groups": (ValueError, r"groups must be a positive divisor of f's channels, got groups=0 for 6 channels",
                    dict(groups=0)),
    "groups": (ValueError, r"groups must be .*, got groups=4 for 6 channels", dict(groups=4)),
    "activation": (ValueError, r"activation must be one of .*, got 'relu'", dict(activation="relu")),
    "half a latent": (ValueError, r"zq_y and zq_b must be given together or not at all, got only zq_y", dict(zq_b=None)),
    "zq rank": (ValueError, r"zq_y must have 4 dimensions", dict(zq_y=Y[0])),
    "zq batch": (ValueError, r"zq_y must have f's batch and channels \(2, 6\), got shape \(1, 6, 4, 4\)", dict(zq_y=Y[:1])),
    "zq channels": (ValueError, r"zq_b must have f's batch and channels \(2, 6\), got shape \(2, 5, 4, 4\)", dict(zq_b=B[:, :5])),
    "zq grids": (ValueError, r"zq_y and zq_b must have the same shape, got", dict(zq_b=B[..., :3])),
    "dtypes": (TypeError, r"zq_y must have f's dtype torch.float64, got torch.float32", dict(zq_y=Y.float())),
    "devices": (ValueError, r"zq_b must be on f's device cpu, got meta", dict(zq_b=B.to("meta"))),
    "weight": (ValueError, r"weight must have shape \(6,\), got \(5,\)", dict(weight=WEIGHT[:5])),
    "bias": (ValueError, r"bias must have shape \(6,\), got \(6, 1\)", dict(bias=BIAS[:, None])),
}  # fmt: skip
BAD_FUSED_NORM = {
    "f_bias": (ValueError, r"f_bias must have shape \(6,\), got \(5,\)", dict(f_bias=BIAS[:5])),
    "f_bias dtype": (TypeError, r"f_bias must be float32 or have f's dtype torch.float64, got", dict(f_bias=BIAS.half())),
    "f_bias device": (ValueError, r"f_bias must be on f's device cpu, got meta", dict(f_bias=BIAS.to("meta"))),
    "bordered": (ValueError, r"bordered zq_y must have three rows and columns for each cell of .* f's \(8, 8\) pixels, got \(2",
                 dict(bordered=True)),
    "gradient": (ValueError, r"weight must not require a gradient: spatial_norm with f_bias records none",
                 dict(f_bias=BIAS, weight=WEIGHT.clone().requires_grad_())),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_NORM)
def test_spatial_norm_refuses(case):
    error, message, change = BAD_NORM[case]
    arguments = dict(f=F_, zq_y=Y, zq_b=B, weight=WEIGHT, bias=BIAS, groups=GROUPS)
    with pytest.raises(error, match=message):
        spatial_norm(**{**arguments, **change})


@pytest.mark.parametrize("case", BAD_FUSED_NORM)
def test_fused_spatial_norm_refuses(case):
    error, message, change = BAD_FUSED_NORM[case]
    with pytest.raises(error, match=message):
        fused_spatial_norm(F_, Y, B, NormOptions(**{**dict(weight=WEIGHT, bias=BIAS, groups=GROUPS), **change}))


Q = torch.randn(2, 4, 3, 3)
BAD_ATTENTION = {
    "rank": (ValueError, r"q must have 4 dimensions", (Q[0], Q, Q)),
    "shape": (ValueError, r"k must have q's shape \(2, 4, 3, 3\), got \(1, 4, 3, 3\)", (Q, Q[:1], Q)),
    "empty": (ValueError, r"q must not be empty", (Q[:0], Q, Q)),
    "dtype": (TypeError, r"v must have q's dtype torch.float32, got torch.float64", (Q, Q, Q.double())),
    "device": (ValueError, r"k must be on q's device cpu, got meta", (Q, Q.to("meta"), Q)),
}


@pytest.mark.parametrize("case", BAD_ATTENTION)
def test_attention_refuses(case):
    error, message, arguments = BAD_ATTENTION[case]
    with pytest.raises(error, match=message):
        spatial_attention(*arguments)


T = torch.randn(2, 3, 4, 8)
BAD_HEADS = {
    "rank": (ValueError, r"q must have 4 dimensions \(batch, heads, tokens, head size\), got shape \(3, 4, 8\)", (T[0], T, T)),
    "heads": (ValueError, r"k must have q's batch, heads and head size \(2, 3, 4, 8\), got \(2, 2, 4, 8\)", (T, T[:, :2], T)),
    "size": (ValueError, r"v must have q's batch, heads and head size", (T, T, T[..., :4])),
    "tokens": (ValueError, r"k and v must have the same number of tokens, got 4 and 2", (T, T, T[:, :, :2])),
    "empty": (ValueError, r"k must not be empty", (T, T[:, :, :0], T[:, :, :0])),
    "integer": (TypeError, r"q must be floating point, got torch.int64", (T.long(), T, T)),
    "dtype": (TypeError, r"k must have q's dtype torch.float32, got torch.float64", (T, T.double(), T)),
}


@pytest.mark.parametrize("case", BAD_HEADS)
def test_attention_of_heads_refuses(case):
    error, message, arguments = BAD_HEADS[case]
    with pytest.raises(error, match=message):
        attention(*arguments)


def test_the_kernels_pixels_are_counted_in_32_bits(monkeypatch):
    monkeypatch.setattr(functional, "device_reason", lambda index: None)
    reason = functional._why_native(torch.empty(1, 1, 2**16, 2**15, device="meta"))
    assert reason == "the CUDA kernels take at most 2147418111 pixels, got shape (1, 1, 65536, 32768)"
    assert functional._why_native(torch.empty(1, 1, 2**16, 2**15 - 2, device="meta")) is None


def test_explain_names_path_and_reason():
    assert explain(Q, "attention") == explain(Q, "spatial_attention") == explain(Q)
    with pytest.raises(ValueError, match="operator must be one of spatial_norm, spatial_attention, attention, got 'conv'"):
        explain(Q, "conv")
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


X = torch.randn(2, 6, 4, 4)
BAD_EPILOGUE = {
    "rank": (ValueError, r"x must have 4 dimensions .* got shape \(6, 4, 4\)", dict(x=X[0])),
    "empty": (ValueError, r"x must not be empty, got shape \(0, 6, 4, 4\)", dict(x=X[:0])),
    "integer": (TypeError, r"x must be floating point, got torch.int64", dict(x=X.long())),
    "strides": (ValueError, r"x must be dense .* got strides \(96, 16, 4, 1\) for shape \(2, 5, 4, 4\)", dict(x=X[:, :5])),
    "nothing": (ValueError, r"bias or residual must be given, got neither", dict(bias=None, residual=None)),
    "bias shape": (ValueError, r"bias must have shape \(6,\), got \(5,\)", dict(bias=X[0, :5, 0, 0])),
    "bias dtype": (TypeError, r"bias must be float32 or .* got torch.float64", dict(bias=X[0, :, 0, 0].double())),
    "bias device": (ValueError, r"bias must be on x's device cpu, got meta", dict(bias=X[0, :, 0, 0].to("meta"))),
    "residual shape": (ValueError, r"residual must have x's shape \(2, 6, 4, 4\), got \(1, 6, 4, 4\)", dict(residual=X[:1])),
    "residual dtype": (TypeError, r"residual must have x's dtype torch.float32, got torch.float16", dict(residual=X.half())),
    "residual device": (ValueError, r"residual must be on x's device cpu, got meta", dict(residual=X.to("meta"))),
    "x gradient": (ValueError, r"x must not require a gradient: add_bias", dict(x=X.clone().requires_grad_())),
    "bias gradient": (ValueError, r"bias must not require a gradient", dict(bias=X[0, :, 0, 0].clone().requires_grad_())),
    "residual gradient": (ValueError, r"residual must not require a gradient", dict(residual=X.clone().requires_grad_())),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_EPILOGUE)
def test_the_epilogue_refuses(case):
    error, message, change = BAD_EPILOGUE[case]
    arguments = dict(x=X.clone(), bias=X[0, :, 0, 0].clone(), residual=X)
    with pytest.raises(error, match=message):
        add_bias_residual_(**{**arguments, **change})


def test_the_epilogue_takes_parameters_where_nothing_is_recorded():
    x, bias = X.clone(), torch.nn.Parameter(X[0, :, 0, 0].clone())
    with torch.no_grad():
        assert_close(add_bias_residual_(x, bias, None), X.double() + bias.double()[:, None, None])
