"""Argument checks: what they accept, and that each error names the argument, what was expected and what was given."""

import pytest
import torch

from movq_ext.model.checks import check_batch, check_groups, check_latent, check_levels, check_positive

WEIGHT, X = torch.zeros(8, 4, 3, 3), torch.zeros(2, 4, 3, 5)

GOOD = {
    "groups": lambda: check_groups(64, 32),
    "one group of one channel": lambda: check_groups(1, 1),
    "levels": lambda: check_levels((1, 2), 0),
    "positive": lambda: check_positive(ch=1, z_channels=4),
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
