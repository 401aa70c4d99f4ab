"""Nearest upsampling with a convolution."""

import pytest
import torch
from accelerated_models import Counted, assert_same
from diffusers.models.upsampling import Upsample2D

from movq_ext import accelerate


@torch.no_grad()
def test_upsampling_to_a_size_is_left_to_diffusers():
    upsample = Upsample2D(4, use_conv=True)
    x = torch.randn(1, 4, 3, 5)
    expected = upsample(x, (7, 9))
    accelerate(upsample)
    assert torch.equal(upsample(x, (7, 9)), expected)


@pytest.mark.parametrize("name", ["conv", "Conv2d_0"])
@torch.no_grad()
def test_upsampling_is_one_transposed_convolution(name):
    upsample = Upsample2D(4, use_conv=True, out_channels=6, name=name)
    x = torch.randn(2, 4, 3, 5)
    expected = upsample(x)
    accelerate(upsample)
    with Counted() as counted:
        assert_same([upsample(x)], [expected])
    assert counted.calls == (0, 0, 1)
