"""The last norm and SiLU of encoders and decoders of clips, against diffusers' own, in float64."""

import copy

import pytest
import torch
from accelerated_models import assert_equal, assert_same
from torch import nn
from video_models import allegro, cogvideox, draw, hunyuan_video, magvit, mochi, temporal_decoder

from movq_ext import accelerate, restore

F64 = torch.float64


def clip(channels, frames, size=(4, 4)):
    return draw(1, channels, frames, *size, dtype=F64)


CASES = {
    "CogVideoX's decoder": (cogvideox, "decoder", (clip(4, 3),)),
    "CogVideoX's encoder": (cogvideox, "encoder", (clip(3, 5, (16, 16)),)),
    "HunyuanVideo's decoder": (hunyuan_video, "decoder", (clip(4, 2, (1, 2)),)),
    "HunyuanVideo's encoder": (hunyuan_video, "encoder", (clip(3, 5, (8, 8)),)),
    "Magvit's decoder": (magvit, "decoder", (clip(4, 2),)),
    "Magvit's encoder": (magvit, "encoder", (clip(3, 3, (8, 8)),)),
    "Magvit's decoder over time": (lambda: magvit(spatial_group_norm=False), "decoder", (clip(4, 2),)),
    "Mochi's encoder": (mochi, "encoder", (clip(3, 4),)),
    "Allegro's decoder": (allegro, "decoder", (clip(4, 2),)),
    "Allegro's encoder": (allegro, "encoder", (clip(3, 4),)),
    "Stable Video Diffusion's decoder": (temporal_decoder, "decoder", (draw(4, 4, 4, 4, dtype=F64), torch.zeros(2, 2), 2)),
}
every_case = pytest.mark.parametrize("name", CASES)


def case(name):
    build, part, inputs = CASES[name]
    return getattr(build(), part).double(), inputs


def first(out):
    return out[0] if isinstance(out, tuple) else out


def run(module, inputs):
    """Return the result from empty caches: EasyAnimate's convolutions hold theirs."""
    for layer in module.modules():
        if hasattr(layer, "_clear_conv_cache"):
            layer._clear_conv_cache()
    return first(module(*inputs))


@every_case
def test_results_and_gradients(name):
    module, (x, *others) = case(name)
    x = x.requires_grad_()
    names, attributes, results = list(module.state_dict()), set(vars(module)), []
    for change in (lambda module: None, accelerate):
        report = change(module)
        out = run(module, (x, *others))
        # In groups of one channel, biases before a norm have no gradient.
        gradients = torch.autograd.grad(out.square().sum(), [x, *last_layers(module)[0].parameters()])
        with torch.no_grad():
            results.append([out, run(module, (x, *others)), *gradients])
    assert_same(results[1], results[0], slack=100)
    count = report.calls()[type(module).__name__]
    assert (count.accelerated, count.original) == (2, 0)
    assert list(module.state_dict()) == names and set(vars(module)) == attributes
    restore(module)
    with torch.no_grad():
        assert_equal([run(module, (x, *others))], [results[0][1]])


def last_layers(module):
    norm, activation = (getattr(module, names[0], None) or getattr(module, names[1]) for names in (
        ("conv_norm_out", "norm_out"), ("conv_act", "nonlinearity")))  # fmt: skip
    return norm, activation


@every_case
@torch.no_grad()
def test_the_activation_is_not_a_pass_of_its_own(name, monkeypatch):
    module, inputs = case(name)
    _, activation = last_layers(module)
    called, forward = [], nn.SiLU.forward
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: called.append(self) or forward(self, x))
    run(module, inputs)
    assert any(layer is activation for layer in called)
    accelerate(module)
    called.clear()
    run(module, inputs)
    assert all(layer is not activation for layer in called)


@pytest.mark.parametrize("hooked", [0, 1])
@every_case
@torch.no_grad()
def test_hooked_layers_are_called(name, hooked):
    module, inputs = case(name)
    expected, seen = run(module, inputs), []
    last_layers(module)[hooked].register_forward_hook(lambda layer, inputs, out: seen.append(out) or None)
    report = accelerate(module)
    assert_same([run(module, inputs)], [expected], slack=100)
    calls = report.calls()
    assert len(seen) == 1 and calls.get(type(module).__name__) is None
    assert report.skipped[type(module).__name__].endswith("is hooked or patched")


@torch.no_grad()
def test_hooks_set_later_see_both_layers():
    module, inputs = case("HunyuanVideo's decoder")
    report = accelerate(module)
    expected, seen = run(module, inputs), []
    hooks = [layer.register_forward_hook(lambda layer, inputs, out: seen.append(out)) for layer in last_layers(module)]
    assert_same([run(module, inputs)], [expected])
    assert_same([seen[1]], [nn.functional.silu(seen[0])])
    for hook in hooks:
        hook.remove()
    run(module, inputs)
    count = report.calls()["HunyuanVideoDecoder3D"]
    assert (count.accelerated, count.original) == (2, 1) and len(seen) == 2


@torch.no_grad()
def test_another_activation_is_left_to_diffusers():
    module = magvit(act_fn="mish").decoder
    assert accelerate(module).skipped["EasyAnimateDecoder"] == "its activation is Mish, not SiLU"


@torch.no_grad()
def test_another_norm_is_left_to_diffusers():
    module, _ = case("HunyuanVideo's decoder")
    module.conv_norm_out = nn.InstanceNorm3d(32)
    report = accelerate(module)
    assert report.skipped["HunyuanVideoDecoder3D"] == "its conv_norm_out is InstanceNorm3d, which has no operator"


def test_gradient_checkpointing():
    module, (x,) = case("HunyuanVideo's decoder")
    results = []
    for change in (lambda module: None, accelerate):
        change(module)
        for checkpointing in (False, True):
            module.train()
            module.gradient_checkpointing = checkpointing
            module._gradient_checkpointing_func = lambda f, *args: torch.utils.checkpoint.checkpoint(
                f, *args, use_reentrant=False
            )
            out = module(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), last_layers(module)[0].parameters())])
    for other in results[1:]:
        assert_same(other, results[0], slack=100)


@torch.no_grad()
def test_compiled_and_copied():
    module, inputs = case("Mochi's encoder")
    expected = run(module, inputs)
    accelerate(module)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert_same([first(compiled(*inputs)), run(copy.deepcopy(module), inputs)], [expected] * 2)
