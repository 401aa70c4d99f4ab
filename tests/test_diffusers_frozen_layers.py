"""Training of a few layers of diffusers' models, with all others frozen: values and gradients in float64 against diffusers."""

import copy
import re

import pytest
import torch
from accelerated_models import assert_same, kl, vq
from torch import nn
from video_models import cogvideox, draw, hunyuan_video, kandinsky6, kvae_video, latent, magvit, mochi, video

from movq_ext import accelerate

# The convolutions of a block, and those around the blocks.
CONVOLUTIONS = re.compile(r"\.(mid_block|block_in|block_out)\.(resnets|convs)\.0\.|\.mid\.block_1\.|sample|\.conv_(in|out)")
DECODED = {  # models and latents
    "CogVideoX": (cogvideox, latent(5)),
    "KVAE": (kvae_video, latent(5, (1, 2))),
    "Kandinsky 6": (kandinsky6, latent(5)),
    "HunyuanVideo": (hunyuan_video, latent(2, (2, 1))),
    "EasyAnimate": (magvit, latent(3)),
    "Mochi": (mochi, latent(2, channels=12)),
    "AutoencoderKL": (kl, draw(2, 4, 6, 4)),
    "VQModel": (vq, draw(2, 4, 6, 4)),
}
ENCODED = {  # models and videos
    "CogVideoX": (cogvideox, video(9)),
    "KVAE": (kvae_video, video(9)),
    "HunyuanVideo": (hunyuan_video, video(5, (16, 16))),
    "EasyAnimate": (magvit, video(5, (16, 16))),
    "Mochi": (mochi, video(6, (16, 16))),
}


def decode(model, z):
    return model.decode(z).sample


def encode(model, x):
    return model.encode(x).latent_dist.mean


def gradients(model, run, x, layers):
    """Train these layers only: return the output, and the gradients of each layer in one vector.

    A layer's bias may have no gradient, where a norm subtracts it.
    """
    model.requires_grad_(False)
    for name in layers:
        model.get_submodule(name).requires_grad_(True)
    out = run(model, x)
    out.square().sum().backward()
    found = {name: [p.grad.flatten() for p in model.get_submodule(name).parameters()] for name in layers}
    model.zero_grad()
    return out.detach(), {name: torch.cat(grads) for name, grads in found.items()}


def assert_trains_as_diffusers(model, run, x, choices):
    """choices: for each training, the names of its layers."""
    model = model.double()
    ours = copy.deepcopy(model)
    assert accelerate(ours).replaced
    expected, expected_gradients = gradients(model, run, x.double(), {name for layers in choices for name in layers})
    for layers in choices:
        out, found = gradients(ours, run, x.double(), layers)
        assert_same([out, *found.values()], [expected, *(expected_gradients[name] for name in layers)], slack=100)


def convolutions(model, part):
    kinds = (nn.Conv2d, nn.Conv3d)
    names = [name for name, layer in model.named_modules() if isinstance(layer, kinds) and CONVOLUTIONS.search(f".{name}")]
    names = [[name] for name in names if name.startswith(part)]
    assert len(names) > 3
    return names


@pytest.mark.parametrize("name", DECODED)
def test_one_convolution_of_a_decoder(name):
    build, z = DECODED[name]
    model = build()
    assert_trains_as_diffusers(model, decode, z, convolutions(model, "decoder."))


@pytest.mark.parametrize("name", ENCODED)
def test_one_convolution_of_an_encoder(name):
    build, x = ENCODED[name]
    model = build()
    assert_trains_as_diffusers(model, encode, x, convolutions(model, "encoder."))


@pytest.mark.parametrize("kinds", [("conv1",), ("conv2",), ("conv1", "conv2")])
@pytest.mark.parametrize("run, inputs", [(decode, latent(3)), (decode, latent(9)), (encode, video(9)), (encode, video(33))])
def test_the_convolutions_of_all_blocks_of_kvae(run, inputs, kinds):
    """With frozen norms, which may write behind the cached frames of later segments. One segment, and several."""
    model = kvae_video()
    part = "decoder." if run is decode else "encoder."
    blocks = [name for name, layer in model.named_modules() if hasattr(layer, "conv1") and name.startswith(part)]
    layers = [f"{block}.{kind}.conv" for block in blocks for kind in kinds]
    assert_trains_as_diffusers(model, run, inputs, [layers])


def kvae_segments(block, segments, zq):
    norm = lambda: {"norm": {"mean": None, "var": None}, "add_conv": {"padding": None}}
    cache = {"norm1": norm(), "norm2": norm(), "conv1": {"padding": None}, "conv2": {"padding": None}}
    return [block(x, None, cache, zq) for x in segments]


def kandinsky6_segments(block, segments, zq):
    cache = block.make_cache()
    return [block(x, cache, zq) for x in segments]


def cogvideox_segments(block, segments, zq):
    outs, cache = [], None
    for x in segments:
        out, cache = block(x, None, zq, cache)
        outs.append(out)
    return outs


BLOCKS = {
    "KVAE": (lambda: kvae_video().decoder.mid.block_1, kvae_segments),
    "Kandinsky 6": (lambda: kandinsky6().decoder.mid.block_1, kandinsky6_segments),
    "CogVideoX": (lambda: cogvideox().decoder.mid_block.resnets[0], cogvideox_segments),
}


@pytest.mark.parametrize("recorded", range(3))
@pytest.mark.parametrize("name", BLOCKS)
def test_a_frozen_block_passes_gradients_through_its_cache(name, recorded):
    """Only one segment needs gradients: it gets those of later segments, too, which see it as cached frames."""
    build, run = BLOCKS[name]
    block = build().double().requires_grad_(False)
    segments = [draw(1, block.in_channels, frames, 4, 6, dtype=torch.float64, seed=frames) for frames in (3, 4, 2)]
    segments[recorded].requires_grad_()
    results = []
    for change in (lambda block: None, accelerate):
        change(block)
        outs = run(block, segments, latent(2, dtype=torch.float64))
        results.append([*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), segments[recorded])])
    assert_same(results[1], results[0])
