"""A config with an absurd value is refused with an error that names the field, or gives a model that works."""

import copy
import json

import pytest
import torch
from checkpoints import CODES, make_movq
from safetensors.torch import save_file

from movq_ext import MOVQ, CheckpointError, from_pretrained
from movq_ext.io.weights import CONFIG_KEY

ABSURD = [0, -1, 2**31, 10**30, float("nan"), float("inf"), -0.5, 0.5, 2.0, True, "x", "", [], [1], [None], None, {}]
MODEL = make_movq()
OPTIONAL = {"dropout": 0.0, "resamp_with_conv": True, "mid_attn": True, "add_conv": False, "give_pre_end": False,
            "gradient_checkpointing": False, "zq_ch": 5}  # fmt: skip
CONFIG = {**MODEL.config, "ddconfig": {**MODEL.config["ddconfig"], **OPTIONAL}}
DIFFUSERS = {
    "_class_name": "VQModel", "norm_type": "spatial", "block_out_channels": [32, 64], "in_channels": 3, "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], "latent_channels": 4, "num_vq_embeddings": 16,
    "layers_per_block": 1, "norm_num_groups": 32, "vq_embed_dim": 5, "act_fn": "silu", "mid_block_add_attention": True,
}  # fmt: skip


def changed(config, field, value):
    config = copy.deepcopy(config)
    (config["ddconfig"] if field in config.get("ddconfig", ()) else config)[field] = value
    return config


def works(model):
    """Run everything that depends on the config."""
    image = torch.zeros(1, 3, 8, 8)
    decoded = model.decode_code(CODES)
    _, loss = model.train()(image)
    assert decoded.isfinite().all() and loss.isfinite() and model.eval().encode_code(image).shape[0] == 1


@pytest.mark.parametrize("field", [*CONFIG, *CONFIG["ddconfig"]])
def test_fields_of_our_config(tmp_path, field):
    for value in ABSURD:
        text = json.dumps(changed(CONFIG, field, value))
        save_file(MODEL.state_dict(), tmp_path / "model.safetensors", metadata={CONFIG_KEY: text})
        try:
            works(from_pretrained(tmp_path))
        except CheckpointError as error:
            missing = field == "ddconfig" and "missing 6 required" in str(error)
            assert field in str(error) or "does not match the model" in str(error) or missing, (value, error)


@pytest.mark.parametrize("field", DIFFUSERS)
def test_fields_of_a_diffusers_config(tmp_path, field):
    state = MODEL.state_dict()
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS))
    works(from_pretrained(tmp_path))
    for value in ABSURD:
        (tmp_path / "config.json").write_text(json.dumps(changed(DIFFUSERS, field, value)))
        try:
            works(from_pretrained(tmp_path))
        except CheckpointError as error:
            assert field in str(error) or "does not match the model" in str(error), (value, error)


@pytest.mark.parametrize("field", [*CONFIG, *CONFIG["ddconfig"]])
def test_arguments_of_a_new_model(field):
    """Of a fourth of the values, because every model that is created takes time."""
    for value in (-1, float("nan"), "x", None):
        config = changed(CONFIG, field, value)
        with torch.device("meta"):
            try:
                MOVQ(**config)
            except ValueError as error:
                assert field in str(error), (value, error)
            else:
                assert field == "zq_ch"  # embed_dim takes its place


def test_a_model_cannot_have_a_variance():
    with pytest.raises(ValueError, match="double_z must be False for a MOVQ, whose latents have no variance"):
        MOVQ(**changed(CONFIG, "double_z", True))
