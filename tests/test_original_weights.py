import re

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
WRAPPINGS |= {
    key: lambda state, key=key: {key: state, "optimizer": {"state": {}, "scale": torch.zeros(1)}, "epoch": 3, "args": {"lr": 0.1}}
    for key in ("model", "module", "model_state_dict", "net", "generator", "params", "weights", "vae")
}
WRAPPINGS |= {
    "nested twice": lambda state: {"checkpoint": {"model": state}, "discriminator": {"conv.weight": torch.zeros(1)}},
    "losses": lambda state: {
        **{f"model.{name}": tensor for name, tensor in state.items()},
        "lpips.net.weight": torch.zeros(1),
        "discriminator.main.0.weight": torch.zeros(1),
        "perceptual_loss.weight": torch.zeros(1),
    },
    "colorize": lambda state: {**state, "colorize": torch.zeros(3, 1, 1, 1)},
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
    else:  # holds one dictionary
        while wrapped := next((value for value in state.values() if isinstance(value, dict)), None):
            state = wrapped
        save_file(state, path)
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
        {"a.decoder.norm_out.conv_y.weight": torch.zeros(2, 2), "b.decoder.norm_out.conv_y.weight": torch.zeros(2, 2)},
    ],
    ids=["empty", "other", "two"],
)
def test_other_models_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "other.pt")
    message = r"is not a MoVQ checkpoint: expected one entry ...decoder.norm_out.conv_y.weight, got (0$|2: a., b.)"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "other.pt")


def test_entries_outside_the_model_are_refused(tmp_path):
    state = {f"movq.{name}": tensor for name, tensor in make_movq().state_dict().items()}
    torch.save({**state, "unet.weight": torch.zeros(1)}, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match=r"expected all entries under 'movq.', got others: unet.weight"):
        from_pretrained(tmp_path / "both.pt")


def test_many_models_are_refused_at_once(tmp_path):
    names = [f"m{i}.decoder.norm_out.conv_y.weight" for i in range(65)]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "many.safetensors")
    with pytest.raises(CheckpointError, match=r"many.safetensors: expected one MoVQ model, got 65, more than 64 at"):
        from_pretrained(tmp_path / "many.safetensors")


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


def dotless(state, prefix="", **more):
    """Entries as LitEma stores them: in buffers, whose names cannot contain dots."""
    return {prefix + name.replace(".", ""): tensor for name, tensor in {**state, **more}.items()}


def movqgan_averages(state):
    """The averages in MoVQGAN's training checkpoints, which have one LitEma for each part."""
    averages = {}
    for part in {name.split(".")[0] for name in state}:
        entries = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
        averages |= dotless(entries, f"ema_{part}.", decay=torch.tensor(0.99), num_updates=torch.tensor(-1))
    return averages


def renamed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


WITH_AVERAGES = {
    "MoVQGAN": lambda state, ema: {"state_dict": {**state, **movqgan_averages(ema), "loss.logvar": torch.zeros(1)}},
    "LitEma": lambda state, ema: {"state_dict": {**state, **dotless(ema, "model_ema.", decay=torch.tensor(0.99))}},
    "LitEma of model.": lambda state, ema: {**renamed(state, "model."), **dotless(ema, "model_ema.")},
    "copied parts": lambda state, ema: {**state, **renamed(ema, "ema_")},
    "copied model": lambda state, ema: {**renamed(state, "model."), **renamed(ema, "ema_model.")},
    "copied below": lambda state, ema: {**state, **renamed(ema, "ema.")},
    "two dictionaries": lambda state, ema: {"model": state, "ema": ema},
    "two names": lambda state, ema: {"params": state, "params_ema": ema},
    "a dictionary below": lambda state, ema: {"state_dict": state, "ema": {"decay": 0.99, "module": renamed(ema, "module.")}},
}


@pytest.mark.parametrize("name", WITH_AVERAGES)
def test_averages_are_loaded_on_request(tmp_path, name):
    model, ema = make_movq(0), make_movq(1)
    torch.save(WITH_AVERAGES[name](dict(model.state_dict()), dict(ema.state_dict())), tmp_path / "last.ckpt")
    assert same_weights(from_pretrained(tmp_path / "last.ckpt"), model)
    assert same_weights(from_pretrained(tmp_path / "last.ckpt", weights="ema"), ema)


def test_missing_averages_are_named(tmp_path):
    state = dict(make_movq().state_dict())
    torch.save(state, tmp_path / "movq.pt")
    with pytest.raises(CheckpointError, match=r"expected EMA weights for all entries, got none for decoder.conv_in.bias, "):
        from_pretrained(tmp_path / "movq.pt", weights="ema")
    averages = movqgan_averages(state)
    del averages["ema_quantize.embeddingweight"]
    torch.save({**state, **averages}, tmp_path / "movq.pt")
    with pytest.raises(CheckpointError, match=r"got none for quantize.embedding.weight$"):
        from_pretrained(tmp_path / "movq.pt", weights="ema")
    torch.save({"ema": state}, tmp_path / "movq.pt")
    with pytest.raises(CheckpointError, match="contains EMA weights only: pass weights='ema'"):
        from_pretrained(tmp_path / "movq.pt")


@torch.inference_mode()
def test_kandinsky_3_has_no_codebook(tmp_path):
    """Its checkpoint has no quantiser, and the encoder's norms are SpatialNorm layers without modulation."""
    model = make_movq(n_embed=1, embed_dim=4)
    norm = re.compile(r"^(encoder\..*norm\w*)\.(weight|bias)$")
    state = {norm.sub(r"\1.norm_layer.\2", name): tensor for name, tensor in model.state_dict().items()}
    assert {"encoder.norm_out.norm_layer.weight", "encoder.mid.attn_1.norm.norm_layer.bias"} <= state.keys()
    del state["quantize.embedding.weight"]
    torch.save(state, tmp_path / "movq.pt")
    loaded = from_pretrained(tmp_path / "movq.pt")
    assert loaded.config["n_embed"] == 0
    image = torch.randn(1, 3, 24, 16)
    assert torch.equal(loaded.encode(image), model.encode(image))
    assert torch.equal(loaded.decode(loaded.encode(image)), model.decode(model.encode(image)))
    for use in (lambda: loaded.encode_code(image), lambda: loaded.decode_code(CODES), lambda: loaded(image)):
        with pytest.raises(ValueError, match=r"the model has no codebook \(n_embed is 0\): use encode and decode"):
            use()


@pytest.mark.parametrize(("names", "message"), [
    (["decoder.conv_in.weight", "quant_conv.weight"], "is an autoencoder without SpatialNorm, such as AutoencoderKL or VQGAN"),
    (["first_stage_model.decoder.conv_in.weight", "model.diffusion_model.x"], "is an autoencoder without SpatialNorm"),
    (["decoder.conv_in.conv.weight", "decoder.up_blocks.0.x"], "is a video autoencoder, such as Kandinsky 5's"),
    (["decoder.conv_in.conv.weight", "decoder.norm_out.conv_y.conv.weight"], "is the video autoencoder of CogVideoX"),
])  # fmt: skip
def test_other_autoencoders_are_named(tmp_path, names, message):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "vae.safetensors")


def test_layers_over_time_are_named(tmp_path):
    state = {**make_movq().state_dict(), "decoder.mid.block_1.temporal_projection1.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "movq.pt")
    with pytest.raises(CheckpointError, match=r"is Kandinsky Video's decoder, with layers over time: decoder.mid.block_1.temp"):
        from_pretrained(tmp_path / "movq.pt")
