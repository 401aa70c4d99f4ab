"""Residual blocks of clips with plain group norms."""

import copy

import pytest
import torch
from accelerated_models import assert_same, randomised
from diffusers.models.resnet import TemporalResnetBlock
from torch.utils._python_dispatch import TorchDispatchMode
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


@pytest.mark.parametrize("factor", [1, 2])
@torch.no_grad()
def test_the_sum_is_divided_by_the_output_scale_factor_unless_it_is_1(factor):
    magvit = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_magvit")
    torch.manual_seed(0)
    layer = randomised(magvit.EasyAnimateResidualBlock3D(
        8, 12, non_linearity="silu", norm_num_groups=4, norm_eps=1e-6, spatial_group_norm=False, dropout=0.0,
        output_scale_factor=factor,
    ))  # fmt: skip
    x = draw(1, 8, 3, 4, 5)
    expected = copy.deepcopy(layer)(x)  # a call leaves its last frames in the convolutions
    report = accelerate(layer)
    with Operators() as operators:
        out = layer(x)
    assert_same([out], [expected])
    assert report.calls()["EasyAnimateResidualBlock3D"].accelerated == 1
    assert operators.sizes_of(torch.ops.aten.div.Tensor).count(out.shape) == factor - 1


class Operators(TorchDispatchMode):
    """Records the operators that run, with the sizes of their results."""

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, getattr(out, "shape", None)))
        return out

    def sizes_of(self, function):
        return [size for called, size in self.calls if called is function]


@torch.no_grad()
def test_hooked_norms_are_called():
    layer, seen = TemporalResnetBlock(32, 32, None).eval(), []
    layer.norm2.register_forward_hook(lambda *_: seen.append(1))
    x = draw(1, 32, 3, 4, 5)
    expected = layer(x, None)
    accelerate(layer)
    assert torch.equal(layer(x, None), expected) and len(seen) == 2
