"""Parity with diffusers' VQModel, an independent implementation whose folders from_pretrained loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import relative_error
from vq_models import LIMIT, vq_model

from movq_ext import CheckpointError, from_pretrained

CONFIGS = {
    "one level": dict(widths=(32,), attention=(False,)),
    "attention on the last level": dict(),
    "attention in the middle only": dict(attention=(False, False)),
    "attention everywhere": dict(attention=(True, True), layers=2),
    "no attention in the middle": dict(mid_block_add_attention=False),
    "no attention at all": dict(attention=(False, False), mid_block_add_attention=False),
    "Kandinsky's, small": dict(widths=(32, 64, 64, 128), attention=(False, False, False, True), layers=2),
    "six latent channels": dict(latent_channels=6, vq_embed_dim=6),
    "one image channel": dict(in_channels=1, out_channels=1),
}


def assert_decodes_alike(ours, theirs, h):
    # Three pixels give a group of one channel three values. If they are nearly equal, both implementations lose digits.
    limit = LIMIT if h.shape[2] * h.shape[3] > 3 else 10 * LIMIT
    assert relative_error(ours.decode(h), theirs.decode(h, force_not_quantize=True).sample) < limit, h.shape


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_decode_and_encode_match(name, tmp_path):
    theirs = vq_model(**CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(1)
    for grid in [(4, 4), (8, 5), (1, 3)]:
        h = torch.randn(2, theirs.config.vq_embed_dim, *grid, generator=generator)
        assert_decodes_alike(ours, theirs, h)
        quantized, loss, _ = ours.quantize(h)
        assert_decodes_alike(ours, theirs, quantized)
        assert relative_error(loss, theirs.quantize(h)[1]) < LIMIT
    x = torch.randn(2, theirs.config.in_channels, 24, 16, generator=generator)
    assert relative_error(ours.encode(x), theirs.encode(x).latents) < LIMIT


@pytest.mark.parametrize("as_bin", [False, True])
@torch.inference_mode()
def test_old_attention_names(tmp_path, as_bin):
    theirs = vq_model()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    renamed = {}
    for name, tensor in state.items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor.clone()
    assert renamed.keys() != state.keys()
    file.unlink()
    if as_bin:
        torch.save(renamed, tmp_path / "diffusion_pytorch_model.bin")
    else:
        save_file(renamed, file)
    h = torch.randn(1, 4, 3, 5)
    assert relative_error(from_pretrained(tmp_path).decode(h), theirs.decode(h, force_not_quantize=True).sample) < LIMIT


@torch.inference_mode()
def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    theirs = vq_model().half()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    h = torch.randn(1, 4, 3, 5)
    assert relative_error(ours.decode(h), theirs.float().decode(h, force_not_quantize=True).sample) < LIMIT


def test_gradients_match(tmp_path):
    theirs = vq_model()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    h = torch.randn(1, 4, 3, 5)
    gradients = []
    for decode in (ours.decode, lambda h: theirs.decode(h, force_not_quantize=True).sample):
        leaf = h.clone().requires_grad_()
        decode(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(*gradients) < 10 * LIMIT
    assert relative_error(ours.decoder.conv_in.weight.grad, theirs.decoder.conv_in.weight.grad) < 10 * LIMIT


@pytest.mark.parametrize(("change", "message"), [
    ({"norm_type": "group"}, "expected norm_type 'spatial', got 'group'"),
    ({"_class_name": "AutoencoderKL"}, "expected _class_name 'VQModel', got 'AutoencoderKL'"),
    ({"norm_num_groups": 16}, "expected norm_num_groups 32, got 16"),
    ({"act_fn": "relu"}, "expected act_fn 'silu', got 'relu'"),
    ({"up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"]}, "expected the same levels"),
    ({"down_block_types": ["DownBlock2D", "DownEncoderBlock2D"]}, "got DownBlock2D"),
    ({"block_out_channels": [32, 48]}, "expected block_out_channels to be multiples of the first"),
    ({"block_out_channels": None}, "expected block_out_channels to be a list of integers, got None"),
    ({"num_vq_embeddings": 32}, "1 of the wrong shape: quantize.embedding.weight"),
])  # fmt: skip
def test_unsupported_configs_are_refused(tmp_path, change, message):
    vq_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_missing_weights(tmp_path):
    vq_model().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model.safetensors \(or .bin\)"):
        from_pretrained(tmp_path)
