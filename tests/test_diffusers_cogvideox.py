"""CogVideoX's autoencoder against diffusers' own, in float64: results, gradients, caches and everything that users switch on."""

import copy

import pytest
import torch
from accelerated_models import assert_same, diffusers
from tolerances import RELATIVE, assert_close, relative_error
from torch import nn
from video_models import assert_hooked_tensors_stay, cogvideox, draw, latent, video

from movq_ext import accelerate, restore
from movq_ext.diffusers import causal_convolution, norms
from movq_ext.diffusers import cogvideox as parts
from movq_ext.ops import cpu_upsampling, upsampling

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
F64 = torch.float64


def decode(model, z):
    return model.decode(z).sample


def encode(model, x):
    return model.encode(x).latent_dist.mean


def in_layout(model, layout):
    """Lay out the weights of the 3-D convolutions: ``model.to(memory_format=...)`` refuses models that have 2-D ones too."""
    for parameter in model.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model


def accelerated(model):
    """Check that every part is replaced, and return a function that tells how many calls diffusers computed."""
    report = accelerate(model)
    assert not report.skipped
    return lambda: sum(count.original for count in report.calls().values())


def reference(run, model, *inputs):
    return run(copy.deepcopy(model).double(), *(x.double() for x in inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 7])
@torch.no_grad()
def test_decode(frames, layout):
    """One or several batches of frames, with caches from one to the next."""
    model = in_layout(cogvideox(), layout)
    z = latent(frames, batch=2)
    expected = reference(decode, model, z)
    theirs = decode(model, z)
    left = accelerated(model)
    ours = decode(model, z.contiguous(memory_format=layout))
    assert left() == 0 and ours.shape == theirs.shape
    assert relative_error(ours, expected) < 1.5 * relative_error(theirs, expected) + RELATIVE[torch.float32]
    restore(model)
    assert torch.equal(decode(model, z), theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [1, 5, 8, 9, 17])
@torch.no_grad()
def test_encode(frames, layout):
    model = in_layout(cogvideox(), layout)
    x = video(frames)
    expected = reference(encode, model, x)
    left = accelerated(model)
    assert_close(encode(model, x.contiguous(memory_format=layout)), expected, slack=10)
    assert left() == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frames", [1, 3, 4, 5])
def test_gradients(frames, checkpointing):
    model = cogvideox().double()
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    z, results = latent(frames, dtype=F64).requires_grad_(), []
    for change in (lambda model: None, accelerate):
        change(model)
        model.zero_grad()
        out = decode(model, z)
        (dz,) = torch.autograd.grad(out.square().sum(), z, retain_graph=True)
        out.square().sum().backward()
        results.append([out, dz, *(p.grad for p in model.decoder.parameters())])
    assert_same(results[1], results[0], slack=100)


def test_gradients_of_the_encoder():
    model, x, results = cogvideox().double(), video(9, dtype=F64).requires_grad_(), []
    for change in (lambda model: None, accelerate):
        change(model)
        out = encode(model, x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.encoder.parameters()])])
    assert_same(results[1], results[0], slack=100)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_caches_are_those_of_diffusers(layout):
    """Batches may change from one implementation to the other: all frames that are read are in the cache."""
    model = in_layout(cogvideox().double(), layout)
    z = latent(5, dtype=F64).contiguous(memory_format=layout)
    first, cache = model.decoder(z[:, :, :3])
    second, last_cache = model.decoder(z[:, :, 3:], conv_cache=cache)
    accelerate(model)
    ours, our_cache = model.decoder(z[:, :, :3])
    assert_close(ours, first, slack=10)
    kinds = check_caches(our_cache, cache)
    assert kinds == {torch.Tensor, type(None)}
    for given in (cache, our_cache):
        before = copy.deepcopy(given)
        ours, our_last_cache = model.decoder(z[:, :, 3:], conv_cache=given)
        assert_close(ours, second, slack=10)
        check_caches(our_last_cache, last_cache)
        check_caches(given, before)
    restore(model)
    assert_close(model.decoder(z[:, :, 3:], conv_cache=our_cache)[0], second, slack=10)


def check_caches(ours, theirs, name=""):
    """The same keys and frames; those of 1x1x1 convolutions, which are never read, may be None. Returns the types seen."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        return set().union(*(check_caches(ours[key], theirs[key], key) for key in theirs))
    if ours is None:
        assert name in ("conv_y", "conv_b")
    else:
        assert_close(ours, theirs, slack=10)
        assert ours.untyped_storage().nbytes() == ours.numel() * ours.itemsize, "a cache must not hold the clip"
    return {type(ours)}


@torch.no_grad()
def test_slicing_tiling_and_batches_of_frames():
    model = cogvideox()
    z, x = latent(5, size=(5, 7), batch=2), video(9, size=(20, 28), batch=2)
    settings = [
        lambda: model.enable_slicing(),
        lambda: model.enable_tiling(tile_sample_min_height=12, tile_sample_min_width=16),
        lambda: setattr(model, "num_latent_frames_batch_size", 3),
        lambda: setattr(model, "num_latent_frames_batch_size", 1),
    ]
    for change in settings:
        change()
        theirs = decode(model, z), encode(model, x)
        accelerated(model)
        assert_same((decode(model, z), encode(model, x)), theirs)
        restore(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype):
    model = cogvideox().to(dtype)
    z = latent(5, dtype=dtype)
    expected = reference(decode, model, z)
    theirs = decode(model, z)
    left = accelerated(model)
    ours = decode(model, z)
    assert ours.dtype == dtype and left() == 0
    assert relative_error(ours, expected) < 1.5 * relative_error(theirs, expected)


@torch.no_grad()
def test_autocast():
    model, z = cogvideox(), latent(5)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = decode(model, z)
        accelerate(model)
        assert_same([decode(model, z)], [theirs])


@pytest.mark.parametrize("name", ["1x1x1 shortcut", "without a latent"])
@torch.no_grad()
def test_a_float32_block_under_autocast(name):
    layer, x = block(**BLOCKS[name]).float(), draw(1, 8, 3, 4, 6)
    zq, results = None if name == "without a latent" else draw(1, 4, 2, 2, 3), []
    for change in (lambda layer: None, accelerate):
        change(layer)
        with torch.autocast("cpu", torch.bfloat16):
            first, cache = layer(x, None, zq)
            second, last = layer(x, None, zq, conv_cache=cache)
        results.append([first, second, *(cache[name] for cache in (cache, last) for name in ("conv1", "conv2"))])
    assert_same(results[1], results[0], slack=2)


@torch.no_grad()
def test_compiled():
    model, z = cogvideox(), latent(5)
    theirs = decode(model, z)
    accelerate(model)
    torch.compiler.reset()
    assert_same([torch.compile(decode, fullgraph=True, backend="eager")(model, z)], [theirs])


@torch.no_grad()
def test_copies_and_files(tmp_path):
    model, z = cogvideox(), latent(3)
    theirs = decode(model, z)
    accelerate(model)
    assert_same([decode(copy.deepcopy(model), z)], [theirs])
    model.save_pretrained(tmp_path)
    assert torch.equal(decode(diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path), z), theirs)


def block(**changes):
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D

    torch.manual_seed(0)
    arguments = dict(in_channels=8, out_channels=12, groups=4, temb_channels=0, spatial_norm_dim=4)
    return CogVideoXResnetBlock3D(**{**arguments, **changes}).double().eval()


BLOCKS = {
    "1x1x1 shortcut": {},
    "3x3x3 shortcut": dict(conv_shortcut=True),
    "time embedding": dict(temb_channels=6),
    "dropout": dict(dropout=0.5),
    "without a latent": dict(spatial_norm_dim=None),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("train", [False, True])
@torch.no_grad()
def test_blocks(name, train):
    layer = block(**BLOCKS[name]).train(train)
    x, zq = draw(2, 8, 3, 4, 6, dtype=F64), draw(2, 4, 2, 2, 3, dtype=F64)
    temb = draw(2, 6, dtype=F64) if "temb_channels" in BLOCKS[name] else None
    zq = None if name == "without a latent" else zq
    before, results = x.clone(), []
    for change in (lambda layer: None, accelerate):
        change(layer)
        torch.manual_seed(0)
        first, cache = layer(x, temb, zq)
        results.append((first, layer(x, temb, zq, conv_cache=cache)[0]))
    assert_same(results[1], results[0])
    assert torch.equal(x, before)


class Adapter(nn.Module):
    """A layer around a convolution, as LoRA's, that keeps its last result."""

    def __init__(self, conv):
        super().__init__()
        self.base_layer, self.results = conv, []

    def forward(self, x):
        out = 2 * self.base_layer(x)
        self.results.append((out, out.clone()))
        return out


@torch.no_grad()
def test_hooked_tensors_are_not_overwritten():
    model = cogvideox(block_out_channels=(8, 8), down_block_types=("CogVideoXDownBlock3D",) * 2,
                      up_block_types=("CogVideoXUpBlock3D",) * 2)  # fmt: skip
    accelerate(model)
    assert_hooked_tensors_stay(model, latent(5))


@torch.no_grad()
def test_hooks_and_adapters_see_every_call():
    model, z = cogvideox(), latent(5)
    seen = []
    up = model.decoder.up_blocks
    adapters = []
    for conv in (up[0].resnets[0].conv1, up[0].resnets[1].conv2, up[1].resnets[0].norm1.conv_y):
        conv.conv = Adapter(conv.conv)
        adapters.append(conv.conv)
    up[0].resnets[0].norm1.register_forward_hook(lambda *_: seen.append("norm"))
    up[0].resnets[1].conv1.conv.register_forward_hook(lambda layer, inputs, out: 2 * out)
    up[1].resnets[0].conv2.register_forward_hook(lambda layer, inputs, out: (2 * out[0], out[1]))
    up[1].upsamplers[0].conv.register_forward_hook(lambda layer, inputs, out: 2 * out)
    theirs, calls = decode(model, z), len(seen)
    accelerate(model)
    assert_same([decode(model, z)], [theirs])
    assert len(seen) == 2 * calls > 0
    assert {len(adapter.results) for adapter in adapters} == {2 * calls}
    assert all(torch.equal(*result) for adapter in adapters for result in adapter.results)


@pytest.mark.parametrize(("frames", "batches"), [(3, 1), (5, 2)])
@torch.no_grad()
def test_parts_inside_a_block_are_counted(frames, batches):
    model = cogvideox()
    report = accelerate(model)
    decode(model, latent(frames))
    for name, count in report.calls().items():
        assert (count.accelerated, count.original) == (batches if name.startswith("decoder") else 0, 0), name
    encode(model, video(9))
    assert all(count.accelerated > 0 == count.original for count in report.calls().values())


@torch.no_grad()
def test_calls_of_a_restored_part_are_not_counted():
    layer, x, zq = block(), draw(1, 8, 3, 4, 6, dtype=F64), draw(1, 4, 2, 2, 3, dtype=F64)
    report = accelerate(layer)
    restore(layer.norm1)
    layer(x, None, zq)
    accelerate(layer)
    calls = accelerate(layer).calls()
    assert (calls["norm1"].accelerated, calls["norm2"].accelerated) == (0, 1) == (0, report.calls()["conv1"].accelerated)


# The norm, the convolution and the upsampling alone


@torch.no_grad()
def test_the_norm_never_resizes_the_latent_to_the_map(monkeypatch):
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

    norm, sizes = CogVideoXSpatialNorm3D(8, 4, groups=4).double(), []
    f, zq = draw(1, 8, 5, 8, 8, dtype=F64), draw(1, 4, 2, 2, 2, dtype=F64)
    expected, _ = norm(f, zq)
    accelerate(norm)
    for conv in (norm.conv_y.conv, norm.conv_b.conv):
        monkeypatch.setattr(type(conv), "forward", lambda self, x: sizes.append(x.shape) or nn.Conv3d.forward(self, x))
    out, cache = norm(f, zq)
    assert_close(out, expected)
    assert cache == {"conv_y": None, "conv_b": None} and sizes == [zq.shape] * 2


def causal(**changes):
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d

    torch.manual_seed(0)
    return CogVideoXCausalConv3d(**{**dict(in_channels=3, out_channels=5, kernel_size=3), **changes}).double()


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_repeated_frames_are_not_convolved(taps, frames, monkeypatch):
    conv, x = causal(kernel_size=(taps, 3, 3)), draw(2, 3, frames, 4, 5, dtype=F64).requires_grad_()
    results, sizes = [], []
    for change in (lambda conv: None, accelerate):
        change(conv)
        out, cache = conv(x)
        results.append([out, cache, *torch.autograd.grad(out.square().sum(), [x, *conv.parameters()])])
    assert_same(results[1], results[0])
    monkeypatch.setattr(torch.nn.functional, "conv3d", spy(torch.nn.functional.conv3d, sizes))
    conv(x)
    assert [size[2] for size in sizes] == [*range(1, min(taps - 1, frames) + 1), *([frames] if frames >= taps else [])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_16_bits_are_as_exact_as_diffusers(dtype):
    """The taps that fall on repeated frames are not added, since their sums would be rounded."""
    module, x = causal(in_channels=64).to(dtype), draw(1, 64, 1, 32, 32, dtype=dtype)
    expected, theirs = copy.deepcopy(module).double()(x.double())[0], copy.deepcopy(module)(x)[0]
    accelerate(module)
    assert relative_error(module(x)[0], expected) < 1.05 * relative_error(theirs, expected)


@torch.no_grad()
def test_small_frames_are_padded(monkeypatch):
    monkeypatch.setattr(causal_convolution, "MIN_PIXELS", 21)
    conv, sizes = causal(), []
    accelerate(conv)
    monkeypatch.setattr(torch.nn.functional, "conv3d", spy(torch.nn.functional.conv3d, sizes))
    for size, convolutions in (((4, 5), [6]), ((3, 7), [1, 2, 4])):
        sizes.clear()
        conv(draw(1, 3, 4, *size, dtype=F64))
        assert [size[2] for size in sizes] == convolutions


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_later_batches_are_normalised_in_the_convolutions_input(layout, monkeypatch):
    """No concatenation of whole clips: the norm writes behind the cache."""
    layer = in_layout(block(out_channels=8).float(), layout)
    x, zq = draw(1, 8, 4, 8, 8).contiguous(memory_format=layout), draw(1, 4, 2, 4, 4)
    _, cache = layer(x, None, zq)
    expected, their_cache = layer(x, None, zq, conv_cache=cache)
    accelerate(layer)
    joined, original = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, *args, **kw: joined.append(tensors) or original(tensors, *args, **kw))
    out, our_cache = layer(x, None, zq, conv_cache=cache)
    assert joined == []
    assert_same([out, our_cache["conv1"], our_cache["conv2"]], [expected, their_cache["conv1"], their_cache["conv2"]])
    assert out.stride() == expected.stride()


@torch.no_grad()
def test_memory_is_on_the_clips_device():
    """Whatever the default device."""
    layer = block(out_channels=8).float()
    x, zq = draw(1, 8, 4, 8, 8), draw(1, 4, 2, 4, 4)
    _, cache = layer(x, None, zq)
    expected = layer(x, None, zq, conv_cache=cache)[0]
    accelerate(layer)
    with torch.device("meta"):
        out = layer(x, None, zq, conv_cache=cache)[0]
    assert_same([out], [expected])


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("part", ["conv1", "conv2"])
@torch.no_grad()
def test_a_cache_of_another_length_fails_as_in_diffusers(part, frames):
    layer = block(out_channels=8).float()
    x, zq = draw(1, 8, 4, 8, 8), draw(1, 4, 2, 4, 4)
    _, cache = layer(x, None, zq)
    cache[part] = draw(1, 8, frames, 8, 8)
    for change in (lambda layer: None, accelerate):
        change(layer)
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            layer(x, None, zq, conv_cache=cache)


@torch.no_grad()
def test_a_cache_of_one_frame_shortens_the_clip_as_in_diffusers():
    layer = block(out_channels=8).float()
    x, zq = draw(1, 8, 2, 8, 8), draw(1, 4, 2, 4, 4)
    _, cache = layer(x, None, zq)
    cache["conv2"] = draw(1, 8, 1, 8, 8)
    expected, expected_cache = layer(x, None, zq, conv_cache=cache)
    accelerate(layer)
    out, new_cache = layer(x, None, zq, conv_cache=cache)
    assert_same([out, new_cache["conv2"]], [expected, expected_cache["conv2"]])


@torch.no_grad()
def test_a_cache_of_another_batch_fails_as_in_diffusers():
    layer = block(out_channels=8).float()
    x, zq = draw(2, 8, 4, 8, 8), draw(2, 4, 2, 4, 4)
    _, cache = layer(x[:1], None, zq[:1])
    for change in (lambda layer: None, accelerate):
        change(layer)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer(x, None, zq, conv_cache=cache)


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("compress_time", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_upsampling(frames, compress_time, folds, monkeypatch):
    from diffusers.models.upsampling import CogVideoXUpsample3D

    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS", 1 if folds else 1000)
    torch.manual_seed(0)
    layer, results = CogVideoXUpsample3D(4, 6, compress_time=compress_time).double(), []
    for layout in LAYOUTS:
        x = draw(2, 4, frames, 3, 5, dtype=F64).contiguous(memory_format=layout).requires_grad_()
        for change in (restore, accelerate):
            change(layer)
            out = layer(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
        assert out.is_contiguous(memory_format=layout)
        assert_same(results[-1], results[-2])


@torch.no_grad()
def test_frames_are_convolved_before_they_are_repeated(monkeypatch):
    from diffusers.models.upsampling import CogVideoXUpsample3D

    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS", 1000)
    layer, sizes = CogVideoXUpsample3D(4, 6, compress_time=True), []
    accelerate(layer)
    monkeypatch.setattr(torch.nn.functional, "interpolate", spy(torch.nn.functional.interpolate, sizes))
    layer(draw(1, 4, 3, 3, 5))
    assert [size for size in sizes if size[1] == 4] == [(3, 4, 3, 5)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compress_time", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 5, 6])
@torch.no_grad()
def test_frames_are_upsampled_a_part_at_a_time(frames, compress_time, layout, monkeypatch):
    """In inference on a CPU: as many frames as have a minimum of pixels."""
    from diffusers.models.upsampling import CogVideoXUpsample3D

    torch.manual_seed(0)
    layer, sizes = CogVideoXUpsample3D(4, 6, compress_time=compress_time).double(), []
    x = draw(2, 4, frames, 3, 5, dtype=F64).contiguous(memory_format=layout)
    expected = layer(x)
    accelerate(layer)
    monkeypatch.setattr(parts, "MIN_PART_PIXELS", 31)  # two frames of 15 pixels of two clips
    monkeypatch.setattr(torch.nn.functional, "conv_transpose2d", spy(torch.nn.functional.conv_transpose2d, sizes))
    out = layer(x)
    assert_same([out], [expected])
    assert out.is_contiguous(memory_format=layout)
    assert [size[0] for size in sizes] == {1: [2], 2: [4], 5: [4, 6], 6: [4, 4, 4]}[frames]


@torch.no_grad()
def test_weights_are_folded_once_for_all_parts(monkeypatch):
    from diffusers.models.upsampling import CogVideoXUpsample3D

    torch.manual_seed(0)
    layer, x, folded = CogVideoXUpsample3D(4, 6).double(), draw(1, 4, 8, 8, 16, dtype=F64), []
    expected = layer(x)
    accelerate(layer)
    monkeypatch.setattr(parts, "MIN_PART_PIXELS", 256)
    for module in (cpu_upsampling, upsampling):
        monkeypatch.setattr(module, "fold_upsampling", spy(upsampling.fold_upsampling, folded))
    assert_same([layer(x)], [expected])
    assert folded == [(6, 4, 3, 3)]


def spy(function, shapes):
    def call(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return function(x, *args, **kwargs)

    return call


def test_a_memory_of_the_result_is_given_in_inference_only():
    x = torch.randn(1, 4, 2, 3, 3)
    assert norms.can_normalise_into(x) and not norms.can_normalise_into(x.half())
    assert not norms.can_normalise_into(x.clone().requires_grad_())
    assert not norms.can_normalise_into(x, x.double())
    with torch.autocast("cpu", torch.bfloat16):  # a convolution of the latent changes its dtype
        assert not norms.can_normalise_into(x)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_narrow_clips_are_convolved_frame_by_frame(layout, taps, monkeypatch):
    """Of these PyTorch's conv3d takes no oneDNN on a CPU."""
    monkeypatch.setattr(causal_convolution, "MIN_MULTIPLICATIONS", 0)
    x, weight, bias = draw(1, 4, 5, 6, 7), draw(3, 4, taps, 3, 3), draw(3)
    x, padding = x.contiguous(memory_format=layout), (0, 1, 1)
    assert causal_convolution.is_slow_as_conv3d(x, weight, padding)
    tensors, results = [t.requires_grad_() for t in (x, weight, bias)], []
    for convolve in (torch.nn.functional.conv3d, causal_convolution.convolve):
        given = [t.double() for t in tensors] if convolve is torch.nn.functional.conv3d else tensors
        out = convolve(*given, padding=padding)
        results.append([out.float(), *torch.autograd.grad(out.square().sum(), tensors)])
    assert_same(results[1], results[0])
    assert results[1][0].is_contiguous(memory_format=layout)
    monkeypatch.setattr(torch.nn.functional, "conv3d", None)
    causal_convolution.convolve(x, weight, bias, padding)


@pytest.mark.parametrize(("batch", "channels", "height", "dtype"), [(1, 512, 12, torch.float32), (1, 4, 6, F64)])
def test_wide_clips_and_other_types_are_convolved_at_once(batch, channels, height, dtype, monkeypatch):
    monkeypatch.setattr(causal_convolution, "MIN_MULTIPLICATIONS", 0)
    x, weight = draw(batch, channels, 4, height, 2, dtype=dtype), draw(1, channels, 3, 3, 3, dtype=dtype)
    assert not causal_convolution.is_slow_as_conv3d(x, weight, (0, 1, 1))


# Frames of the result, and of the inputs of its parts, which must be at least four frames not to be narrow.
@pytest.mark.parametrize(("frames", "inputs"), [(1, [3]), (2, [4]), (3, [5]), (4, [4, 4]), (7, [4, 4, 5])])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_wide_clips_are_convolved_in_parts_that_are_not_narrow(layout, frames, inputs, monkeypatch):
    monkeypatch.setattr(causal_convolution, "MIN_PART_CHANNELS", 3)
    monkeypatch.setattr(causal_convolution, "MIN_PART_PIXELS", 1)
    monkeypatch.setattr(causal_convolution, "MAX_NARROW", 4 * 4 * 6 - 1)
    x, weight, bias, padding, sizes = draw(2, 4, 2 + frames, 6, 7), draw(3, 4, 3, 3, 3), draw(3), (0, 1, 1), []
    x, conv3d = x.contiguous(memory_format=layout), torch.nn.functional.conv3d
    expected = conv3d(x, weight, bias, padding=padding)
    monkeypatch.setattr(torch.nn.functional, "conv3d", spy(conv3d, sizes))
    out = causal_convolution.convolve(x, weight, bias, padding)
    assert_same([out], [expected])
    assert out.is_contiguous(memory_format=layout)
    assert [size[2] for size in sizes] == inputs


@pytest.mark.parametrize(
    "pixels, channels, inputs",
    [(2 * 42, 3, [3] * 7), (2 * 42 + 1, 3, [4, 4, 5]), (6 * 42, 3, [5, 6]), (8 * 42, 3, [9]), (2 * 42, 4, [9])],
)
@torch.no_grad()
def test_parts_have_a_minimum_of_pixels_and_channels(pixels, channels, inputs, monkeypatch):
    """Frames have 2 * 42 pixels, and the result three channels."""
    monkeypatch.setattr(causal_convolution, "MIN_PART_PIXELS", pixels)
    monkeypatch.setattr(causal_convolution, "MIN_PART_CHANNELS", channels)
    monkeypatch.setattr(causal_convolution, "MAX_NARROW", 1)
    x, weight, sizes, conv3d = draw(2, 4, 9, 6, 7), draw(3, 4, 3, 3, 3), [], torch.nn.functional.conv3d
    expected = conv3d(x, weight, padding=(0, 1, 1))
    monkeypatch.setattr(torch.nn.functional, "conv3d", spy(conv3d, sizes))
    assert_same([causal_convolution.convolve(x, weight, None, (0, 1, 1))], [expected])
    assert [size[2] for size in sizes] == inputs


# Widths of published models: 7 frames are the first segment of 9 without those that are folded.
@pytest.mark.parametrize("frames", [3, 4, 7, 8])
@pytest.mark.parametrize("shape", [(32, 200, 64), (64, 100, 100), (128, 48, 96), (256, 24, 48), (512, 12, 16)])
@torch.no_grad()
def test_pytorch_takes_onednn_for_every_part(shape, frames, monkeypatch):
    channels, height, width = shape
    monkeypatch.setattr(causal_convolution, "clip_winograd_is_faster", lambda *_: False)  # no Winograd convolution
    backends, internal, padding = [], torch._C, (0, 1, 1)
    x, weight = torch.empty(1, channels, 2 + frames, height, width), torch.empty(64, channels, 3, 3, 3)

    def conv3d(x, weight, bias, padding):
        backends.append(internal._select_conv_backend(x, weight, bias, [1] * 3, list(padding), [1] * 3, False, [0] * 3, 1))
        return torch.empty(1, 64, x.shape[2] - 2, *x.shape[3:])

    conv3d(x, weight, None, padding)
    if backends != [internal._ConvBackend.Mkldnn]:
        pytest.skip("PyTorch convolves the whole clip without oneDNN")
    backends.clear()
    monkeypatch.setattr(torch.nn.functional, "conv3d", conv3d)
    causal_convolution.convolve(x, weight, None, padding)
    assert set(backends) == {internal._ConvBackend.Mkldnn}
