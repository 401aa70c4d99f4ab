"""CogVideoX's autoencoder with Winograd convolutions of its clips, against diffusers' own in float64."""

import copy
from unittest import mock

import pytest
import torch
from tolerances import RELATIVE, relative_error
from video_models import cogvideox, latent, video

from movq_ext import accelerate, restore
from movq_ext.diffusers import causal_convolution
from movq_ext.ops import winograd_clips


@pytest.fixture
def convolutions(monkeypatch):
    """Convolve small and narrow clips so, too. The Winograd convolutions that ran."""
    monkeypatch.setattr(winograd_clips, "MIN_PIXELS", 1)
    monkeypatch.setattr(winograd_clips, "winograd_is_faster", lambda weight, *_: weight.shape[2:] == (3, 3))
    spy = mock.Mock(wraps=winograd_clips.convolve_clip)
    monkeypatch.setattr(causal_convolution, "convolve_clip", spy)
    return spy


def run(model, z, x):
    return model.decode(z).sample, model.encode(x).latent_dist.mean


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@torch.no_grad()
def test_an_autoencoder(frames, layout, convolutions):
    """One or several batches of frames, with caches from one to the next."""
    model, z, x = cogvideox(), latent(frames, batch=2), video(4 * frames - 3, batch=2)
    exact = run(copy.deepcopy(model).double(), z.double(), x.double())
    theirs = run(model, z, x)
    report = accelerate(model)
    ours = run(model, *(t.contiguous(memory_format=layout) for t in (z, x)))
    assert convolutions.call_count > 20 and all(not count.original for count in report.calls().values())
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert relative_error(our, true) < 1.5 * relative_error(their, true) + RELATIVE[torch.float32]
    restore(model)
    assert all(map(torch.equal, run(model, z, x), theirs))


@torch.no_grad()
def test_slicing_and_tiling(convolutions):
    model, z = cogvideox(), latent(5, size=(5, 7), batch=2)
    for change in (model.enable_slicing, lambda: model.enable_tiling(tile_sample_min_height=12, tile_sample_min_width=16)):
        change()
        theirs = model.decode(z).sample
        accelerate(model)
        assert relative_error(model.decode(z).sample, theirs) < 10 * RELATIVE[torch.float32]
        restore(model)
    assert convolutions.call_count > 20


def test_gradients_take_conv3d(convolutions):
    model, z = cogvideox(), latent(3)
    accelerate(model)
    model.decode(z.requires_grad_()).sample.sum().backward()
    assert z.grad is not None and not convolutions.called
    model.requires_grad_(False).decode(z.detach())
    assert convolutions.called


@torch.no_grad()
def test_changed_convolutions_are_called(convolutions):
    """Hooked ones, and those that repeat the border."""
    model, z = cogvideox(), latent(3)
    accelerate(model)
    model.decode(z)
    expected = convolutions.call_count
    conv = model.decoder.mid_block.resnets[0].conv1.conv
    conv.register_forward_hook(lambda layer, inputs, out: 2 * out)
    ours = model.decode(z).sample
    assert 0 < convolutions.call_count - expected < expected
    restore(model)
    assert relative_error(ours, model.decode(z).sample) < 10 * RELATIVE[torch.float32]
