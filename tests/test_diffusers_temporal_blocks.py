"""Residual blocks of clips with plain group norms."""

import pytest
import torch
from accelerated_models import assert_same, randomised
from diffusers.models.resnet import TemporalResnetBlock
from video_models import draw

from movq_ext import accelerate


@pytest.mark.parametrize("temb_channels", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_time_embedding_of_every_frame(temb_channels, dtype):
    torch.manual_seed(0)
    layer, results = randomised(TemporalResnetBlock(32, 64, temb_channels)).to(dtype), []
    x = draw(2, 32, 3, 4, 5, dtype=dtype).requires_grad_()
    temb = None if temb_channels is None else draw(2, 3, 6, dtype=dtype)
    for change in (lambda layer: None, accelerate):
        report = change(layer)
        out = layer(x, temb)
        gradients = torch.autograd.grad(out.square().sum(), x)
        with torch.no_grad():
            results.append([out, layer(x, temb), *gradients])
    assert_same(results[1], results[0])
    assert report.calls()["TemporalResnetBlock"].accelerated == 2


@torch.no_grad()
def test_hooked_norms_are_called():
    layer, seen = TemporalResnetBlock(32, 32, None).eval(), []
    layer.norm2.register_forward_hook(lambda *_: seen.append(1))
    x = draw(1, 32, 3, 4, 5)
    expected = layer(x, None)
    accelerate(layer)
    assert torch.equal(layer(x, None), expected) and len(seen) == 2
