"""A MoVQ model with layers that other packages have replaced, quantised or offloaded."""

import copy

import pytest
import torch
from models import MODEL, Adapter, offload, quantise
from tolerances import assert_close
from torch import nn

import movq_ext

X = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
ddconfig = {**MODEL["ddconfig"], "ch_mult": [1, 2], "attn_resolutions": [16], "dropout": 0.0}
every_model = pytest.mark.parametrize("add_conv", [False, True])
with_and_without_gradients = pytest.mark.parametrize("gradients", [False, True])


def make_model(**changes):
    torch.manual_seed(0)
    return movq_ext.MOVQ(**{**MODEL, "ddconfig": {**ddconfig, **changes}}).eval()


def reconstruct(model):
    """Encode and decode without the quantiser, whose choice of codes would hide or exaggerate differences."""
    return model.decode(model.encode(X))


def convolutions(model):
    """Names of convolutions: one for each role in the encoder and in the decoder."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return list({(name.split(".")[0], name.split(".")[-1]): name for name in names}.values())


def doubled(model, name, bias):
    """Return a copy whose convolution of that name has weights of twice the size."""
    twin = copy.deepcopy(model)
    conv = twin.get_submodule(name)
    conv.weight.data *= 2
    conv.bias.data *= 2 if bias else 1
    return twin


def replace(model, name, change):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, change(model.get_submodule(name)))


@every_model
@with_and_without_gradients
def test_every_convolution_may_be_an_adapter(add_conv, gradients):
    plain = make_model(add_conv=add_conv)
    names = convolutions(plain)
    assert {"quant_conv", "post_quant_conv", "encoder.conv_in", "decoder.conv_in", "decoder.norm_out.conv_y"} < set(names)
    with torch.set_grad_enabled(gradients):
        for name in names:
            model = copy.deepcopy(plain)
            replace(model, name, Adapter)
            assert_close(reconstruct(model), reconstruct(doubled(plain, name, bias=True)), slack=20)


@every_model
@with_and_without_gradients
def test_every_weight_may_be_quantised(add_conv, gradients):
    plain = make_model(add_conv=add_conv)
    with torch.set_grad_enabled(gradients):
        for name in convolutions(plain):
            model = copy.deepcopy(plain)
            quantise(model.get_submodule(name))
            assert_close(reconstruct(model), reconstruct(doubled(plain, name, bias=False)), slack=20)


@every_model
@torch.no_grad()
def test_every_layer_may_be_offloaded(add_conv):
    model = make_model(add_conv=add_conv)
    codes = model.encode_code(X)
    expected = reconstruct(model), model.decode_code(codes)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.GroupNorm, nn.Embedding)):
            offload(layer)
    for actual, want in zip((reconstruct(model), model.decode_code(codes)), expected, strict=True):
        assert_close(actual, want, slack=20)


@torch.no_grad()
def test_layers_may_be_stored_in_another_dtype():
    """As diffusers' layerwise casting does, by a forward on the instance."""
    model = make_model().bfloat16().float()
    expected = reconstruct(model)
    for layer in [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]:
        layer.forward = lambda x, layer=layer: layer._conv_forward(x, layer.weight.float(), layer.bias.float())
        layer.to(torch.bfloat16)
    assert_close(reconstruct(model), expected, slack=20)


@pytest.mark.parametrize("target", ["conv_y", "conv_b", "post_quant_conv", "quant_conv", "q", "conv1", "conv_in"])
@torch.no_grad()
def test_lora(target):
    peft = pytest.importorskip("peft")
    model = make_model()
    plain = reconstruct(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False), model)
    actual = reconstruct(model)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.merge()
    assert_close(actual, reconstruct(model), slack=20)
    assert (actual - plain).norm() > 1e-3 * plain.norm()
