import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import CODES, DDCONFIG, make_movq, same_weights
from safetensors import safe_open
from safetensors.torch import save_file

from movq_ext import MOVQ, CheckpointError, from_pretrained, save_pretrained
from movq_ext.io import weights

DEEP = "[" * 10**6 + "]" * 10**6


@pytest.mark.parametrize("as_file", [False, True])
def test_save_and_load(tmp_path, as_file):
    model = make_movq(attn_resolutions=(256,), num_res_blocks=2)
    save_pretrained(model, tmp_path / "new" / "folder")
    path = tmp_path / "new/folder"
    loaded = from_pretrained(path / "model.safetensors" if as_file else path)
    assert same_weights(loaded, model) and not loaded.training
    assert torch.equal(loaded.decode_code(CODES), model.decode_code(CODES))
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(model.config))
    assert all(p.requires_grad for p in loaded.parameters())


def test_dtypes(tmp_path):
    model = make_movq()
    save_pretrained(model, tmp_path, dtype=torch.float16)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same_weights(from_pretrained(tmp_path), make_movq().half().float())
    assert {p.dtype for p in from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert from_pretrained(tmp_path, device="meta").quant_conv.weight.is_meta


@pytest.mark.parametrize("name", ["model.safetensors", "movq.ckpt", "legacy.pt"])
def test_a_loaded_model_does_not_follow_its_file(tmp_path, name):
    """Overwritten in place and cut off, while the model is used."""
    model, path = make_movq(), tmp_path / name
    save_pretrained(model, tmp_path)
    if name != "model.safetensors":
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=name == "movq.ckpt")
    loaded = from_pretrained(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same_weights(loaded, model)
    os.truncate(path, 10)
    assert torch.equal(loaded.decode_code(CODES), model.decode_code(CODES))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_loading(tmp_path):
    """One copy of the weights, and nothing for an optimiser's state. In a fresh process, whose peak is that of the load."""
    model = MOVQ({**DDCONFIG, "ch": 384, "ch_mult": [1]}, 16, 5)
    save_pretrained(model, tmp_path)
    averages = {i: {"exp_avg": torch.zeros_like(parameter)} for i, parameter in enumerate(model.parameters())}
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [{"state": averages}]}, tmp_path / "last.ckpt")
    size = (tmp_path / "model.safetensors").stat().st_size
    script = """
import re, sys
from pathlib import Path
from movq_ext import from_pretrained
from movq_ext.demo import SMALL_MODEL_PATH
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
from_pretrained(SMALL_MODEL_PATH)  # imports what every load needs
before = peak()
from_pretrained(sys.argv[1])
print(peak() - before)
"""
    for name in ("model.safetensors", "last.ckpt"):
        run = subprocess.run([sys.executable, "-c", script, tmp_path / name], capture_output=True, text=True, check=True)
        assert size > 50 << 20 and 0.5 * size < int(run.stdout) < 1.4 * size, (name, int(run.stdout) / size)


def test_a_config_can_be_given(tmp_path):
    model = make_movq()
    torch.save(model.state_dict(), tmp_path / "movq.pt")
    assert from_pretrained(tmp_path / "movq.pt", config={**model.config, "beta": 0.5}).quantize.beta == 0.5
    save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="config is only for original checkpoints"):
        from_pretrained(tmp_path, config=model.config)
    with pytest.raises(CheckpointError, match=r"invalid MOVQ config: .*n_embed"):
        from_pretrained(tmp_path / "movq.pt", config={"ddconfig": DDCONFIG})


class Wrapper(torch.nn.Module):
    """Holds a model like DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [
    torch.compile, torch.nn.DataParallel, Wrapper, torch.optim.swa_utils.AveragedModel,
    lambda model: Wrapper(torch.compile(model)),
    lambda model: (setattr(model, "decoder", torch.compile(model.decoder)), model)[1],
], ids=["compiled", "DataParallel", "module", "averaged", "compiled in a module", "compiled decoder"])  # fmt: skip
def test_a_wrapped_model_is_saved_as_itself(tmp_path, wrap):
    save_pretrained(wrap(make_movq()), tmp_path)
    assert same_weights(from_pretrained(tmp_path), make_movq())
    torch.save({"model": wrap(make_movq()).state_dict()}, tmp_path / "movq.pt")
    assert same_weights(from_pretrained(tmp_path / "movq.pt"), make_movq())


def test_a_file_saved_with_the_names_of_a_compiled_model(tmp_path):
    state = {f"_orig_mod.{name}": tensor for name, tensor in make_movq().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={weights.CONFIG_KEY: json.dumps(make_movq().config)})
    assert same_weights(from_pretrained(tmp_path), make_movq())
    state["decoder.conv_in.bias"] = torch.zeros(64)
    save_file(state, tmp_path / "model.safetensors", metadata={weights.CONFIG_KEY: json.dumps(make_movq().config)})
    with pytest.raises(CheckpointError, match=r"two entries for decoder.conv_in.bias; one is "):
        from_pretrained(tmp_path)


def test_only_a_model_with_plain_weights_is_saved(tmp_path):
    with pytest.raises(TypeError, match="model must be a MOVQ, got Linear"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path / "other")
    model = make_movq()
    model.decoder.conv_in.bias = torch.nn.Parameter(torch.zeros(64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"dense floating-point tensors, got others: decoder.conv_in.bias"):
        save_pretrained(model, tmp_path / "int8")
    assert list(tmp_path.iterdir()) == []


@torch.inference_mode()
def test_a_model_without_a_codebook_is_saved(tmp_path):
    model = make_movq(n_embed=0)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert same_weights(loaded, model) and loaded.config["n_embed"] == 0
    latents = loaded.encode(torch.zeros(1, 3, 8, 8))
    torch.testing.assert_close(loaded.decode(latents), model.decode(latents))


def test_unknown_weights_are_refused(tmp_path):
    save_pretrained(make_movq(), tmp_path)
    with pytest.raises(ValueError, match="weights must be 'model' or 'ema', got 'average'"):
        from_pretrained(tmp_path, weights="average")
    with pytest.raises(CheckpointError, match="has no EMA weights besides the model's"):
        from_pretrained(tmp_path, weights="ema")


@pytest.mark.parametrize("with_config", [True, False])
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
def test_the_error_names_entries_that_do_not_match(tmp_path, damage, message, with_config):
    model = make_movq()
    state = dict(model.state_dict())
    damage(state)
    path = tmp_path / "model.safetensors"
    save_file(state, path, metadata={weights.CONFIG_KEY: json.dumps(model.config)} if with_config else None)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*/nothing"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"expected model.safetensors .* or config.json"):
        from_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a MoVQ checkpoint: expected one entry ...decoder"):
        from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: kandinsky/movq; .* huggingface_hub.snapshot_download"):
        from_pretrained("kandinsky/movq")


@pytest.mark.parametrize("config", ["{", "{}", "[]", '{"ddconfig": {}, "n_embed": 1, "embed_dim": 1}', '{"unknown": 1}'])
def test_a_damaged_config_is_refused(tmp_path, config):
    save_file(dict(make_movq().state_dict()), tmp_path / "model.safetensors", metadata={weights.CONFIG_KEY: config})
    with pytest.raises(CheckpointError):
        from_pretrained(tmp_path)


def config(**changes):
    return {"ddconfig": {**DDCONFIG, **changes}, "n_embed": 16, "embed_dim": 5}


@pytest.mark.parametrize(("text", "message"), [
    (DEEP, "characters of JSON|RecursionError"),
    ("[" * 10**5, "RecursionError"),
    (json.dumps(config())[:-1] + ', "n_embed": 8}', "has a repeated key"),
    (json.dumps(config(num_res_blocks=10**9)), "levels of 1000000000 blocks"),
    (json.dumps(config(ch_mult=[1] * 10**5)), "100000 levels of"),
    (json.dumps(config(ch=32 * 10**18)), "invalid MOVQ config: ValueError: ch must be at most 65536, got 320"),
    (json.dumps({**config(), "n_embed": 0}), r"quantize.embedding.weight \(expected \(0, 5\), got \(16, 5\)\)"),
    (json.dumps({**config(), "n_embed": -1}), "invalid MOVQ config: ValueError: n_embed must be an integer from 0 to .*, got -1"),
    (json.dumps({**config(), "remap": "/dev/zero"}), "expected a config with the keys ddconfig"),
    (json.dumps({**config(), "ddconfig": []}), r"invalid MOVQ config: ValueError: ddconfig must be a mapping .*, got \[\]"),
])  # fmt: skip
def test_untrusted_configs(tmp_path, text, message):
    save_file(make_movq().state_dict(), tmp_path / "model.safetensors", metadata={weights.CONFIG_KEY: text})
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("entry", [
    torch.zeros(64, dtype=torch.long), torch.zeros(64, dtype=torch.complex64), torch.zeros(64, dtype=torch.bool),
    torch.zeros(64, device="meta"), torch.zeros(64).to_sparse(), torch.zeros(64).to(torch.float8_e4m3fn),
], ids=["int64", "complex", "bool", "meta", "sparse", "float8"])  # fmt: skip
def test_entries_of_the_wrong_type_are_refused(tmp_path, entry):
    torch.save({**make_movq().state_dict(), "decoder.conv_in.bias": entry}, tmp_path / "movq.ckpt")
    message = rf"1 of the wrong type \(expected dense floating-point tensors\): decoder.conv_in.bias {entry.dtype}$"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "movq.ckpt", dtype=torch.float16)


def test_a_failed_save_keeps_the_old_files(tmp_path, monkeypatch):
    save_pretrained(make_movq(0), tmp_path)

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "write_safetensors", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(make_movq(1), tmp_path)
    assert same_weights(from_pretrained(tmp_path), make_movq(0))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("replaces", [0, 1])
def test_a_killed_save_keeps_the_old_or_the_new_model(tmp_path, replaces):
    """SIGKILL right before each rename. The second model has other shapes, so a mixed pair would fail to load."""
    save_pretrained(make_movq(0), tmp_path)
    script = f"""
import os, signal, torch
from movq_ext import MOVQ, save_pretrained
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
    assert same_weights(loaded, make_movq(0)) if replaces == 0 else loaded.decoder.z_channels == 7
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    save_pretrained(make_movq(0), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
