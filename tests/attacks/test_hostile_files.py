"""Hostile files, given to the readers and to the command line."""

import os
import re
import struct

import pytest
import torch
from checkpoints import make_movq
from PIL import Image

from movq_ext import CheckpointError, from_pretrained, save_pretrained
from movq_ext.cli import main
from movq_ext.io.codes import CodeFile
from movq_ext.io.images import load_image


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_read(tmp_path, kind):
    create = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}[kind]
    for name in ("model.safetensors", "a.ckpt", "config.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        path = folder / name
        create(path)
        readers = [CodeFile.load, load_image] + ([lambda path: from_pretrained(path.parent)] if name != "a.ckpt" else [])
        for read in readers if kind == "folder" else [*readers, from_pretrained]:
            with pytest.raises(OSError, match="expected a regular file, got a folder, pipe or device"):
                read(path)


def test_an_error_is_short_and_printable(tmp_path):
    name = "decoder.\x1b[2J" + "x" * 10**5
    torch.save({**make_movq().state_dict(), name: torch.zeros(1)}, tmp_path / "movq.ckpt")
    with pytest.raises(CheckpointError, match="1 unexpected: decoder") as raised:
        from_pretrained(tmp_path / "movq.ckpt")
    assert len(str(raised.value)) < 1000 and "\x1b" not in str(raised.value)


# --- The command line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(make_movq(), folder)
    return folder


def test_a_name_that_is_not_utf8_does_not_stop_the_rest(model, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", os.fsdecode(b"b\xff.png"), "c.png"):
        Image.new("RGB", (9, 9)).save(folder / name, format="PNG")
    out = tmp_path / "codes.safetensors"
    assert main(["encode", str(folder), "-o", str(out), "--model", str(model), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "encoded 2, already there 0, failed 1\n" and "b\\udcff.png" in captured.err
    assert list(CodeFile.load(out).codes) == ["images/a.png", "images/c.png"]


def test_the_command_line_reports_bad_files(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # decode writes to ./decoded by default
    (tmp_path / "deep.json").write_text("[" * 10**5)
    (tmp_path / "deep.safetensors").write_bytes(struct.pack("<Q", 2**40))
    os.mkfifo(tmp_path / "pipe")
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    for arguments, message in [
        (("train", tmp_path, "--config", tmp_path / "deep.json"), "expected .* to hold MOVQ's arguments .*: RecursionError"),
        (("decode", tmp_path / "deep.safetensors", "--model", model), "is damaged"),
        (("decode", tmp_path / "pipe", "--model", model), "expected a regular file"),
        (("info", "--model", tmp_path / "deep.safetensors"), "is damaged"),
        (("info", "--model", tmp_path / "pipe"), "expected a regular file"),
        (("encode", tmp_path, "-o", tmp_path / "pipe", "--model", model), "expected a regular file"),
        (("encode", tmp_path, "-o", tmp_path, "--model", model), "is damaged"),
    ]:
        assert main([*map(str, arguments), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert re.search(rf"(^|\r)error: .*{message}", error) and "Traceback" not in error, error
