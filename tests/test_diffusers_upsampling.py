"""Nearest upsampling with a convolution."""

import pytest
import torch
from accelerated_models import Counted, assert_same
from diffusers.models.upsampling import Upsample2D

from movq_ext import accelerate
from movq_ext.ops import upsampling
from movq_ext.ops.winograd_upsampling import MIN_CHANNELS


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


@pytest.mark.parametrize("pixels", [511, 512])
@torch.no_grad()
def test_small_maps_are_left_to_diffusers(pixels, monkeypatch):
    """Folding the weights would take longer than it saves."""
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS", 512)
    upsample = Upsample2D(4, use_conv=True)
    report = accelerate(upsample)
    with Counted() as counted:
        upsample(torch.randn(1, 4, 1, pixels))
    served = int(pixels >= 512)
    assert counted.calls == (0, 0, served)
    assert (report.calls()["Upsample2D"].accelerated, report.calls()["Upsample2D"].original) == (served, 1 - served)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_maps_with_nine_products_for_four_pixels(dtype, monkeypatch):
    """In inference and exact dtypes they beat the doubled map for fewer pixels than folded weights need."""
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS", 512)
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS_BFLOAT16", 512)
    upsample, x = Upsample2D(MIN_CHANNELS, use_conv=True).to(dtype), torch.randn(1, MIN_CHANNELS, 8, 8).to(dtype)
    with torch.no_grad():
        expected = upsample(x)
        report = accelerate(upsample)
        assert_same([upsample(x)], [expected])
    served = int(dtype == torch.float32)
    assert report.calls()["Upsample2D"].accelerated == served
    upsample(x)  # with gradients
    assert report.calls()["Upsample2D"].accelerated == served


def test_an_exported_program_takes_maps_of_any_size(monkeypatch):
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS", 512)
    upsample = Upsample2D(32, use_conv=True).eval()
    accelerate(upsample)
    sizes = {0: torch.export.Dim("b", min=1, max=16), 2: torch.export.Dim("h", min=2, max=64)}
    program = torch.export.export(upsample, (torch.randn(2, 32, 8, 8),), dynamic_shapes={"hidden_states": sizes}).module()
    for shape in [(1, 32, 2, 8), (9, 32, 64, 8)]:
        x = torch.randn(shape)
        assert_same([program(x)], [upsample(x)])
