"""Files that are wrong, see fuzz.py; MOVQ_EXT_CASES=10000 for so many of them. Below are the cases that once went wrong."""

import json
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from movq_ext import MOVQ, CheckpointError, from_pretrained, save_pretrained
from movq_ext.cli import main
from movq_ext.io import weights
from movq_ext.io.codes import FORMAT, CodeFile, CodeFileError
from movq_ext.io.files import parse_json, printable
from movq_ext.io.images import ImageError, load_image

CASES = int(os.environ.get("MOVQ_EXT_CASES", 250))
DDCONFIG = dict(ch=32, out_ch=3, ch_mult=[1], num_res_blocks=0, attn_resolutions=[], in_channels=3, resolution=256, z_channels=4)
DIFFUSERS = {
    "_class_name": "VQModel", "norm_type": "spatial", "block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "in_channels": 3, "out_channels": 3, "latent_channels": 4, "num_vq_embeddings": 8,
    "layers_per_block": 0,
}  # fmt: skip
DEEP = "[" * 10**6 + "]" * 10**6


def test_fuzz():
    """In a process of its own, which nothing has used before: its peak is that of the cases."""
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("fuzz.py"), "--cases", str(CASES)],
        capture_output=True,
        text=True,
        timeout=60 + CASES,
    )
    assert run.returncode == 0, run.stderr[-3000:] + run.stdout
    report = json.loads(run.stdout)
    assert report["cases"] == CASES and {outcome.split()[1] for outcome in report["outcomes"]} >= {
        "read",
        "CheckpointError",
        "ImageError",
    }


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return dict(MOVQ(DDCONFIG, 8, 4).state_dict())


def config(**changes):
    return {"ddconfig": {**DDCONFIG, **changes}, "n_embed": 8, "embed_dim": 4}


@pytest.mark.parametrize(("text", "message"), [
    (DEEP, "characters of JSON|RecursionError"),
    ("[" * 10**5, "RecursionError"),
    (json.dumps(config())[:-1] + ', "n_embed": 8}', "has a repeated key"),
    (json.dumps(config(num_res_blocks=10**9)), "levels of 1000000000 blocks"),
    (json.dumps(config(ch_mult=[1] * 10**5)), "100000 levels of"),
    (json.dumps(config(ch=32 * 10**18)), "invalid MOVQ config: RuntimeError|OverflowError|TypeError"),
    (json.dumps({**config(), "n_embed": 0}), "invalid MOVQ config: ZeroDivisionError"),
    (json.dumps({**config(), "remap": "/dev/zero"}), "expected a config with the keys ddconfig"),
    (json.dumps({**config(), "ddconfig": []}), "invalid MOVQ config: AttributeError"),
])  # fmt: skip
def test_configs_in_weights(tmp_path, state, text, message):
    save_file(state, tmp_path / "model.safetensors", metadata={weights.CONFIG_KEY: text})
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ("[" * 10**5, "not a config of a diffusers VQModel: RecursionError"),
    (json.dumps({**DIFFUSERS, "block_out_channels": [0]}), "not a config of a diffusers VQModel: ZeroDivisionError"),
    (" " * (1 << 20) + "{}", "at most 1048576 characters"),
    (json.dumps({**DIFFUSERS, "layers_per_block": 10**9}), "of 1000000000 blocks"),
    ("\xff", "not a config of a diffusers VQModel: UnicodeDecodeError"),
])  # fmt: skip
def test_configs_of_diffusers(tmp_path, state, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(("new", "message"), [
    ({"decoder.up_blocks." + "9" * 5000 + ".x": torch.zeros(1)}, "1 unexpected"),
    ({"encoder.mid_block.resnets.0.conv1.bias": torch.zeros(32)}, "under both the old and the new names"),
])  # fmt: skip
def test_names_of_diffusers(tmp_path, state, new, message):
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS))
    save_file({**state, **new}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(("new", "message"), [
    (torch.zeros(1).expand(10**6, 10**6), "bytes claims to hold 40000"),
    (torch.zeros(32, dtype=torch.long), "tensors\\): decoder.conv_in.bias torch.int64$"),
    (torch.zeros(32, dtype=torch.complex64), "expected dense floating-point tensors"),
    (torch.zeros(32, dtype=torch.bool), "expected dense floating-point tensors"),
    (torch.zeros(32, device="meta"), "expected dense floating-point tensors"),
    (torch.zeros(32).to_sparse(), "expected dense floating-point tensors"),
    (torch.zeros(32).to(torch.float8_e4m3fn), "expected dense floating-point tensors"),
])  # fmt: skip
def test_tensors_of_other_kinds(tmp_path, state, new, message):
    torch.save({**state, "decoder.conv_in.bias": new}, tmp_path / "movq.ckpt")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "movq.ckpt", dtype=torch.float16)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, state):
    torch.save(state, tmp_path / "movq.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "movq.ckpt") as old,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, bytes(50 << 20) if name.endswith("/data/0") else old.read(name))
    with pytest.raises(CheckpointError, match=r"a file of \d+ bytes claims to hold 5\d{7}"):
        from_pretrained(tmp_path / "bomb.ckpt")


def test_a_header_of_terabytes(tmp_path):
    for declared in (2**40, 2**63, 2**64 - 1):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", declared) + b"{}")
        with pytest.raises(CheckpointError, match="is damaged"):
            from_pretrained(tmp_path / "a.safetensors")
    header = b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="is damaged"):
        from_pretrained(tmp_path / "a.safetensors")


@pytest.mark.parametrize("what", ["pipe", "folder", "device"])
def test_what_is_no_file(tmp_path, what):
    for name in ("model.safetensors", "a.ckpt", "config.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        path = folder / name
        ways = {"pipe": (os.mkfifo, path), "folder": (os.mkdir, path), "device": (os.symlink, "/dev/zero", path)}
        make, *arguments = ways[what]
        make(*arguments)
        readers = [CodeFile.load, load_image] + ([lambda path: from_pretrained(path.parent)] if name != "a.ckpt" else [])
        for read in readers if what == "folder" else [*readers, from_pretrained]:
            with pytest.raises(OSError, match="expected a regular file, got a folder, pipe or device"):
                read(path)


def test_an_error_is_short_and_printable(tmp_path, state):
    name = "decoder.\x1b[2J" + "x" * 10**5
    torch.save({**state, name: torch.zeros(1)}, tmp_path / "movq.ckpt")
    with pytest.raises(CheckpointError, match="1 unexpected: decoder") as raised:
        from_pretrained(tmp_path / "movq.ckpt")
    assert len(str(raised.value)) < 1000 and "\x1b" not in str(raised.value)
    assert printable("a\x1b\n\udcffé\u202e", 9) == "a\\x1b\n\\udcffé\\u202e" and printable("abc", 2) == "ab..."


def test_parse_json():
    assert parse_json('{"a": [1, {"a": null}]}') == {"a": [1, {"a": None}]}
    for text, message in [("[1, 2]", "at most 5 characters"), ('{"a":1,"a":2}', "has a repeated key")]:
        with pytest.raises(ValueError, match=message):
            parse_json(text, 5 if "[" in text else 99)


# --- Codes


NOT_A_SIZE = "expected two positive integers as the size of 'a', got "


@pytest.mark.parametrize(("size", "message"), [
    ("[1e999, 1]", NOT_A_SIZE), ("[true, 1]", NOT_A_SIZE), ('["1", 1]', NOT_A_SIZE), ("[-1, 1]", NOT_A_SIZE),
    ("[0, 1]", NOT_A_SIZE), ('[1, 1], "a": [2, 2]', "has a repeated key"), ("[1, 1, 1]", "is damaged: ValueError"),
    ("[" * 60, "is damaged"), ("[" + "{}," * 10**5 + "{}]", "characters of JSON"),
])  # fmt: skip
def test_sizes(tmp_path, size, message):
    metadata = {"format": FORMAT, "codebook": "x", "sizes": '{"a": ' + size + "}"}
    save_file({"a": torch.zeros(1, 1, dtype=torch.int32)}, tmp_path / "codes.safetensors", metadata=metadata)
    with pytest.raises(CodeFileError, match=message):
        CodeFile.load(tmp_path / "codes.safetensors")


@pytest.mark.parametrize("grid", [torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.int32)])
def test_codes_of_another_kind(tmp_path, grid):
    save_file({"a": grid}, tmp_path / "codes.safetensors", metadata={"format": FORMAT, "codebook": "x", "sizes": '{"a": [1, 1]}'})
    with pytest.raises(CodeFileError, match="expected 'a' to be int32 with 2 dimensions, got "):
        CodeFile.load(tmp_path / "codes.safetensors")


@pytest.mark.parametrize("name", [".", "a/..", "", "\0", "\udcff", "__metadata__", "x" * 5000])
def test_names_that_a_file_of_codes_cannot_hold(tmp_path, name):
    with pytest.raises(ValueError, match="expected an image name"):
        CodeFile("book").add(name, torch.zeros(1, 1), (1, 1))
    if name.isascii() and name != "__metadata__":
        metadata = {"format": FORMAT, "codebook": "x", "sizes": json.dumps({name: [1, 1]})}
        save_file({name: torch.zeros(1, 1, dtype=torch.int32)}, tmp_path / "codes.safetensors", metadata=metadata)
        with pytest.raises(CodeFileError, match="expected an image name"):
            CodeFile.load(tmp_path / "codes.safetensors")


def test_names_of_many_escapes(tmp_path):
    file = CodeFile("book")
    file.add("\U0001f600" * 100, torch.zeros(1, 1), (10**9, 10**9))
    file.save(tmp_path / "codes.safetensors")
    assert CodeFile.load(tmp_path / "codes.safetensors").sizes == file.sizes


# --- Pictures


def png(width, height):
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(10**6))),
        (b"IEND", b""),
    ]
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("size", [(2**31 - 1, 1), (1, 2**31 - 1), (65536, 65536), (0, 0)])
def test_pictures_of_any_declared_size(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png(*size))
    with pytest.raises(ImageError, match=r"cannot read .*a.png: "):
        load_image(tmp_path / "a.png")


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("Ghostscript was started"))
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with pytest.raises(ImageError, match="cannot identify image file"):
        load_image(tmp_path / "a.png")


def test_whatever_pillow_raises(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for error in (
        struct.error("x"),
        MemoryError(),
        OverflowError("x"),
        KeyError("x"),
        zlib.error("x"),
        RecursionError("x"),
        OSError("x"),
    ):
        monkeypatch.setattr(Image.Image, "getexif", lambda self, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ImageError, match=f"cannot read .*a.png: {type(error).__name__}: "):
            load_image(tmp_path / "a.png")


# --- The command line


@pytest.fixture(scope="module")
def model(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("model")
    made = MOVQ(**config())
    made.load_state_dict(state)
    save_pretrained(made, folder)
    return folder


def test_a_name_that_is_no_text_does_not_stop_the_rest(model, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", os.fsdecode(b"b\xff.png"), "c.png"):
        Image.new("RGB", (9, 9)).save(folder / name, format="PNG")
    out = tmp_path / "codes.safetensors"
    assert main(["encode", str(folder), "-o", str(out), "--model", str(model), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "encoded 2, already there 0, failed 1\n" and "b\\udcff.png" in captured.err
    assert list(CodeFile.load(out).codes) == ["a.png", "c.png"]


def test_the_command_line_says_what_is_wrong(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # decode writes to ./decoded
    (tmp_path / "deep.json").write_text("[" * 10**5)
    (tmp_path / "deep.safetensors").write_bytes(struct.pack("<Q", 2**40))
    os.mkfifo(tmp_path / "pipe")
    for arguments, message in [
        (("train", tmp_path, "--config", tmp_path / "deep.json"), "expected .* to hold MOVQ's arguments .*: RecursionError"),
        (("decode", tmp_path / "deep.safetensors", "--model", model), "is damaged"),
        (("decode", tmp_path / "pipe", "--model", model), "expected a regular file"),
        (("info", "--model", tmp_path / "deep.safetensors"), "is damaged"),
        (("info", "--model", tmp_path / "pipe"), "expected a regular file"),
        (("encode", tmp_path, "-o", tmp_path, "--model", model), "expected a regular file"),
    ]:
        assert main([*map(str, arguments), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert re.search(rf"(^|\r)error: .*{message}", error) and "Traceback" not in error, error
