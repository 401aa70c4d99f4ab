"""All commands through `main`. The options of decode are tested in test_cli_decode.py."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_folders import deny_reading, write_image
from models import SMALL_MOVQ
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from movq_ext import MOVQ, __version__, from_pretrained, save_pretrained
from movq_ext.cli import COMMANDS, main, parser
from movq_ext.demo import PHOTOS, SMALL_MODEL_PATH
from movq_ext.io.codes import CodeFile, encode_image
from movq_ext.training import TrainingConfig

SIZES = {"a.png": (9, 14), "deep/b.png": (1, 1), "c.jpg": (16, 8)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(MOVQ(**SMALL_MOVQ), folder)
    return folder


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    for seed, (name, size) in enumerate(SIZES.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def call(*arguments):
    return main([str(argument) for argument in arguments])


def subparser(*command):
    """The parser of a command, or of the command line itself."""
    top = parser()
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices[command[0]] if command else top


def encode(model, photographs, out, *more):
    photographs = photographs if isinstance(photographs, list) else [photographs]
    return call("encode", *photographs, "-o", out, "--model", model, "--device", "cpu", *more)


def decode(model, codes, out, *more):
    return call("decode", codes, "-o", out, "--model", model, "--device", "cpu", *more)


def test_encode_and_decode_a_folder(model, photographs, tmp_path, capsys):
    codes, out = tmp_path / "codes.safetensors", tmp_path / "out"
    assert encode(model, photographs, codes) == 0
    assert capsys.readouterr().out == "encoded 3, already there 0, failed 0\n"
    assert decode(model, codes, out) == 0
    for name, (height, width) in SIZES.items():
        assert Image.open((out / "photographs" / name).with_suffix(".png")).size == (width, height)
    before = {path: path.stat().st_mtime_ns for path in [codes, *out.rglob("*.png")]}
    capsys.readouterr()
    assert encode(model, photographs, codes) == 0 and decode(model, codes, out) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["encoded 0, already there 3, failed 0", "decoded 0, already there 3, failed 0"]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    (out / "photographs/c.png").unlink()
    assert decode(model, codes, out) == 0 and (out / "photographs/c.png").exists()


def test_one_bad_file_does_not_stop_the_rest(model, photographs, tmp_path, capsys):
    (photographs / "aa.png").write_bytes((photographs / "a.png").read_bytes()[:60])
    codes = tmp_path / "codes.safetensors"
    assert encode(model, photographs, codes) == 1
    captured = capsys.readouterr()
    assert captured.out == "encoded 3, already there 0, failed 1\n"
    assert re.search(r"\rerror: .*/aa.png: ", captured.err) and "Traceback" not in captured.err
    file = CodeFile.load(codes)
    file.codes["photographs/a.png"][0, 0] = 64  # outside the codebook
    file.save(codes)
    assert decode(model, codes, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("decoded 2, already there 0, failed 1\n")
    assert f"error: {codes}: photographs/a.png: codes must be in [0, 64), got values from" in captured.err


def test_two_images_with_the_same_name(model, tmp_path, capsys):
    """Both are named in the error, and nothing is encoded. One file given twice is encoded once."""
    for seed, folder in enumerate(["a/train", "b/train"]):
        write_image(tmp_path / folder / "0001.png", seed)
    codes, (first, second) = tmp_path / "codes.safetensors", [tmp_path / "a/train", tmp_path / "b/train"]
    assert encode(model, [first, second], codes) == 2
    assert f"{first}/0001.png and {second}/0001.png would both be named train/0001.png" in capsys.readouterr().err
    assert encode(model, [tmp_path], codes) == 0
    assert len(CodeFile.load(codes).codes) == 2
    assert encode(model, [first, first / "0001.png"], codes) == 0
    assert "encoded 1, already there 0, failed 0" in capsys.readouterr().out


def test_images_of_the_same_name_in_several_calls(model, tmp_path, capsys):
    """Their folders' names tell them apart. Where these are equal too, the files' contents do."""
    codes, moved = tmp_path / "codes.safetensors", tmp_path / "moved"
    for seed, folder in enumerate(["train", "val", "other/val"]):
        write_image(tmp_path / folder / "0001.png", seed)
    for folder, status, printed in [
        ("train", 0, "encoded 1, already there 0, failed 0\n"),
        ("val", 0, "encoded 1, already there 0, failed 0\n"),
        ("other/val", 1, "encoded 0, already there 0, failed 1\n"),
        ("val", 0, "encoded 0, already there 1, failed 0\n"),
    ]:
        assert encode(model, tmp_path / folder, codes) == status
        captured = capsys.readouterr()
        assert captured.out == printed
        assert ("other/val/0001.png: val/0001.png is already there" in captured.err) == bool(status)
    assert sorted(CodeFile.load(codes).codes) == ["train/0001.png", "val/0001.png"]
    moved.mkdir()
    (tmp_path / "train").rename(moved / "train")
    assert encode(model, moved / "train", codes) == 0
    assert capsys.readouterr().out == "encoded 0, already there 1, failed 0\n"


def test_background_and_frames(model, tmp_path, capsys):
    """The codes are those of the image on its background, and images with more than one frame are counted."""
    Image.new("RGBA", (4, 4), (0, 255, 0, 0)).save(tmp_path / "a.png")
    for options, background in [((), "white"), (("--background", "#102030"), "#102030")]:
        codes = tmp_path / f"{background}.safetensors"
        assert encode(model, tmp_path / "a.png", codes, *options) == 0
        expected = encode_image(from_pretrained(model), Image.new("RGB", (4, 4), background))
        (found,) = CodeFile.load(codes).codes.values()
        assert torch.equal(found, expected.int())
    capsys.readouterr()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert encode(model, tmp_path / "a.gif", tmp_path / "codes.safetensors") == 0
    line = "images with more than one frame or page, encoded from the first: 1"
    assert capsys.readouterr().out == f"encoded 1, already there 0, failed 0\n{line}\n"


def test_what_was_not_encoded_is_reported(model, photographs, tmp_path, monkeypatch, capsys):
    """Other files are counted; an unreadable folder, a broken link and an empty folder are failures."""
    (photographs / "notes.txt").touch()
    (photographs / "new.HEIC").touch()
    assert encode(model, photographs, tmp_path / "codes.safetensors") == 0
    assert capsys.readouterr().out == "encoded 3, already there 0, failed 0\nignored 2: .heic 1, .txt 1\n"
    (photographs / "gone.png").symlink_to("nowhere.png")
    deny_reading(monkeypatch, "deep")
    assert encode(model, photographs, tmp_path / "again.safetensors") == 1
    captured = capsys.readouterr()
    assert captured.out == "encoded 2, already there 0, failed 2\nignored 2: .heic 1, .txt 1\n"
    assert re.search("Permission denied: .*deep", captured.err) and re.search("no such file: .*gone.png", captured.err)
    (tmp_path / "empty").mkdir()
    assert encode(model, [photographs, tmp_path / "empty"], tmp_path / "more.safetensors") == 2
    assert re.search("found no images in .*empty", capsys.readouterr().err)


def test_codes_of_another_codebook(model, photographs, tmp_path, capsys):
    codes, other = tmp_path / "codes.safetensors", tmp_path / "other"
    encode(model, photographs, codes)
    save_pretrained(MOVQ(**SMALL_MOVQ), other)
    for command in (encode(other, photographs, codes), decode(other, codes, tmp_path / "out")):
        assert command == 2
    assert capsys.readouterr().err.count("was made with codebook") == 2


def test_interrupted_encoding_saves_finished_images(model, photographs, tmp_path, monkeypatch, capsys):
    """The next call encodes the rest."""
    encoded = []

    def encode_two(model, image, max_memory):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(image)
        return encode_image(model, image)

    codes = tmp_path / "codes.safetensors"
    monkeypatch.setattr("movq_ext.bulk.image_encoder.encode_image", encode_two)
    assert encode(model, photographs, codes) == 130
    assert capsys.readouterr().err.endswith("interrupted; run the same command again to continue\n")
    assert len(CodeFile.load(codes).codes) == 2
    monkeypatch.undo()
    assert encode(model, photographs, codes) == 0
    assert "encoded 1, already there 2, failed 0\n" in capsys.readouterr().out


@pytest.mark.parametrize("encoded", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("decoded", ["float32", "bfloat16", "float16"])
def test_dtypes(model, photographs, tmp_path, encoded, decoded):
    """Codes depend on the weights in the file, whatever dtype they are cast to."""
    codes = tmp_path / "codes.safetensors"
    assert encode(model, photographs, codes, "--dtype", encoded) == 0
    assert decode(model, codes, tmp_path / "out", "--dtype", decoded) == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_wrong_calls(model, tmp_path, capsys):
    for arguments, message in [
        (("decode", tmp_path / "missing", "--model", model), "error: no such file: .*missing"),
        (("encode", tmp_path / "missing", "--model", model, "-o", tmp_path / "c"), "error: no such file or folder: .*missing"),
        (("info", "--model", tmp_path / "missing"), "error: no such file or folder: .*missing"),
        (("train", tmp_path, "-o", tmp_path / "t"), "error: found no images in "),
        (("train", tmp_path, "--steps", 0), "error: --steps must be positive, got 0"),
        (("demo", tmp_path, "--photo", "cat"), "error: expected --photo to be a file or one of astronaut, .*, got cat"),
    ]:
        assert call(*arguments) == 2
        assert re.search(message, capsys.readouterr().err)
    for arguments, message in [
        (("info", "--device", "meta"), "argument --device: cannot use 'meta'"),
        (("info", "--device", "banana"), "argument --device: cannot use 'banana'"),
        (("info", "--device", "cuda:99"), "argument --device: cannot use 'cuda:99'"),
        (("info", "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("demo", "out", "--size", "0"), "argument --size: expected a positive integer, got '0'"),
        (("export", "--size", "64:"), "argument --size: expected N or MIN:MAX, got '64:'"),
        (("encode", "a", "--background", "b"), "argument --background: expected a colour such as white or #ff8800, got 'b'"),
        (("banana",), "invalid choice: 'banana'"),
    ]:
        with pytest.raises(SystemExit) as stop:
            call(*arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_info(model, capsys):
    assert call("info", "--model", model) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__ and report["model"]["n_embed"] == 64 and report["model"]["downsampling"] == 2
    assert report["attention"] == report["path"] == "native: the CUDA kernels do not run on cpu tensors"


@pytest.mark.parametrize("name", PHOTOS)
def test_demo(tmp_path, capsys, name):
    assert call("demo", tmp_path, "--photo", name, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    original, decoded = (np.asarray(Image.open(path)) for path in (PHOTOS[name], tmp_path / "decoded.png"))
    psnr, ssim = re.search(r"PSNR (\S+) dB, SSIM (\S+)", printed).groups()
    assert float(psnr) == pytest.approx(peak_signal_noise_ratio(original, decoded), abs=0.006)
    assert float(ssim) == pytest.approx(structural_similarity(original, decoded, channel_axis=2), abs=6e-5)
    assert float(psnr) > 20  # a uniform grey image reaches about 12
    assert "path        native: " in printed and "device      cpu" in printed
    both, width = np.asarray(Image.open(tmp_path / "side_by_side.png")), original.shape[1]
    assert np.array_equal(both[:, :width], original) and np.array_equal(both[:, -width:], decoded)
    (codes,) = CodeFile.load(tmp_path / "codes.safetensors").codes.values()
    assert codes.shape == (width // 8, width // 8) and codes.unique().numel() > 300


def test_demo_reports_sizes(tmp_path, capsys):
    """256x256 pixels are 32 * 32 codes of 14 bits: 1792 bytes, 0.219 bits per pixel."""
    assert call("demo", tmp_path, "--size", 256, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    image = Image.open(PHOTOS["astronaut"]).resize((256, 256), Image.Resampling.LANCZOS)
    image.save(tmp_path / "photo.png")
    png, code_file = ((tmp_path / name).stat().st_size / 1e3 for name in ("photo.png", "codes.safetensors"))
    assert "astronaut.png, 256x256, scaled down from 512x512" in printed
    assert re.search(r"codes       32x32 grid, 14 bits per code, \d+ distinct of 16384\n", printed)
    assert f"size        1.8 kB of codes (0.219 bit/pixel); the photograph as PNG: {png:.1f} kB\n" in printed
    assert f"codes.safetensors ({code_file:.1f} kB, 32 bits per code)" in printed


def test_demo_says_what_it_timed(model, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    assert call("demo", tmp_path / "out", "--photo", tmp_path / "photo.png", "--model", model, "--device", "cpu") == 0
    assert re.search(r"time        encode \S+ s, decode \S+ s \(one photograph, after a warm-up; ", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["demo", "encode", "train"])
def test_threads(model, photographs, tmp_path, command, monkeypatch):
    """The number is set before any work, which would start as many threads as there are cores."""
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "model.json").write_text(json.dumps(SMALL_MOVQ))
    options = {
        "demo": (tmp_path / "out", "--photo", tmp_path / "photo.png", "--model", model),
        "encode": (tmp_path / "photo.png", "--model", model, "-o", tmp_path / "codes.safetensors"),
        "train": (photographs, "-o", tmp_path / "out", "--config", tmp_path / "model.json", *"--steps 1 --crop 8".split()),
    }
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    assert call(command, *options[command], "--device", "cpu") == 0 and counts == []
    assert call(command, *options[command], "--device", "cpu", "--threads", 3) == 0 and counts == [3]
    with pytest.raises(SystemExit):
        call(command, *options[command], "--threads", 0)


def test_demo_claims_unseen_photographs_only_for_the_shipped_model(model, tmp_path, capsys):
    own_photo = tmp_path / "photo.png"
    Image.open(PHOTOS["chelsea"]).save(own_photo)
    shipped = ("--photo", "chelsea", "--size", 64)
    for arguments, claimed in [
        (shipped, True),
        ((*shipped, "--model", SMALL_MODEL_PATH / ".." / "small"), True),
        ((*shipped, "--model", model), False),
        (("--photo", own_photo, "--size", 64), False),
    ]:
        assert call("demo", tmp_path / "out", "--device", "cpu", *arguments) == 0
        assert ("(not in the model's training data)" in capsys.readouterr().out) == claimed


def test_the_shipped_model(capsys):
    assert list(PHOTOS) == ["astronaut", "chelsea", "china", "coffee", "honey_bee"]
    assert sum(path.stat().st_size for path in SMALL_MODEL_PATH.iterdir()) < 8 << 20
    call("info", "--device", "cpu")
    report = json.loads(capsys.readouterr().out)["model"]
    assert report["downsampling"] == 8 and report["embed_dim"] == 4


def test_no_command_prints_the_help(capsys):
    assert call() == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: movq-ext ") and captured.err == ""
    for command in COMMANDS.values():
        assert command.SUMMARY in " ".join(captured.out.split())


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        call("--version")
    assert stop.value.code == 0 and capsys.readouterr().out == f"movq-ext {__version__}\n"


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda command: " ".join(command) or "movq-ext")
def test_every_option_has_a_plain_help_text(command, capsys):
    """No markup, no unfilled placeholder, and the default of every option that has one."""
    with pytest.raises(SystemExit) as stop:
        call(*command, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(" ".join(["usage: movq-ext", *command]))
    assert not re.search(r"[`{}%]|:\w+:", re.sub(r"80% |\{\w+(,\w+)+\}", "", text)), text
    for action in subparser(*command)._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help and len(action.help) > 8, action.option_strings
        if action.option_strings and action.nargs != 0:
            assert "(default: " in action.help or action.default is None, action.option_strings


def test_help_of_training_options(capsys):
    with pytest.raises(SystemExit):
        call("train", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainingConfig):
        flag = "--" + field.name.replace("_", "-")
        metavar = field.metadata["metavar"]
        value = {bool: "", tuple: f" {metavar} [{metavar} ...]"}.get(type(field.default), f" {metavar}")
        default = f" (default: {field.default})" if type(field.default) in (int, float) else ""
        assert f"{flag}{value} {field.metadata['help']}{default}" in text


def test_interruption(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("movq_ext.cli.info.build_info", interrupted)
    assert call("info") == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("error", "message"), [
    (MemoryError(), "out of memory"), (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: CUDA out of memory"),
    (RuntimeError("can't allocate memory: 9 bytes"), "out of memory: can't allocate memory: 9 bytes"),
])  # fmt: skip
def test_running_out_of_memory_is_no_traceback(monkeypatch, capsys, error, message):
    def fail():
        raise error

    monkeypatch.setattr("movq_ext.cli.info.build_info", fail)
    assert call("info") == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def call_under_an_ascii_locale(folder, *command):
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}
    arguments = [sys.executable, "-P", "-m", "movq_ext", *map(str, command), "--device", "cpu"]
    return subprocess.run(arguments, env={**os.environ, **locale}, capture_output=True, encoding="ascii", cwd=folder)


def test_names_outside_ascii_under_an_ascii_locale(model, photographs, tmp_path):
    """Their bytes are those of UTF-8."""
    (photographs / "größe.png").write_bytes((photographs / "a.png").read_bytes())
    codes, out = tmp_path / "é.safetensors", tmp_path / "é"
    for command in (("encode", photographs, "-o", codes), ("decode", codes, "-o", out, "--engine", "process")):
        result = call_under_an_ascii_locale(tmp_path, *command, "--model", model)
        assert result.returncode == 0, result.stderr
    assert "photographs/größe.png" in CodeFile.load(codes).codes
    assert (out / "photographs/größe.png").exists()


def test_output_that_standard_output_cannot_encode_is_escaped(model, photographs, tmp_path):
    """The exit status is that of the command: one image failed."""
    (photographs / "größe.png").touch()
    (photographs / "notes.größe").touch()
    result = call_under_an_ascii_locale(tmp_path, "encode", photographs, "-o", tmp_path / "codes.safetensors", "--model", model)
    assert result.returncode == 1, result.stderr
    assert result.stdout.startswith("encoded 3, already there 0, failed 1\n") and ".gr\\udcc3\\udcb6" in result.stdout
    assert "photographs/gr\\udcc3\\udcb6\\udcc3\\udc9fe.png" in result.stderr
    result = call_under_an_ascii_locale(tmp_path, "demo", tmp_path / "é", "--size", 16)
    assert result.returncode == 0 and f"written     {tmp_path}/\\udcc3\\udca9: " in result.stdout
