"""Causal convolutions that repeat the border, and EasyAnimate's, against diffusers' own, in float64, over several clips."""

import copy

import pytest
import torch
from accelerated_models import assert_same
from tolerances import RELATIVE, relative_error
from torch import nn
from video_models import draw, hunyuan_video, kvae_video, latent, magvit, mochi, video

from movq_ext import accelerate, restore
from movq_ext.diffusers import replicated_border

F64 = torch.float64
KERNELS = [(3, 3, 3), (3, 1, 1), (2, 3, 3), (1, 3, 3)]


def kvae(kernel=(3, 3, 3), **changes):
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_kvae_video")
    torch.manual_seed(0)
    return module.KVAECachedCausalConv3d(4, 6, kernel, **changes).double()


def hunyuan(kernel=(3, 3, 3), **changes):
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video")
    torch.manual_seed(0)
    return module.HunyuanVideoCausalConv3d(4, 6, kernel, **changes).double()


def cogvideox(kernel=(3, 3, 3), **changes):
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_cogvideox")
    torch.manual_seed(0)
    return module.CogVideoXCausalConv3d(4, 6, kernel, pad_mode="replicate", **changes).double()


def easyanimate(kernel=(3, 3, 3), **changes):
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_magvit")
    torch.manual_seed(0)
    return module.EasyAnimateCausalConv3d(4, 6, kernel, **changes).double()


def clip(frames, size=(5, 6), batch=2, seed=1):
    return draw(batch, 4, frames, *size, dtype=F64, seed=seed)


WHOLE_CLIPS = [(hunyuan, (1, 1, 1)), (hunyuan, (3, 3, 3)), *((cogvideox, kernel) for kernel in KERNELS)]


def same_and_counted(conv, run, accelerated, original=0):
    """Compare the results of run(conv) with diffusers', and the calls."""
    expected = run(copy.deepcopy(conv))
    report = accelerate(conv)
    assert_same(run(conv), expected)
    count = report.calls()[type(conv).__name__]
    assert (count.accelerated, count.original) == (accelerated, original)


@pytest.mark.parametrize("size", [(5, 6), (1, 1), (2, 1)])
@pytest.mark.parametrize("frames", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "build, kernel", [(hunyuan, (3, 3, 3)), (hunyuan, (1, 1, 1)), *((cogvideox, kernel) for kernel in KERNELS)]
)
def test_a_whole_clip(build, kernel, frames, size):
    def run(conv):
        x = clip(frames, size).requires_grad_()
        out = conv(x)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.square().sum(), [x, *conv.parameters()])]

    same_and_counted(build(kernel), run, 1)


@pytest.mark.parametrize("frames", [2, 3, 5])
@pytest.mark.parametrize("kernel", KERNELS[:3])
def test_segments_of_a_clip(kernel, frames):
    """KVAE's caches hold what diffusers' hold."""

    def run(conv):
        xs = [clip(frames, seed=seed).requires_grad_() for seed in (1, 2, 3)]
        cache, results = {"padding": None}, []
        for x in xs:
            results += [conv(x, cache), cache["padding"]]
            padding = cache["padding"]
            assert padding.untyped_storage().nbytes() == padding.nbytes, "a cache must not hold the clip"
        loss = sum(out.square().sum() for out in results[::2])
        return [*results, *torch.autograd.grad(loss, [*xs, *conv.parameters()])]

    same_and_counted(kvae(kernel), run, 3)


@torch.no_grad()
def test_an_image():
    def run(conv):
        cache = {"padding": None}
        return [conv(clip(1), cache), cache["padding"]]

    same_and_counted(kvae(), run, 1)


@torch.no_grad()
def test_segments_may_change_from_one_implementation_to_the_other():
    conv, cache, expected = kvae(), {"padding": None}, {"padding": None}
    for change in (accelerate, restore, accelerate):
        restore(conv)
        theirs = conv(clip(3), expected)
        change(conv)
        assert_same([conv(clip(3), cache), cache["padding"]], [theirs, expected["padding"]])


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (2, 3, 3)])
def test_easyanimates_convolution_keeps_its_frames(kernel, frames, monkeypatch):
    def run(conv):
        xs = [clip(frames, seed=seed).requires_grad_() for seed in (1, 2)]
        conv._clear_conv_cache()
        results = []
        for x in xs:
            results += [conv(x), conv.prev_features]
        return [*results, *torch.autograd.grad(results[2].square().sum(), [*xs, *conv.parameters()])]

    same_and_counted(easyanimate(kernel), run, 2)


@torch.no_grad()
def test_easyanimates_frames_are_convolved_at_once(monkeypatch):
    conv, calls, conv3d = easyanimate(), [], torch.nn.functional.conv3d
    accelerate(conv)
    conv(clip(5))
    monkeypatch.setattr(torch.nn.functional, "conv3d", lambda x, *args, **kw: calls.append(x.shape[2]) or conv3d(x, *args, **kw))
    conv(clip(5))
    assert calls == [7]


def spy(function, shapes):
    def call(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return function(x, *args, **kwargs)

    return call


@pytest.mark.parametrize("build", [kvae, hunyuan, cogvideox])
@torch.no_grad()
def test_clips_are_not_padded_in_space(build, monkeypatch):
    conv, x, shapes = build(), clip(4, (8, 9)), []
    accelerate(conv)
    for name in ("conv3d", "pad"):
        function = getattr(torch.nn.functional, name)
        monkeypatch.setattr(
            torch.nn.functional,
            name,
            lambda x, *args, function=function, **kw: shapes.append(x.shape) or function(x, *args, **kw),
        )
    conv(x, {"padding": None}) if build is kvae else conv(x)
    clips = [shape for shape in shapes if len(shape) == 5 and shape[2] > 2]  # a cache of two frames is padded
    assert clips and all(shape[2:] in ((3, 8, 9), (4, 8, 9)) for shape in clips)


@torch.no_grad()
def test_small_frames_are_left_to_diffusers(monkeypatch):
    monkeypatch.setattr(replicated_border, "MIN_PIXELS_FIRST", 60)
    monkeypatch.setattr(replicated_border, "MIN_PIXELS_LATER", 120)

    def run(size):
        def segments(conv):
            cache = {"padding": None}
            return [conv(clip(3, size), cache), conv(clip(3, size), cache), cache["padding"]]

        return segments

    same_and_counted(kvae(), run((5, 5)), 0, 2)
    same_and_counted(kvae(), run((5, 6)), 1, 1)  # two clips of 30 pixels
    same_and_counted(kvae(), run((6, 10)), 2)


@torch.no_grad()
def test_a_cache_of_one_frame_fails_as_in_diffusers():
    """A first segment of one frame leaves one."""
    conv = kvae()
    for change in (restore, accelerate):
        change(conv)
        cache = {"padding": None}
        conv(clip(1), cache)
        with pytest.raises(RuntimeError):
            conv(clip(2), cache)


@torch.no_grad()
def test_float32():
    conv, x = kvae().float(), clip(4).float()
    expected, theirs = (c(t, {"padding": None}) for c, t in ((copy.deepcopy(conv).double(), x.double()), (conv, x)))
    accelerate(conv)
    assert relative_error(conv(x, {"padding": None}), expected) < 1.5 * relative_error(theirs, expected)


@torch.no_grad()
def test_16_bits_and_autocast_are_left_to_diffusers():
    run = lambda conv: [conv(clip(4).to(conv.conv.weight.dtype), {"padding": None})]
    same_and_counted(kvae().bfloat16(), run, 0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        same_and_counted(kvae().float(), run, 0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_easyanimate_in_16_bits_is_as_exact_as_diffusers(dtype):
    """An image: the taps that fall on its repetitions are not added, since their sums would be rounded."""
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_magvit")
    torch.manual_seed(0)
    conv, x = module.EasyAnimateCausalConv3d(64, 8, 3).to(dtype), draw(1, 64, 1, 16, 16, dtype=dtype)
    expected, theirs = copy.deepcopy(conv).double()(x.double()), copy.deepcopy(conv)(x)
    accelerate(conv)
    assert relative_error(conv(x), expected) < 1.05 * relative_error(theirs, expected)


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
@torch.no_grad()
def test_patches_of_all_convolutions_reach_easyanimates(name, monkeypatch):
    conv, original = easyanimate(), getattr(nn.Conv3d, name)
    report = accelerate(conv)
    monkeypatch.setattr(nn.Conv3d, name, lambda *args: 2 * original(*args))
    ours = conv(clip(3))
    restore(conv)
    conv._clear_conv_cache()
    assert_same([ours], [conv(clip(3))])
    assert report.calls()["EasyAnimateCausalConv3d"].original == 1


@torch.no_grad()
def test_a_compiled_convolution():
    conv, x = hunyuan(), clip(3)
    expected = conv(x)
    accelerate(conv)
    torch.compiler.reset()
    assert_same([torch.compile(conv, fullgraph=True, backend="eager")(x)], [expected])


class Quantised(torch.Tensor):
    pass


def test_convolutions_that_are_left_have_a_reason():
    replaced, hooked = kvae(), hunyuan()
    replaced.conv = nn.Sequential(replaced.conv)
    hooked.conv.register_forward_hook(lambda *_: None)
    patched, quantised = easyanimate(), easyanimate()
    patched._conv_forward = patched._conv_forward
    quantised.weight = nn.Parameter(quantised.weight.detach().as_subclass(Quantised))
    for conv, reason in (
        (kvae(stride=(2, 1, 1)), "it skips frames or pixels"),
        (replaced, "its convolution is replaced, hooked or not 1x1 or 3x3 in space"),
        (hooked, "its convolution is replaced, hooked or not 1x1 or 3x3 in space"),
        (hunyuan(pad_mode="constant"), "its pad_mode is constant"),
        (hunyuan((2, 3, 3)), "its padding does not fit its kernel"),
        (easyanimate(stride=(2, 1, 1)), "it skips frames or pixels"),
        (patched, "its convolution is patched"),
        (quantised, "its parameters are tensor subclasses"),
        (easyanimate(dilation=2), "its kernel is dilated, grouped, or not padded with zeros"),
    ):
        assert set(accelerate(conv).skipped.values()) == {reason}


@torch.no_grad()
def test_convolutions_hooked_later_are_called():
    conv, seen = kvae(), []
    report = accelerate(conv)
    expected = conv(clip(3), {"padding": None})
    conv.conv.register_forward_hook(lambda *_: seen.append(1))
    assert_same([conv(clip(3), {"padding": None})], [expected])
    assert seen and report.calls()["KVAECachedCausalConv3d"].original == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_kvae(checkpointing):
    """Checkpointing computes a block again with the cache that it left, in diffusers too, so its gradients differ from others.

    Those of SpatialNorm's convolutions are left out: the second time, diffusers resizes the latent in another way.
    """
    model, z, results = kvae_video().double().train(), latent(3, size=(4, 5), dtype=F64).requires_grad_(), []
    if checkpointing:
        model.enable_gradient_checkpointing()
    weights = [p for name, p in model.decoder.named_parameters() if name.endswith("conv.weight") or ".conv_" not in name]
    for change in (lambda model: None, accelerate):
        report = change(model)
        out = model.decode(z).sample
        gradients = torch.autograd.grad(out.square().sum(), [z, *weights], allow_unused=True)
        # One vector: biases before norms have no gradient except rounding.
        results.append([out, torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])])
    assert_same(results[1], results[0], slack=100)
    assert report.calls()["decoder.mid.block_1.conv1"].accelerated == 1 + checkpointing


@torch.no_grad()
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_hunyuan_videos_latent_has_diffusers_layout(dtype):
    model, x = hunyuan_video().to(dtype), video(5, (16, 16), batch=2, dtype=dtype)
    theirs = model.encode(x).latent_dist.mean
    accelerate(model)
    ours = model.encode(x).latent_dist.mean
    assert ours.stride() == theirs.stride()
    assert relative_error(ours, theirs) < 100 * RELATIVE[dtype]


MODELS = {"KVAE": kvae_video, "HunyuanVideo": hunyuan_video, "EasyAnimate": magvit, "Mochi": mochi}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_whole_models(name):
    """Every convolution of the decoder that keeps the number of frames and pixels is computed here."""
    model = MODELS[name]().double()
    z = latent(3, channels=12 if name == "Mochi" else 4, dtype=F64)
    theirs = model.decode(z).sample
    report = accelerate(model)
    assert_same([model.decode(z).sample], [theirs], slack=100)
    counts = [count for part, count in report.calls().items() if part.startswith("decoder.") and "conv" in part.split(".")[-1]]
    assert len(counts) > 5 and all(count.original == 0 < count.accelerated for count in counts)
