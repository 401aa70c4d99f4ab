"""Bad arguments of the operators: each error names the argument, what was expected and what was given."""

import pytest
import torch

from movq_ext import attention, shared_kv_attention, spatial_attention, spatial_norm
from movq_ext.ops.functional import add_bias_residual_, fused_spatial_norm, spatial_shared_kv_attention
from movq_ext.ops.options import NormOptions

FEATURES = torch.ones(2, 6, 8, 8, dtype=torch.float64)
Y, B = torch.ones(2, 6, 4, 4, dtype=torch.float64), torch.ones(2, 6, 4, 4, dtype=torch.float64)
WEIGHT, BIAS = torch.ones(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
Q, T, X = torch.ones(2, 4, 3, 3), torch.ones(2, 3, 4, 8), torch.ones(2, 6, 4, 4)

BAD_NORM = {
    "rank": (ValueError, r"f must have 4 dimensions .* or 5 .* got shape \(6, 8, 8\)", dict(f=FEATURES[0])),
    "zq of a clip": (ValueError, r"zq_y must have 5 dimensions \(batch, channels, frames, .* got shape \(2, 6, 4, 4\)",
                     dict(f=FEATURES[:, :, None])),
    "zq of a map": (ValueError, r"zq_b must have 4 dimensions .* got shape \(2, 6, 1, 4, 4\)", dict(zq_b=B[:, :, None])),
    "first frame of a map": (ValueError, r"split_first_frame must be False for an f without frames, got True for shape",
                             dict(split_first_frame=True)),
    "empty": (ValueError, r"f must not be empty, got shape \(0, 6, 8, 8\)", dict(f=FEATURES[:0])),
    "integer": (TypeError, r"f must be floating point, got torch.int64", dict(f=FEATURES.long())),
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
    "bordered clip": (ValueError, r"bordered zq_y must have .* got \(2, 6, 3, 3, 3\)",
                      dict(f=X.double()[:, :, None].expand(-1, -1, 2, -1, -1), zq_y=torch.ones(2, 6, 3, 3, 3).double(),
                           zq_b=torch.ones(2, 6, 3, 3, 3).double(), bordered=True)),
    "gradient": (ValueError, r"weight must not require a gradient: spatial_norm with f_bias records none",
                 dict(f_bias=BIAS, weight=WEIGHT.clone().requires_grad_())),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_NORM)
def test_spatial_norm_refuses(case):
    error, message, change = BAD_NORM[case]
    with pytest.raises(error, match=message):
        spatial_norm(**(dict(f=FEATURES, zq_y=Y, zq_b=B, weight=WEIGHT, bias=BIAS, groups=3) | change))


@pytest.mark.parametrize("case", BAD_FUSED_NORM)
def test_fused_spatial_norm_refuses(case):
    error, message, change = BAD_FUSED_NORM[case]
    arguments = dict(f=FEATURES, zq_y=Y, zq_b=B, weight=WEIGHT, bias=BIAS, groups=3) | change
    maps = [arguments.pop(name) for name in ("f", "zq_y", "zq_b")]
    with pytest.raises(error, match=message):
        fused_spatial_norm(*maps, NormOptions(**arguments))


BAD_SPATIAL_ATTENTION = {
    "rank": (ValueError, r"q must have 4 dimensions", (Q[0], Q, Q)),
    "shape": (ValueError, r"k must have q's shape \(2, 4, 3, 3\), got \(1, 4, 3, 3\)", (Q, Q[:1], Q)),
    "empty": (ValueError, r"q must not be empty", (Q[:0], Q, Q)),
    "dtype": (TypeError, r"v must have q's dtype torch.float32, got torch.float64", (Q, Q, Q.double())),
    "device": (ValueError, r"k must be on q's device cpu, got meta", (Q, Q.to("meta"), Q)),
}


@pytest.mark.parametrize("case", BAD_SPATIAL_ATTENTION)
def test_spatial_attention_refuses(case):
    error, message, arguments = BAD_SPATIAL_ATTENTION[case]
    with pytest.raises(error, match=message):
        spatial_attention(*arguments)


BAD_ATTENTION = {
    "rank": (ValueError, r"q must have 4 dimensions \(batch, heads, tokens, head size\), got shape \(3, 4, 8\)", (T[0], T, T)),
    "heads": (ValueError, r"k must have q's batch, heads and head size \(2, 3, 4, 8\), got \(2, 2, 4, 8\)", (T, T[:, :2], T)),
    "size": (ValueError, r"v must have q's batch, heads and head size", (T, T, T[..., :4])),
    "tokens": (ValueError, r"k and v must have the same number of tokens, got 4 and 2", (T, T, T[:, :, :2])),
    "empty": (ValueError, r"k must not be empty", (T, T[:, :, :0], T[:, :, :0])),
    "integer": (TypeError, r"q must be floating point, got torch.int64", (T.long(), T, T)),
    "dtype": (TypeError, r"k must have q's dtype torch.float32, got torch.float64", (T, T.double(), T)),
}


@pytest.mark.parametrize("case", BAD_ATTENTION)
def test_attention_refuses(case):
    error, message, arguments = BAD_ATTENTION[case]
    with pytest.raises(error, match=message):
        attention(*arguments)


BAD_SHARED_KV_ATTENTION = {
    "rank": (ValueError, r"kv must have 4 dimensions \(batch, heads, tokens, head size\), got shape \(3, 4, 8\)", (T, T[0])),
    "heads": (ValueError, r"kv must have q's batch, heads and head size \(2, 3, 4, 8\), got \(2, 2, 4, 8\)", (T, T[:, :2])),
    "empty": (ValueError, r"kv must not be empty", (T, T[:, :, :0])),
    "integer": (TypeError, r"q must be floating point, got torch.int64", (T.long(), T)),
    "device": (ValueError, r"kv must be on q's device cpu, got meta", (T, T.to("meta"))),
    "dtype": (TypeError, r"kv must have q's dtype torch.float32, got torch.float64", (T, T.double())),
}


@pytest.mark.parametrize("case", BAD_SHARED_KV_ATTENTION)
def test_shared_kv_attention_refuses(case):
    error, message, arguments = BAD_SHARED_KV_ATTENTION[case]
    with pytest.raises(error, match=message):
        shared_kv_attention(*arguments)


def test_spatial_shared_kv_attention_refuses_another_shape():
    with pytest.raises(ValueError, match=r"kv must have q's shape \(2, 4, 3, 3\), got \(1, 4, 3, 3\)"):
        spatial_shared_kv_attention(Q, Q[:1])


BAD_EPILOGUE = {
    "rank": (ValueError, r"x must have 4 dimensions .* got shape \(6, 4, 4\)", dict(x=X[0])),
    "empty": (ValueError, r"x must not be empty, got shape \(0, 6, 4, 4\)", dict(x=X[:0])),
    "integer": (TypeError, r"x must be floating point, got torch.int64", dict(x=X.long())),
    "strides": (ValueError, r"x must be dense .* got strides \(96, 16, 4, 1\) for shape \(2, 5, 4, 4\)", dict(x=X[:, :5])),
    "nothing": (ValueError, r"bias or residual must be given, got neither", dict(bias=None, residual=None)),
    "bias shape": (ValueError, r"bias must have shape \(6,\), got \(5,\)", dict(bias=BIAS[:5].float())),
    "bias dtype": (TypeError, r"bias must be float32 or .* got torch.float64", dict(bias=BIAS)),
    "bias device": (ValueError, r"bias must be on x's device cpu, got meta", dict(bias=BIAS.float().to("meta"))),
    "residual shape": (ValueError, r"residual must have x's shape \(2, 6, 4, 4\), got \(1, 6, 4, 4\)", dict(residual=X[:1])),
    "residual dtype": (TypeError, r"residual must have x's dtype torch.float32, got torch.float16", dict(residual=X.half())),
    "residual device": (ValueError, r"residual must be on x's device cpu, got meta", dict(residual=X.to("meta"))),
    "x gradient": (ValueError, r"x must not require a gradient: add_bias", dict(x=X.clone().requires_grad_())),
    "bias gradient": (ValueError, r"bias must not require a gradient", dict(bias=BIAS.float().clone().requires_grad_())),
    "residual gradient": (ValueError, r"residual must not require a gradient", dict(residual=X.clone().requires_grad_())),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_EPILOGUE)
def test_the_epilogue_refuses(case):
    error, message, change = BAD_EPILOGUE[case]
    with pytest.raises(error, match=message):
        add_bias_residual_(**(dict(x=X.clone(), bias=BIAS.float(), residual=X) | change))
