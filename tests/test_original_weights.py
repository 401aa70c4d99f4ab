import pytest
import torch
from checkpoints import CODES, make_movq, same_weights
from safetensors.torch import save_file

from movq_ext import CheckpointError, from_pretrained

WRAPPINGS = {
    "plain": lambda state: state,
    "nested": lambda state: {"state_dict": state, "epoch": 3, "global_step": 7},
    "prefix": lambda state: {f"model.{name}": tensor for name, tensor in state.items()},
    "prefixes": lambda state: {"state_dict": {f"module.first_stage_model.{name}": tensor for name, tensor in state.items()}},
    "discriminator": lambda state: {
        **state,
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "model_ema.decay": torch.zeros(1),
    },
    "prefixed discriminator": lambda state: {**{f"movq.{n}": t for n, t in state.items()}, "movq.loss.logvar": torch.zeros(1)},
}
CONFIGS = {
    "basic": {},
    "no attention": dict(attn_resolutions=[], mid_attn=False),
    "three levels": dict(ch_mult=[1, 1, 2], num_res_blocks=2, attn_resolutions=[256, 64]),
    "no resampling convolutions": dict(resamp_with_conv=False),
    "add_conv": dict(add_conv=True),
    "other channels": dict(in_channels=1, out_ch=2, z_channels=6),
    "one level": dict(ch_mult=[1]),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_original_checkpoints(tmp_path, wrapping, suffix):
    state, path = WRAPPINGS[wrapping](make_movq().state_dict()), tmp_path / f"movq.{suffix}"
    if suffix == "ckpt":
        torch.save(state, path)
    else:
        save_file(state.get("state_dict", state), path)
    assert same_weights(from_pretrained(path), make_movq())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_is_inferred_from_the_shapes(tmp_path, name):
    model = make_movq(**CONFIGS[name])
    torch.save(model.state_dict(), tmp_path / "movq.pt")
    loaded = from_pretrained(tmp_path / "movq.pt")
    assert same_weights(loaded, model)
    x = torch.randn(1, model.encoder.in_channels, 24, 16)
    assert torch.equal(loaded.encode(x), model.encode(x))
    assert torch.equal(loaded.decode_code(CODES), model.decode_code(CODES))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"weight": torch.zeros(1)},
        {"a.quantize.embedding.weight": torch.zeros(2, 2), "b.quantize.embedding.weight": torch.zeros(2, 2)},
    ],
    ids=["empty", "other", "two"],
)
def test_other_models_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "other.pt")
    message = r"is not a MoVQ checkpoint: expected one entry ...quantize.embedding.weight, got [02]"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "other.pt")


def test_entries_outside_the_model_are_refused(tmp_path):
    state = {f"movq.{name}": tensor for name, tensor in make_movq().state_dict().items()}
    torch.save({**state, "unet.weight": torch.zeros(1)}, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match=r"expected all entries under 'movq.', got others: unet.weight"):
        from_pretrained(tmp_path / "both.pt")


@pytest.mark.parametrize(("name", "entry"), [
    ("decoder.conv_in.weight", None), ("encoder.conv_in.weight", torch.zeros(())),
    ("encoder.conv_in.weight", torch.zeros(0, 3, 3, 3)), ("quantize.embedding.weight", torch.zeros(4)),
])  # fmt: skip
def test_a_missing_or_malformed_entry_is_refused(tmp_path, name, entry):
    state = dict(make_movq().state_dict())
    state.pop(name)
    torch.save(state if entry is None else {**state, name: entry}, tmp_path / "movq.pt")
    with pytest.raises(CheckpointError, match="is not a MoVQ checkpoint: missing or malformed entry: "):
        from_pretrained(tmp_path / "movq.pt")
