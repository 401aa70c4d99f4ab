"""The video autoencoders of KVAE and Kandinsky 6 against diffusers' own, in float64, over several segments."""

import copy

import pytest
import torch
from accelerated_models import SLACK, assert_same
from spies import record_calls
from tolerances import RELATIVE, assert_close, relative_error
from torch import nn
from video_models import HeldTensors, assert_hooked_tensors_stay, draw, kandinsky6, kvae_video, latent, video

from movq_ext import accelerate, restore
from movq_ext.diffusers import replicated_border
from movq_ext.ops import upsampling

MODELS = {"KVAE": kvae_video, "Kandinsky 6": kandinsky6}
SERVED = {
    "KVAE": {"KVAECachedResnetBlock3D", "KVAECachedSpatialNorm3D", "KVAECachedPXSUpsample", "KVAECachedCausalConv3d"},
    "Kandinsky 6": {
        "Kandinsky6SRSpatialNorm3D",
        "Kandinsky6SRResnetBlock3D",
        "Kandinsky6SRCausalConv3d",
        "Kandinsky6SRUpsample",
    },
}
every_model = pytest.mark.parametrize("name", MODELS)


def decode(model, z):
    return model.decode(z).sample


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.frames = layer, []

    def forward(self, x, cache):
        self.frames.append(x.shape[2])
        return self.layer(x, cache)


def wrap(block):
    block.conv2 = Wrapper(block.conv2)
    return block.conv2.frames


def hook(block):
    frames = []
    block.conv2.register_forward_pre_hook(lambda layer, args: frames.append(args[0].shape[2]))
    return frames


def patch_convolution(block):
    plain, frames = block.conv2.conv._conv_forward, []
    block.conv2.conv._conv_forward = lambda x, weight, bias: frames.append(x.shape[2]) or plain(x, weight, bias)
    return frames


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
    assert ours.shape == theirs.shape
    for part, count in report.calls().items():
        assert not count.original and (count.accelerated > 0) == part.startswith("decoder."), part
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


@every_model
@torch.no_grad()
def test_autocast(name):
    """Every block and upsampling has the dtype that it has in diffusers."""
    model, z, outputs = MODELS[name](), latent(5), []
    for layer in model.decoder.modules():
        if type(layer).__name__ in SERVED[name] and hasattr(layer, "linear" if "Upsample" in type(layer).__name__ else "norm2"):
            layer.register_forward_hook(lambda layer, inputs, out: outputs.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = [decode(model, z), *outputs]
        outputs.clear()
        report = accelerate(model)
        ours = [decode(model, z), *outputs]
    assert [out.dtype for out in ours] == [out.dtype for out in theirs] and len(ours) > 5
    assert relative_error(ours[0], theirs[0]) < SLACK * RELATIVE[torch.bfloat16]
    left = {part for part, count in report.calls().items() if count.original}
    assert left <= set(report.replaced.get("KVAECachedCausalConv3d", ()))  # see test_diffusers_replicated_border.py


@torch.no_grad()
def test_hooked_tensors_are_not_overwritten():
    model = kandinsky6()
    accelerate(model)
    assert_hooked_tensors_stay(model, latent(3))


@pytest.mark.parametrize("path", ["", ".norm1", ".norm1.conv_y", ".conv1", ".conv1.conv", ".norm2", ".conv2"])
@torch.no_grad()
def test_hooked_tensors_of_later_segments_are_not_overwritten(path):
    model, z = kvae_video(), latent(9)
    expected = decode(model, z)
    accelerate(model)
    hooks = HeldTensors(model.decoder.get_submodule(f"mid.block_1{path}"))
    assert_close(decode(model, z), expected.double(), slack=10)
    assert hooks.release() > 2


@torch.no_grad()
def test_norms_of_later_segments_write_behind_the_cached_frames(monkeypatch):
    """No block concatenates a segment with them."""
    model, z = kvae_video(), latent(9)
    accelerate(model)
    describe = lambda out, conv, x, before, padded: (conv, before is not None, padded is not None)
    calls = record_calls(monkeypatch, replicated_border, "convolve_replicating", describe)
    out = decode(model, z)
    blocks = [layer for layer in model.decoder.modules() if type(layer).__name__ == "KVAECachedResnetBlock3D"]
    of_blocks = {layer.conv for block in blocks for layer in (block.conv1, block.conv2)}
    segments = sum(conv is blocks[0].conv1.conv for conv, _, _ in calls)
    assert segments > 1 and blocks
    assert sum(is_later for conv, is_later, _ in calls if conv in of_blocks) == (segments - 1) * len(of_blocks)
    assert all(is_later == is_written for conv, is_later, is_written in calls if conv in of_blocks)
    monkeypatch.setattr(replicated_border.KVAECachedCausalConv3d, "room_behind_cache", lambda *_: None)
    assert relative_error(decode(model, z), out.double()) < RELATIVE[torch.float32]


@pytest.mark.parametrize("change, expected_frames", [(hook, [5, 4]), (wrap, [5, 4]), (patch_convolution, [4, 5, 4, 4])])
@torch.no_grad()
def test_blocks_call_convolutions_that_others_changed(change, expected_frames):
    """They see each segment without the cached frames; a patched convolution sees what diffusers passes it."""
    model, z = kvae_video(), latent(9)
    expected = decode(model, z)
    accelerate(model)
    frames = change(model.decoder.mid.block_1)
    assert_close(decode(model, z), expected.double(), slack=10)
    assert frames == expected_frames


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
        "KVAE": {
            "it skips frames or pixels",
            "the SiLU after its last norm is a function in its forward",
        },
        "Kandinsky 6": {
            "its norms are not conditioned on a latent",
            "it takes every other frame",
            "the SiLU after its last norm is a function in its forward",
        },
    }
    assert set(accelerate(MODELS[name]()).skipped.values()) == reasons[name]


@pytest.mark.parametrize("path", ["decoder", "encoder", "decoder.mid.block_1"])
@every_model
def test_subclasses_are_reported(name, path):
    model = MODELS[name]()
    part = model.get_submodule(path)
    base, part.__class__ = type(part), type("Mine", (type(part),), {})
    assert accelerate(model).skipped[path] == f"its class is Mine, a subclass of {base.__name__}"


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
def test_the_result_of_another_norm_layer_is_not_overwritten():
    kandinsky = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kandinsky6_sr")
    norm, f, zq = kandinsky.Kandinsky6SRSpatialNorm3D(8, 4), draw(1, 8, 3, 4, 4), latent(2, size=(2, 2))
    norm.norm_layer = torch.nn.Identity()
    before, expected = f.clone(), norm(f, zq, norm.make_cache())
    accelerate(norm)
    assert_same([norm(f, zq, norm.make_cache())], [expected])
    assert torch.equal(f, before)


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


# Convolutions and upsampling


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (2, 1, 1), (3, 3, 1)])
@torch.no_grad()
def test_causal_convolutions_of_kandinsky_6(kernel, frames):
    kandinsky = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kandinsky6_sr")
    torch.manual_seed(0)
    conv, x = kandinsky.Kandinsky6SRCausalConv3d(4, 6, kernel).double(), draw(2, 4, frames, 5, 6, dtype=torch.float64)
    results = []
    for change in (lambda conv: None, accelerate):
        change(conv)
        cache = conv.make_cache()
        first = conv(x, cache)
        left = cache["padding"]
        results.append([first, left, conv(x, cache), cache["padding"]])
    assert_same(results[1], results[0])
    assert results[1][1].untyped_storage().nbytes() == results[1][1].nbytes, "a cache must not hold the clip"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("compress_time", [False, True])
def test_upsampling(compress_time, layout):
    kandinsky = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kandinsky6_sr")
    kvae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_kvae_video")
    torch.manual_seed(0)
    x = draw(2, 4, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    for layer in (kvae.KVAECachedPXSUpsample(4, compress_time), kandinsky.Kandinsky6SRUpsample(4, compress_time)):
        layer.double()
        results = []
        for change in (lambda layer: None, accelerate):
            report = change(layer)
            cache = layer.make_cache() if hasattr(layer, "make_cache") else {"padding": None}
            first, second = layer(x, cache), layer(x, cache)
            results.append([first, second, *torch.autograd.grad(second.square().sum(), [x, *layer.parameters()])])
        assert_same(results[1], results[0])
        assert report.calls()[type(layer).__name__].accelerated == 2


@torch.no_grad()
def test_small_frames_are_left_to_diffusers(monkeypatch):
    kandinsky = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kandinsky6_sr")
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS", 512)
    kvae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_kvae_video")
    for layer in (kandinsky.Kandinsky6SRUpsample(4, False), kvae.KVAECachedPXSUpsample(4, False)):
        report = accelerate(layer)
        for size, accelerated in (((1, 1, 7, 73), 0), ((1, 1, 2, 256), 1), ((1, 4, 2, 63), 1), ((2, 4, 2, 32), 2)):
            layer(draw(size[0], 4, *size[1:]), {})  # all frames of the batch share the folded weights
            assert report.calls()[type(layer).__name__].accelerated == accelerated, size
