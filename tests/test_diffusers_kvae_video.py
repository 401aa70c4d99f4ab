"""The video autoencoders of KVAE and Kandinsky 6 against diffusers' own, in float64, over several segments."""

import copy

import pytest
import torch
from accelerated_models import assert_same
from tolerances import RELATIVE, assert_close, relative_error
from video_models import draw, kandinsky6, kvae_video, latent, video

from movq_ext import accelerate, restore

MODELS = {"KVAE": kvae_video, "Kandinsky 6": kandinsky6}
SERVED = {
    "KVAE": {"KVAECachedResnetBlock3D", "KVAECachedSpatialNorm3D"},
    "Kandinsky 6": {"Kandinsky6SRSpatialNorm3D"},
}
every_model = pytest.mark.parametrize("name", MODELS)


def decode(model, z):
    return model.decode(z).sample


def encode(model, x):
    return model.encode(x).latent_dist.mean


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6, 9])
@every_model
@torch.no_grad()
def test_decode(name, frames):
    model, z = MODELS[name](), latent(frames)
    expected = decode(copy.deepcopy(model).double(), z.double())
    theirs = decode(model, z)
    report = accelerate(model)
    assert set(report.replaced) == SERVED[name]
    ours = decode(model, z)
    assert ours.shape == theirs.shape and all(not count.original for count in report.calls().values())
    assert relative_error(ours, expected) < 1.5 * relative_error(theirs, expected) + RELATIVE[torch.float32]
    restore(model)
    assert torch.equal(decode(model, z), theirs)


@pytest.mark.parametrize("frames", [5, 17, 33])
@every_model
@torch.no_grad()
def test_encode(name, frames):
    model, x = MODELS[name](), video(frames)
    expected = encode(copy.deepcopy(model).double(), x.double())
    accelerate(model)
    assert_close(encode(model, x), expected, slack=10)


@every_model
def test_gradients(name):
    changes = {"KVAE": dict(ch=64), "Kandinsky 6": {}}  # in groups of one channel, biases before a norm have no gradient
    model, z, results = MODELS[name](**changes[name]).double(), latent(5, dtype=torch.float64).requires_grad_(), []
    for change in (lambda model: None, accelerate):
        change(model)
        out = decode(model, z)
        results.append([out, *torch.autograd.grad(out.square().sum(), [z, *model.decoder.parameters()])])
    assert_same(results[1], results[0], slack=100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_model
@torch.no_grad()
def test_half_precision(name, dtype):
    model, z = MODELS[name]().to(dtype), latent(5, dtype=dtype)
    expected, theirs = decode(copy.deepcopy(model).double(), z.double()), decode(model, z)
    accelerate(model)
    ours = decode(model, z)
    assert ours.dtype == dtype
    assert relative_error(ours, expected) < 1.5 * relative_error(theirs, expected)


@torch.no_grad()
def test_compiled():
    torch.compiler.reset()
    zq = latent(2)
    for part, x, call in (
        (kvae_video().decoder.mid.block_1, draw(1, 32, 3, 4, 4), lambda part, x, zq: part(x, None, kvae_cache(), zq)),
        (kandinsky6().decoder.norm_out, draw(1, 4, 3, 4, 4), lambda part, x, zq: part(x, zq, {"is_first_segment": True})),
    ):
        expected = call(part, x, zq)
        accelerate(part)
        assert_same([torch.compile(call, fullgraph=True, backend="eager")(part, x, zq)], [expected])


def kvae_cache():
    norm = lambda: {"norm": {"mean": None, "var": None}, "add_conv": {"padding": None}}
    return {"norm1": norm(), "norm2": norm(), "conv1": {"padding": None}, "conv2": {"padding": None}}


@every_model
@torch.no_grad()
def test_unserved_parts_are_reported(name):
    reasons = {
        "KVAE": {"it repeats the border in space too", "its convolution reflects the border"},
        "Kandinsky 6": {"its cache holds padded frames", "it convolves what it upsamples once more"},
    }
    assert set(accelerate(MODELS[name]()).skipped.values()) == reasons[name]


@pytest.mark.parametrize("frames", [(1, 1), (5, 2), (5, 1), (4, 2), (3, 3)])
@torch.no_grad()
def test_a_norm_of_the_first_and_of_later_segments(frames):
    kandinsky = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kandinsky6_sr")
    kvae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_kvae_video")
    f, zq = draw(2, 32, frames[0], 6, 8, dtype=torch.float64), draw(2, 4, frames[1], 3, 4, dtype=torch.float64)
    for norm, empty in (
        (kvae.KVAECachedSpatialNorm3D(32, 4), {"norm": {"mean": None, "var": None}, "add_conv": {"padding": None}}),
        (kandinsky.Kandinsky6SRSpatialNorm3D(32, 4), {"is_first_segment": True}),
    ):
        norm.double()
        results, caches = [], []
        for change in (lambda norm: None, accelerate):
            change(norm)
            caches.append(copy.deepcopy(empty))
            results.append([norm(f, zq, caches[-1]), norm(f, zq, caches[-1])])
        assert_same(results[1], results[0])
        assert caches[0] == caches[1] != empty


@torch.no_grad()
def test_a_norm_that_convolves_the_resized_latent_is_left_to_diffusers():
    kvae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_kvae_video")
    norm = kvae.KVAECachedSpatialNorm3D(32, 4, add_conv=True)
    assert accelerate(norm).skipped["KVAECachedSpatialNorm3D"] == "it convolves the resized latent"


@torch.no_grad()
def test_hooked_norms_are_called():
    model, z, seen = kvae_video(), latent(3), []
    model.decoder.mid.block_1.norm1.register_forward_hook(lambda *_: seen.append(1))
    theirs = decode(model, z)
    accelerate(model)
    assert_same([decode(model, z)], [theirs])
    assert len(seen) == 2
