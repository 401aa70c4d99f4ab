"""Checkpointed layers: the same gradients, less memory, one more forward pass."""

import copy
from dataclasses import replace

import pytest
import torch
from models import CONFIG, CPU, MODEL, assert_ddp_averages_the_gradients, latents, make_decoder
from torch.autograd.graph import saved_tensors_hooks

from movq_ext import MOVQ, AttnBlock, Downsample, Encoder, MOVQDecoder, ResnetBlock, Upsample
from movq_ext.model import activation_checkpointing
from movq_ext.training import Trainer

LAYERS = (ResnetBlock, AttnBlock, Upsample, Downsample)
ENCODER = dict(
    ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[16], in_channels=3, resolution=16, z_channels=4, dropout=0.2
)


def make_encoder():
    torch.manual_seed(0)
    return Encoder(**ENCODER)


def gradients(network, inputs, autocast=False):
    """Return a training step's output, random numbers drawn after it, and every parameter's gradient."""
    network.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = network(*inputs)
    out.float().square().sum().backward()
    return [out.detach(), torch.rand(3), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


def saved_bytes(network, inputs):
    """Return the bytes that autograd saves in a forward pass, parameters aside."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = network(*inputs)
    assert out.requires_grad  # out keeps the saved tensors alive until here, so their addresses are distinct
    return sum(size for address, size in kept.items() if address not in parameters)


NETWORKS = {
    "decoder": (lambda: make_decoder(dropout=0.2).train(), latents((8, 8))),
    "decoder without end": (lambda: make_decoder(resamp_with_conv=False, give_pre_end=True).train(), latents((4, 4))),
    "encoder": (lambda: make_encoder().train(), [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))]),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same(name, autocast):
    build, inputs = NETWORKS[name]
    network = build()
    plain = gradients(network, inputs, autocast)
    network.gradient_checkpointing_enable()
    checkpointed = gradients(network, inputs, autocast)
    assert len(plain) > 20 and all(torch.equal(a, b) for a, b in zip(checkpointed, plain, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_inputs_of_layers_are_kept(name):
    build, inputs = NETWORKS[name]
    network = build()
    plain = saved_bytes(network, inputs)
    network.gradient_checkpointing_enable()
    checkpointed = saved_bytes(network, inputs)
    maps = []
    if hasattr(network, "norm_out"):
        network.norm_out.register_forward_pre_hook(lambda module, args: maps.append(args[0].nbytes))
    for module in network.modules():
        if isinstance(module, LAYERS):
            module.register_forward_pre_hook(lambda module, args: maps.append(args[0].nbytes))
    network.eval()(*inputs)
    network.train()
    inputs_of_layers = sum(maps)
    # The rest is the latents or the image.
    assert inputs_of_layers <= checkpointed < 1.05 * inputs_of_layers, (inputs_of_layers, checkpointed)
    assert checkpointed < plain / 5, (checkpointed, plain)
    network.gradient_checkpointing_disable()
    assert saved_bytes(network, inputs) > 0.9 * plain


def test_layers_run_twice_in_training_and_once_otherwise(monkeypatch):
    decoder, inputs = make_decoder(gradient_checkpointing=True), latents()
    runs = {module: 0 for module in decoder.modules() if isinstance(module, LAYERS)}
    for module in runs:
        module.register_forward_pre_hook(lambda module, args: runs.__setitem__(module, runs[module] + 1))
    decoder(*inputs).sum().backward()
    assert set(runs.values()) == {1}
    decoder.train()
    with torch.no_grad():
        monkeypatch.setattr(activation_checkpointing, "checkpoint", None)
        decoder(*inputs)
    monkeypatch.undo()
    assert set(runs.values()) == {2}
    decoder(*inputs).sum().backward()
    assert set(runs.values()) == {4}


def test_checkpointing_is_not_part_of_the_state_dict():
    decoder = make_decoder(gradient_checkpointing=True)
    assert decoder.state_dict().keys() == make_decoder().state_dict().keys()
    assert copy.deepcopy(decoder).gradient_checkpointing and not make_decoder().gradient_checkpointing
    assert isinstance(decoder, MOVQDecoder) and Encoder(**ENCODER, gradient_checkpointing=True).gradient_checkpointing


def test_the_whole_model_switches_both_networks():
    model = MOVQ(**MODEL)
    model.gradient_checkpointing_enable()
    assert model.encoder.gradient_checkpointing and model.decoder.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.encoder.gradient_checkpointing and not model.decoder.gradient_checkpointing


def test_training_steps_are_the_same(photo_folder, tmp_path):
    weights = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        run = Trainer(MOVQ(**MODEL), photo_folder, tmp_path, replace(CONFIG, checkpoint_activations=checkpoint), CPU)
        assert run.model.decoder.gradient_checkpointing == checkpoint
        for _ in range(6):  # quantisation starts after four
            run.train_step()
        weights.append(run.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_compiled():
    decoder, inputs = make_decoder(ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=[]).train(), latents()
    plain = gradients(decoder, inputs)
    decoder.gradient_checkpointing_enable()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    scale = max(x.norm() for x in plain[2:])
    for ours, theirs in zip(gradients(compiled, inputs), plain, strict=True):
        assert (ours - theirs).norm() < 1e-5 * (theirs.norm() + scale)


def test_ddp(tmp_path):
    assert_ddp_averages_the_gradients(tmp_path, {"gradient_checkpointing": True}, find_unused_parameters=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """Dropout draws on the device, and the layers run on the kernels."""
    decoder, inputs = make_decoder(dropout=0.2).train().cuda(), latents(device="cuda")
    plain = gradients(decoder, inputs)
    decoder.gradient_checkpointing_enable()
    scale = max(x.norm() for x in plain[2:])
    for ours, theirs in zip(gradients(decoder, inputs), plain, strict=True):
        assert (ours - theirs).norm() < 1e-4 * (theirs.norm() + scale)  # cuDNN may sum gradients in another order
