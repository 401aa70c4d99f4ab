"""Decoders and encoders of AutoencoderKL and VQModel whose layers others replaced or hooked, against diffusers' own."""

import copy

import pytest
import torch
from accelerated_models import assert_same, decode, encode, kl, latents, levels, vq
from torch import nn

from movq_ext import accelerate, restore

WIDTHS = (128, 128)  # blocks of 28x24 pixels run in strips


class Recorder(nn.Module):
    """Calls a layer, and records how it was called."""

    def __init__(self, layer, calls):
        super().__init__()
        self.layer, self.calls = layer, calls

    def forward(self, *args, **kwargs):
        self.calls.append(description(args, kwargs))
        return self.layer(*args, **kwargs)


def description(args, kwargs):
    return [arg if arg is None else arg.shape for arg in args], sorted(kwargs)


def wrap(model, path, calls):
    model.set_submodule(path, Recorder(model.get_submodule(path), calls))


def hook(model, path, calls):
    record = lambda layer, args, kwargs: calls.append(description(args, kwargs))
    model.get_submodule(path).register_forward_pre_hook(record, with_kwargs=True)


def subclass(model, path, calls):
    layer = model.get_submodule(path)
    original = getattr(type(layer), "diffusers_class", type(layer))

    def forward(self, *args, **kwargs):
        calls.append(description(args, kwargs))
        return super(kind, self).forward(*args, **kwargs)

    kind = type("Subclass", (original,), {"forward": forward})
    layer.__class__ = kind


BUILD = {"AutoencoderKL": lambda **config: kl(**levels(False, False), **config), "VQModel": vq}
every_model = pytest.mark.parametrize("name", BUILD)
LAYERS = [
    "conv_in", "mid_block", "mid_block.resnets.0", "mid_block.attentions.0", "{}_blocks.0", "{}_blocks.1",
    "{}_blocks.1.resnets.0", "{}_blocks.1.resnets.0.conv1", "conv_norm_out", "conv_act", "conv_out",
]  # fmt: skip
LAYERS_IN_STRIPS = ["mid_block", "mid_block.resnets.0", "{}_blocks.1.resnets.0.conv1", "conv_out"]


def run(model, size=(14, 12)):
    x = torch.randn(1, 3, *(2 * n for n in size), generator=torch.Generator().manual_seed(0))
    return decode(model, latents(model, 1, size)), encode(model, x)


@pytest.mark.parametrize(
    "widths, size, layers",
    [
        (WIDTHS, (14, 12), LAYERS_IN_STRIPS),
        ((32, 64), (6, 4), LAYERS),
    ],
    ids=["in strips", "narrow"],
)
@pytest.mark.parametrize("accelerate_first", [True, False])
@pytest.mark.parametrize("change", [wrap, hook, subclass])
@every_model
@torch.no_grad()
def test_changed_layers_are_called_as_in_diffusers(name, change, accelerate_first, widths, size, layers):
    """As often, with the same arguments."""
    model = BUILD[name](block_out_channels=widths)
    for path in layers:
        changed, calls = copy.deepcopy(model), []
        if accelerate_first:
            report = accelerate(changed)
        for coder, *names in coders(changed):
            change(coder, path.format(*names), calls)
        if not accelerate_first:
            report = accelerate(changed)
        ours, our_calls = run(changed, size), calls.copy()
        calls.clear()
        restore(changed)
        assert_same(ours, run(changed, size))
        assert calls == our_calls and calls, path
        assert_counted(report.calls(), fused=path not in ("conv_norm_out", "conv_act"))


def coders(model):
    return (model.decoder, "up", "up"), (model.encoder, "down", "down")


def assert_counted(calls, fused):
    for name in ("decoder", "encoder"):
        count = calls.get(name)
        assert count is None or (count.accelerated, count.original) == (fused, not fused)


@torch.no_grad()
def test_changed_blocks_may_take_views():
    """So where a block is wrapped or hooked, maps are in diffusers' layout."""
    model = kl(block_out_channels=WIDTHS)
    accelerate(model)
    expected, shapes = run(model), []
    for coder, *_ in coders(model):
        coder.mid_block.resnets[0].register_forward_pre_hook(lambda layer, args: shapes.append(args[0].view(-1).shape))
    assert_same(run(model), expected)
    assert len(shapes) == 2


@pytest.mark.parametrize("path", ["mid_block", "up_blocks.0"])
@every_model
@torch.no_grad()
def test_hooks_may_unpack_the_latent(name, path):
    model = BUILD[name]()
    accelerate(model)
    expected = run(model)
    model.decoder.get_submodule(path).register_forward_pre_hook(lambda layer, args: (args[0] * 2, args[1]))
    model.decoder.get_submodule(path).register_forward_pre_hook(lambda layer, args: (args[0] / 2, args[1]))
    assert_same(run(model), expected)


@every_model
@torch.no_grad()
def test_blocks_with_another_signature(name):
    class Block(nn.Module):
        def forward(self, sample, latent):
            return block(sample, latent)

    model = BUILD[name]()
    expected, block = run(model), model.decoder.up_blocks[1]
    accelerate(model)
    model.decoder.up_blocks[1] = Block()
    assert_same(run(model), expected)


@every_model
def test_gradients_with_wrapped_blocks(name):
    model, gradients = BUILD[name](), []
    for coder, *names in coders(model):
        for path in ("mid_block", "{}_blocks.1"):
            wrap(coder, path.format(*names), [])
    for change in (lambda model: None, accelerate):
        change(model)
        weights = [model.decoder.conv_in.weight, model.encoder.conv_in.weight]
        gradients.append(torch.autograd.grad(sum(out.square().mean() for out in run(model)), weights))
    assert_same(*gradients, slack=100)


@every_model
@torch.no_grad()
def test_no_blocks(name):
    model = BUILD[name](block_out_channels=(128, 128))
    model.decoder.up_blocks = model.encoder.down_blocks = nn.ModuleList()
    expected = run(model)
    report = accelerate(model)
    assert_same(run(model), expected)
    assert_counted(report.calls(), fused=True)


@every_model
@torch.no_grad()
def test_without_a_middle_block_the_error_is_that_of_diffusers(name):
    model = BUILD[name](block_out_channels=WIDTHS)
    model.decoder.mid_block = model.encoder.mid_block = None
    accelerate(model)
    for coder, channels in ((model.decoder, 4), (model.encoder, 3)):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            coder(torch.zeros(1, channels, 8, 8))


@torch.no_grad()
def test_lora():
    peft = pytest.importorskip("peft")
    model = kl(block_out_channels=WIDTHS)
    report = accelerate(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["conv1", "conv_out"], init_lora_weights=False), model)
    ours = run(model)
    assert_counted(report.calls(), fused=True)
    restore(model)
    assert_same(ours, run(model))


@torch.no_grad()
def test_a_latent_for_group_norms_is_refused_as_in_diffusers():
    decoder = kl().decoder
    report = accelerate(decoder)
    with pytest.raises(TypeError, match="positional argument"):
        decoder(torch.zeros(1, 4, 4, 4), torch.zeros(1, 1, 1, 1))
    assert report.calls()["Decoder"].accelerated == 0
