"""Accelerated parts with layers that were replaced, patched or hooked, before or after."""

import pytest
import torch
from accelerated_models import Counted, assert_equal, assert_same, kl, outputs, vq
from models import offload, quantise
from tolerances import relative_error
from torch import nn

from movq_ext import accelerate, restore
from movq_ext.diffusers.accelerated import Accelerated


class Doubled(nn.Conv2d):
    """A stand-in for LoRA or a quantised layer."""

    def forward(self, x):
        return 2 * super().forward(x)


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replace_layer(parent, name, kind):
    layer = getattr(parent, name)
    new = kind.__new__(kind)
    new.__dict__ = layer.__dict__
    setattr(parent, name, new)


@pytest.mark.parametrize("accelerate_first", [True, False])
@torch.no_grad()
def test_replaced_layers_are_called(accelerate_first):
    model = vq()
    plain = outputs(model)
    if accelerate_first:
        accelerate(model)
    block, attention = model.decoder.mid_block.resnets[0], model.decoder.mid_block.attentions[0]
    for parent, name, kind in (
        (block, "conv1", Doubled), (block, "conv2", Doubled), (block.norm1, "conv_y", Doubled),
        (attention, "to_q", DoubledLinear), (attention.to_out, "0", DoubledLinear),
        (model.decoder.up_blocks[0].upsamplers[0], "conv", Doubled), (model.encoder.mid_block.resnets[0], "conv2", Doubled),
    ):  # fmt: skip
        replace_layer(parent, name, kind)
    if not accelerate_first:
        accelerate(model)
    ours = outputs(model)
    restore(model)
    theirs = outputs(model)
    assert_same(ours, theirs)
    assert relative_error(theirs[0], plain[0]) > 1e-2 and relative_error(theirs[1], plain[1]) > 1e-2


@pytest.mark.parametrize("kind", ["Conv2d", "GroupNorm", "SpatialNorm", "SiLU", "Linear", "ResnetBlockCondNorm2D", "Attention"])
@pytest.mark.parametrize("accelerate_first", [True, False])
@torch.no_grad()
def test_hooks_see_what_they_see_in_diffusers(kind, accelerate_first):
    model = vq()
    seen = []

    def hook(module, inputs, output):
        seen.append((names[module], inputs[0].shape, output.shape))

    names = {module: name for name, module in model.named_modules() if type(module).__name__ == kind}
    if accelerate_first:
        accelerate(model)
    for module in names:
        module.register_forward_hook(hook)
    if not accelerate_first:
        accelerate(model)
    outputs_ours = outputs(model)
    ours = list(seen)
    seen.clear()
    restore(model)
    assert_same(outputs_ours, outputs(model))
    assert seen == ours and len(seen) >= len(names) > 1


@pytest.mark.parametrize("accelerate_first", [True, False])
@torch.no_grad()
def test_layerwise_casting(accelerate_first):
    """diffusers stores weights in a smaller dtype, and converts them in a forward that it sets on most layers."""
    model = kl()
    if accelerate_first:
        accelerate(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    if not accelerate_first:
        accelerate(model)
    with Counted() as counted:
        ours = outputs(model)
    assert counted.calls[:2] == (sum(isinstance(m, nn.GroupNorm) for m in model.modules()), 2)
    restore(model)
    assert_same(ours, outputs(model))


@torch.no_grad()
def test_a_forward_set_on_the_instance():
    model = kl()
    expected = outputs(model)
    block = model.decoder.mid_block.resnets[0]
    block.forward = block.forward
    report = accelerate(model)
    assert report.skipped == {"decoder.mid_block.resnets.0": "its forward was replaced (by offloading, or a patch)"}
    restore(model)
    del block.forward
    accelerate(model)
    for module in model.modules():  # as offloading does to save the original forward
        if isinstance(module, Accelerated):
            module.forward = module.forward
    with Counted() as counted:
        assert_same(outputs(model), expected)
    assert min(counted.calls) > 0
    assert accelerate(model).skipped == {}
    restore(model)
    assert_equal(outputs(model), expected)


@pytest.mark.parametrize("accelerate_first", [True, False])
@pytest.mark.parametrize("make", [vq, kl])
@torch.no_grad()
def test_quantised_weights_are_left_to_their_layers(make, accelerate_first):
    """For the product of the queries, keys and values, and for every convolution that is computed without calling it."""
    model, doubled = make(), make()
    for layer in doubled.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.weight.mul_(2)
    expected = outputs(doubled)
    if accelerate_first:
        accelerate(model)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            quantise(layer)
    if not accelerate_first:
        accelerate(model)
    assert_same(outputs(model), expected)


@pytest.mark.parametrize("accelerate_first", [True, False])
@torch.no_grad()
def test_torchao(accelerate_first):
    quantization = pytest.importorskip("torchao.quantization")
    model = kl()
    if accelerate_first:
        accelerate(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if not accelerate_first:
        accelerate(model)
    with Counted() as counted:
        ours = outputs(model)
    assert counted.calls[1] == 2
    restore(model)
    assert_same(ours, outputs(model))


@pytest.mark.parametrize("accelerate_first", [True, False])
@pytest.mark.parametrize("targets", [["to_q", "to_v", "to_out.0"], ["conv1", "conv2", "conv"], ["conv_y"], ["post_quant_conv"]])
@torch.no_grad()
def test_lora(targets, accelerate_first):
    peft = pytest.importorskip("peft")
    model = vq()
    if accelerate_first:
        accelerate(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
    if not accelerate_first:
        accelerate(model)
    ours = outputs(model)
    restore(model)
    assert_same(ours, outputs(model))


@pytest.mark.parametrize("accelerate_first", [True, False])
@pytest.mark.parametrize("make", [vq, kl])
@torch.no_grad()
def test_offloaded_layers(make, accelerate_first):
    """As accelerate's cpu_offload and diffusers' group offloading do by leaf: every layer with parameters has a hook."""
    model = make()
    expected = outputs(model)
    if accelerate_first:
        accelerate(model)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
            offload(layer)
    if not accelerate_first:
        report = accelerate(model)
        assert report.replaced == {}
        assert {reason.split()[-1] for reason in report.skipped.values()} <= {"patched", "patch)", "3x3"}
    assert_same(outputs(model), expected)


def test_restoring_starts_a_new_count():
    model = vq()
    accelerate(model)
    outputs(model)
    restore(model)
    assert not any(call.accelerated or call.original for call in accelerate(model).calls().values())
