"""Residual blocks of clips with plain group norms."""

import copy

import pytest
import torch
from accelerated_models import assert_same, randomised
from diffusers.models.resnet import TemporalResnetBlock
from torch import nn
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


# Mochi's, EasyAnimate's and Allegro's, in float64


def mochi_block():
    mochi = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_mochi")
    return mochi.MochiResnetBlock3D(64), lambda layer, x: layer(x)[0]


def mochi_norm():
    mochi = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_mochi")
    return mochi.MochiChunkedGroupNorm3D(64, chunk_size=2), lambda layer, x: layer(x)


def easyanimate_block():
    magvit = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_magvit")
    layer = magvit.EasyAnimateResidualBlock3D(64, 32, norm_num_groups=4, spatial_group_norm=True)

    def run(layer, x):
        for conv in (layer.conv1, layer.conv2):
            conv._clear_conv_cache()  # of the frames of the call before
        return layer(x)

    return layer, run


def allegro_layer(**changes):
    allegro = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_allegro")
    layer = allegro.AllegroTemporalConvLayer(64, 64, dropout=0.1, **changes)

    def run(layer, x):
        torch.manual_seed(0)  # dropout
        return layer(x.transpose(1, 2).flatten(0, 1), batch_size=x.shape[0])

    return layer, run


LAYERS = {
    "Mochi's block": mochi_block,
    "Mochi's norm": mochi_norm,
    "EasyAnimate's block": easyanimate_block,
    "Allegro's layer": allegro_layer,
    "Allegro's layer, fewer frames": lambda: allegro_layer(down_sample=True, stride=3),
    "Allegro's layer, more frames": lambda: allegro_layer(up_sample=True, stride=3),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_norms(name, frames, train):
    torch.manual_seed(0)
    layer, run = LAYERS[name]()
    layer, results = randomised(layer).double().train(train), []
    x = draw(2, 64, frames + frames % 2 if "fewer" in name else frames, 4, 5, dtype=torch.float64).requires_grad_()
    for change in (lambda layer: None, accelerate):
        report = change(layer)
        out = run(layer, x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        with torch.no_grad():
            results.append([out, run(layer, x), *gradients])
    assert_same(results[1], results[0], slack=100)
    count = report.calls()[type(layer).__name__]
    assert (count.accelerated, count.original) == (2, 0)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "Mochi's norm"])
@torch.no_grad()
def test_activations_are_not_passes_of_their_own(name, monkeypatch):
    layer, run = LAYERS[name]()
    called, forward = [], nn.SiLU.forward
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: called.append(self) or forward(self, x))
    x = draw(1, 64, 2, 4, 5)
    run(layer, x)
    assert len(called) in (2, 4)
    accelerate(layer)
    called.clear()
    run(layer, x)
    assert called == []


@torch.no_grad()
def test_hooks_inside_mochis_and_allegros_layers_are_called():
    for build, name in ((mochi_block, "norm2.norm_layer"), (mochi_block, "nonlinearity"), (allegro_layer, "conv3"),
                        (allegro_layer, "conv2.0"), (allegro_layer, "conv4.1")):  # fmt: skip
        layer, run = build()
        layer, x, seen = layer.eval(), draw(1, 64, 2, 4, 5), []
        report = accelerate(layer)
        expected = run(layer, x)
        layer.get_submodule(name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert_same([run(layer, x)], [expected])
        count = report.calls()[type(layer).__name__]
        assert seen and (count.accelerated, count.original) == (1, 1), name
