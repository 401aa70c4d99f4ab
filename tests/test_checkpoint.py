import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from movq_ext import MOVQ, CheckpointError, from_pretrained, save_pretrained
from movq_ext.io import weights

DDCONFIG = dict(ch=32, out_ch=3, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[128], in_channels=3, resolution=256,
                z_channels=4, double_z=False)  # fmt: skip


def make(seed=0, n_embed=16, embed_dim=5, **changes):
    torch.manual_seed(seed)
    model = MOVQ({**DDCONFIG, **changes}, n_embed, embed_dim)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return model.eval()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CODES = torch.arange(12).view(1, 3, 4)


@pytest.mark.parametrize("as_file", [False, True])
def test_save_and_load(tmp_path, as_file):
    model = make(attn_resolutions=(256,), num_res_blocks=2)
    save_pretrained(model, tmp_path / "new" / "folder")
    path = tmp_path / "new/folder"
    loaded = from_pretrained(path / "model.safetensors" if as_file else path)
    assert same(loaded, model) and not loaded.training
    assert torch.equal(loaded.decode_code(CODES), model.decode_code(CODES))
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(model.config))
    assert all(p.requires_grad for p in loaded.parameters())


def test_dtypes(tmp_path):
    model = make()
    save_pretrained(model, tmp_path, dtype=torch.float16)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same(from_pretrained(tmp_path), make().half().float())
    assert {p.dtype for p in from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert from_pretrained(tmp_path, device="meta").quant_conv.weight.is_meta


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
    state, path = WRAPPINGS[wrapping](make().state_dict()), tmp_path / f"movq.{suffix}"
    if suffix == "ckpt":
        torch.save(state, path)
    else:
        save_file(state.get("state_dict", state), path)
    assert same(from_pretrained(path), make())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_of_an_original_checkpoint_is_read_off_its_shapes(tmp_path, name):
    model = make(**CONFIGS[name])
    torch.save(model.state_dict(), tmp_path / "movq.pt")
    loaded = from_pretrained(tmp_path / "movq.pt")
    assert same(loaded, model)
    x = torch.randn(1, model.encoder.in_channels, 24, 16)
    assert torch.equal(loaded.encode(x), model.encode(x))
    assert torch.equal(loaded.decode_code(CODES), model.decode_code(CODES))


def test_a_config_can_be_given(tmp_path):
    model = make()
    torch.save(model.state_dict(), tmp_path / "movq.pt")
    assert from_pretrained(tmp_path / "movq.pt", config={**model.config, "beta": 0.5}).quantize.beta == 0.5
    save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="config is only for original checkpoints"):
        from_pretrained(tmp_path, config=model.config)
    with pytest.raises(CheckpointError, match=r"invalid MOVQ config: .*n_embed"):
        from_pretrained(tmp_path / "movq.pt", config={"ddconfig": DDCONFIG})


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(("damage", "message"), [
    (lambda state: state.pop("decoder.conv_in.bias"), "1 missing: decoder.conv_in.bias$"),
    (lambda state: state.update({"decoder.spare": torch.zeros(1)}), "1 unexpected: decoder.spare$"),
    (lambda state: state.update({"decoder.conv_in.bias": torch.zeros(7)}),
     r"1 of the wrong shape: decoder.conv_in.bias \(expected \(64,\), got \(7,\)\)$"),
    (lambda state: [state.pop(name) for name in list(state) if ".norm1.weight" in name and "encoder" in name],
     "missing: encoder.down.0.block.0.norm1.weight, "),
    (lambda state: [state.update({f"decoder.{i}": torch.zeros(1)}) for i in range(100)],
     "100 unexpected: decoder.0, decoder.1, .* and 92 more$"),
])  # fmt: skip
def test_entries_that_do_not_fit_are_named(tmp_path, damage, message, ours):
    model = make()
    state = dict(model.state_dict())
    damage(state)
    path = tmp_path / "model.safetensors"
    save_file(state, path, metadata={weights.CONFIG_KEY: json.dumps(model.config)} if ours else None)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(path)


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
    with pytest.raises(
        CheckpointError, match=r"is not a MoVQ checkpoint: expected one entry ...quantize.embedding.weight, got [02]"
    ):
        from_pretrained(tmp_path / "other.pt")


def test_entries_outside_the_model_are_refused(tmp_path):
    torch.save({**{f"movq.{n}": t for n, t in make().state_dict().items()}, "unet.weight": torch.zeros(1)}, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match=r"expected all entries under 'movq.', got others: unet.weight"):
        from_pretrained(tmp_path / "both.pt")


def test_entries_that_are_no_tensors_are_refused(tmp_path):
    torch.save({**make().state_dict(), "note": "hello"}, tmp_path / "note.pt")
    with pytest.raises(CheckpointError, match="expected only tensors, got other entries: note"):
        from_pretrained(tmp_path / "note.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="expected a dictionary of named tensors, got list"):
        from_pretrained(tmp_path / "list.pt")


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["ours", "ckpt"])
def test_truncated_files_are_refused(tmp_path, kind, kept):
    if kind == "ours":
        save_pretrained(make(), tmp_path)
        path = tmp_path / "model.safetensors"
    else:
        path = tmp_path / "movq.ckpt"
        torch.save(make().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        from_pretrained(path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_does_not_run(tmp_path, legacy):
    path, trace = tmp_path / "bomb.ckpt", tmp_path / "ran"
    torch.save({"state_dict": make().state_dict(), "callback": Bomb(str(trace))}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="objects other than tensors, which could run code"):
        from_pretrained(path)
    path.write_bytes(pickle.dumps(Bomb(str(trace))))
    with pytest.raises(CheckpointError):
        from_pretrained(path)
    assert not trace.exists()


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*/nothing"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"expected model.safetensors .* or config.json"):
        from_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a file from save_pretrained, got one without"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("config", ["{", "[]", '{"ddconfig": {}, "n_embed": 1, "embed_dim": 1}', '{"unknown": 1}'])
def test_a_damaged_config_is_refused(tmp_path, config):
    save_file(dict(make().state_dict()), tmp_path / "model.safetensors", metadata={weights.CONFIG_KEY: config})
    with pytest.raises(CheckpointError):
        from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_files_whole(tmp_path, monkeypatch):
    save_pretrained(make(0), tmp_path)

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(make(1), tmp_path)
    assert same(from_pretrained(tmp_path), make(0))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("replaces", [0, 1])
def test_a_killed_save_leaves_one_of_the_models_whole(tmp_path, replaces):
    """SIGKILL right before each rename; the second model has other shapes, so that a mixed pair would show."""
    save_pretrained(make(0), tmp_path)
    script = f"""
import os, signal, torch
from movq_ext import MOVQ, save_pretrained
from movq_ext.io import weights
done, replace = 0, os.replace
def replace_or_die(*paths):
    global done
    if done == {replaces}:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    replace(*paths)
os.replace = replace_or_die
save_pretrained(MOVQ({ {**DDCONFIG, "z_channels": 7}!r}, 8, 3), {str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    loaded = from_pretrained(tmp_path)
    assert same(loaded, make(0)) if replaces == 0 else loaded.decoder.z_channels == 7
