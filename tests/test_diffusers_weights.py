"""Damaged diffusers folders. test_diffusers_parity.py loads intact ones and compares the models."""

import json

import pytest
import torch
from safetensors.torch import save_file

from movq_ext import MOVQ, CheckpointError, from_pretrained
from movq_ext.io.diffusers_weights import read_config

DDCONFIG = dict(ch=32, out_ch=3, ch_mult=[1], num_res_blocks=0, attn_resolutions=[], in_channels=3, resolution=256, z_channels=4)
CONFIG = {
    "_class_name": "VQModel", "norm_type": "spatial", "block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "in_channels": 3, "out_channels": 3, "latent_channels": 4, "num_vq_embeddings": 8,
    "layers_per_block": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    return dict(MOVQ(DDCONFIG, 8, 4).state_dict())


def test_the_intact_folder_loads(tmp_path, state):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    assert from_pretrained(tmp_path).config["n_embed"] == 8


@pytest.mark.parametrize(("text", "message"), [
    ("[" * 10**5, "not a config of a diffusers VQModel: RecursionError"),
    (json.dumps({**CONFIG, "block_out_channels": [0]}), r"block_out_channels\[0\] must be a positive integer, got 0"),
    (" " * (1 << 20) + "{}", "at most 1048576 characters"),
    (json.dumps({**CONFIG, "layers_per_block": 10**9}), "of 1000000000 blocks"),
    ("\xff", "not a config of a diffusers VQModel: UnicodeDecodeError"),
])  # fmt: skip
def test_invalid_configs(tmp_path, state, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(("new", "message"), [
    ({"decoder.up_blocks." + "9" * 5000 + ".x": torch.zeros(1)}, "1 unexpected"),
    ({"encoder.mid_block.resnets.0.conv1.bias": torch.zeros(32)}, "two entries for encoder.mid.block_1.conv1.bias"),
])  # fmt: skip
def test_invalid_names(tmp_path, state, new, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({**state, **new}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_another_class_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "_class_name": "AutoencoderKL"}))
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"expected _class_name 'VQModel', got 'AutoencoderKL'; movq_ext.accelerate takes"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [{"_class_name": "x" * 900_000}, {"block_out_channels": [2] + [3] * 20_000}])
def test_messages_are_short(tmp_path, value):
    levels = len(value.get("block_out_channels", [32]))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **blocks, **value}))
    with pytest.raises(CheckpointError, match=r"config.json: expected .*, got .*\.\.\.") as raised:
        read_config(tmp_path / "config.json")
    assert len(str(raised.value)) < 600


def test_a_folder_without_a_codebook(tmp_path, state):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    without = {name: tensor for name, tensor in state.items() if not name.startswith("quantize.")}
    save_file(without, tmp_path / "diffusion_pytorch_model.safetensors")
    assert from_pretrained(tmp_path).config["n_embed"] == 0
