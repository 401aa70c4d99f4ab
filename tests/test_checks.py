"""Argument checks: what they accept, and that each error names the argument, what was expected and what was given."""

import numpy as np
import pytest
import torch

from movq_ext.model.checks import (
    MAX_CHANNELS,
    MAX_NUMBER,
    check_attention_levels,
    check_batch,
    check_channels,
    check_count,
    check_flags,
    check_groups,
    check_latent,
    check_level_channels,
    check_levels,
    check_number,
    check_positive,
)

WEIGHT, X = torch.zeros(8, 4, 3, 3), torch.zeros(2, 4, 3, 5)

GOOD = {
    "groups": lambda: check_groups(64, 32),
    "one group of one channel": lambda: check_groups(1, 1),
    "levels": lambda: check_levels((1, 2), 0),
    "positive": lambda: check_positive(ch=1, z_channels=4),
    "channels of levels": lambda: check_level_channels(32, [1, 2], 32),
    "largest": lambda: check_channels(ch=MAX_CHANNELS),
    "attention levels": lambda: check_attention_levels(256, (32, 0)),
    "counts": lambda: (check_count("n_embed", 0), check_count("n_embed", np.int64(5))),
    "flags": lambda: check_flags(a=True, b=0, c=np.bool_(False)),
    "numbers": lambda: (check_number("dropout", 0, 0, 1), check_number("dropout", np.float32(0.5), 0, 1)),
    "latent": lambda: check_latent("z", X, 4, WEIGHT),
    "latent of one pixel": lambda: check_latent("z", X[:, :, :1, :1], 4, WEIGHT),
    "latent of a layer that takes any dtype and device": lambda: check_latent("z", X.half().to("meta"), 4, None),
    "batch": lambda: check_batch(z=X, zq=X[:, :1]),
}

BAD = {
    "no groups": (lambda: check_groups(64, None), ValueError, "num_groups must be a positive integer, got None"),
    "zero groups": (lambda: check_groups(64, 0), ValueError, "num_groups must be a positive integer, got 0"),
    "groups": (lambda: check_groups(48, 32), ValueError, "channels must be divisible by the 32 groups of the norm, got 48"),
    "no levels": (lambda: check_levels((), 1), ValueError, r"ch_mult must be a non-empty sequence of .* integers, got \(\)"),
    "multiplier": (lambda: check_levels((1, 0), 1), ValueError, r"ch_mult must be .* positive integers, got \(1, 0\)"),
    "blocks": (lambda: check_levels((1,), -1), ValueError, "num_res_blocks must not be negative, got -1"),
    "bool": (lambda: check_levels((True, 2), 1), ValueError, "ch_mult must be"),
    "text": (lambda: check_levels("12", 1), ValueError, "ch_mult must be .*, got '12'"),
    "half a block": (lambda: check_levels((1,), 1.5), ValueError, "num_res_blocks must be an integer, got 1.5"),
    "level": (lambda: check_level_channels(48, (1,), 32), ValueError, r"ch: .* got 48 channels \(ch=48, ch_mult=\(1,\)\)"),
    "wide level": (
        lambda: check_level_channels(1 << 16, (1, 2), 32),
        ValueError,
        r"ch \* ch_mult must be at most 65536, got 13",
    ),
    "too many": (lambda: check_channels(ch=1 << 17), ValueError, "ch must be at most 65536, got 131072"),
    "resolution": (lambda: check_attention_levels(0, ()), ValueError, "resolution must be a positive integer, got 0"),
    "attention levels": (lambda: check_attention_levels(1, "32"), ValueError, "attn_resolutions must be .*, got '32'"),
    "attention level": (lambda: check_attention_levels(1, [0.5]), ValueError, r"attn_resolutions must be .*, got \[0.5\]"),
    "count": (
        lambda: check_count("n_embed", 2**31),
        ValueError,
        "n_embed must be an integer from 0 to .*, got 2147483648",
    ),
    "flag": (lambda: check_flags(mid_attn="no"), ValueError, "mid_attn must be True or False, got 'no'"),
    "number": (lambda: check_number("dropout", float("nan"), 0, 1), ValueError, "dropout must be a number from 0 to 1, got nan"),
    "infinite": (
        lambda: check_number("beta", float("inf"), 0, MAX_NUMBER),
        ValueError,
        "beta must be .* at least 0 and finite",
    ),
    "zero": (lambda: check_positive(ch=1, out_ch=0), ValueError, "out_ch must be a positive integer, got 0"),
    "float": (lambda: check_positive(ch=1.0), ValueError, "ch must be a positive integer, got 1.0"),
    "list": (lambda: check_latent("z", [1.0], 4, WEIGHT), TypeError, "z must be a tensor, got list"),
    "rank": (
        lambda: check_latent("z", X[0], 4, WEIGHT),
        ValueError,
        r"z must have shape \(batch, 4, height, width\), got \(4, 3, 5\)",
    ),
    "channels": (lambda: check_latent("zq", X, 5, WEIGHT), ValueError, r"zq must have shape \(batch, 5, .*, got \(2, 4, 3, 5\)"),
    "empty": (lambda: check_latent("z", X[:0], 4, WEIGHT), ValueError, r"z must not be empty, got shape \(0, 4, 3, 5\)"),
    "device": (
        lambda: check_latent("z", X.to("meta"), 4, WEIGHT),
        ValueError,
        "z must be on the model's device cpu, got meta",
    ),
    "dtype": (
        lambda: check_latent("z", X.half(), 4, WEIGHT),
        TypeError,
        "z must have the model's dtype torch.float32, got torch.float16",
    ),
    "batch": (lambda: check_batch(z=X, zq=X[:1]), ValueError, "z and zq must have the same batch size: z has 2, zq has 1"),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_arguments_pass(case):
    GOOD[case]()


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    check, error, message = BAD[case]
    with pytest.raises(error, match=message):
        check()


def test_autocast_accepts_other_floating_point_dtypes_only():
    with torch.autocast("cpu", torch.bfloat16):
        check_latent("z", X.half(), 4, WEIGHT)
        with pytest.raises(TypeError, match=r"z must have the model's dtype torch\.float32, got torch\.int64"):
            check_latent("z", X.long(), 4, WEIGHT)
