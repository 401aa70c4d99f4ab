import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from movq_ext import MOVQ, save_pretrained
from movq_ext.cli import main
from movq_ext.demo import PHOTOS, SMALL_MODEL
from movq_ext.io.codes import CodeFile
from movq_ext.training import TrainingConfig

DDCONFIG = dict(
    ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=(), in_channels=3, resolution=32, z_channels=4
)
SIZES = {"a.png": (9, 14), "deep/b.png": (1, 1), "c.jpg": (16, 8)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(MOVQ(DDCONFIG, 64, 4), folder)
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


def encode(model, photographs, out, *more):
    photographs = photographs if isinstance(photographs, list) else [photographs]
    return call("encode", *photographs, "-o", out, "--model", model, "--device", "cpu", *more)


def decode(model, codes, out, *more):
    return call("decode", codes, "-o", out, "--model", model, "--device", "cpu", *more)


def test_a_folder_there_and_back(model, photographs, tmp_path, capsys):
    codes, out = tmp_path / "codes.safetensors", tmp_path / "out"
    assert encode(model, photographs, codes) == 0
    assert capsys.readouterr().out == "encoded 3, already there 0, failed 0\n"
    assert decode(model, codes, out) == 0
    for name, (height, width) in SIZES.items():
        assert Image.open((out / name).with_suffix(".png")).size == (width, height)
    before = {path: path.stat().st_mtime_ns for path in [codes, *out.rglob("*.png")]}
    capsys.readouterr()
    assert encode(model, photographs, codes) == 0 and decode(model, codes, out) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["encoded 0, already there 3, failed 0", "decoded 0, already there 3, failed 0"]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    (out / "c.png").unlink()
    assert decode(model, codes, out) == 0 and (out / "c.png").exists()


def test_one_bad_file_does_not_stop_the_rest(model, photographs, tmp_path, capsys):
    (photographs / "aa.png").write_bytes((photographs / "a.png").read_bytes()[:60])
    codes = tmp_path / "codes.safetensors"
    assert encode(model, photographs, codes) == 1
    captured = capsys.readouterr()
    assert captured.out == "encoded 3, already there 0, failed 1\n"
    assert re.search(r"\rerror: .*/aa.png: ", captured.err) and "Traceback" not in captured.err
    file = CodeFile.load(codes)
    file.codes["a.png"][0, 0] = 64  # outside the codebook
    file.save(codes)
    assert decode(model, codes, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("decoded 2, already there 0, failed 1\n")
    assert f"error: {codes}: a.png: codes must be in [0, 64), got values from" in captured.err


def test_two_pictures_of_one_name(model, photographs, tmp_path, capsys):
    assert encode(model, [photographs, photographs / "a.png"], tmp_path / "codes.safetensors") == 1
    assert "another picture of this call has the same name" in capsys.readouterr().err


def test_the_codebook_must_be_the_models(model, photographs, tmp_path, capsys):
    codes, other = tmp_path / "codes.safetensors", tmp_path / "other"
    encode(model, photographs, codes)
    save_pretrained(MOVQ(DDCONFIG, 64, 4), other)
    for command in (encode(other, photographs, codes), decode(other, codes, tmp_path / "out")):
        assert command == 2
    assert capsys.readouterr().err.count("was made with codebook") == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(model, photographs, tmp_path, dtype):
    codes = tmp_path / "codes.safetensors"
    assert encode(model, photographs, codes, "--dtype", dtype) == 0
    assert decode(model, codes, tmp_path / "out", "--dtype", dtype) == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_wrong_calls(model, tmp_path, capsys):
    for arguments, message in [
        (("decode", tmp_path / "missing", "--model", model), "error: no such file: .*missing"),
        (("encode", tmp_path / "missing", "--model", model, "-o", tmp_path / "c"), "error: no such file or folder: .*missing"),
        (("info", "--model", tmp_path / "missing"), "error: no such file or folder: .*missing"),
        (("train", tmp_path, "-o", tmp_path / "t"), "error: found no images in "),
        (("train", tmp_path, "--steps", 0), "error: steps must be positive, got 0"),
    ]:
        assert call(*arguments) == 2
        assert re.search(message, capsys.readouterr().err)
    for arguments, message in [
        (("info", "--device", "meta"), "argument --device: cannot use 'meta'"),
        (("info", "--device", "banana"), "argument --device: cannot use 'banana'"),
        (("info", "--device", "cuda:99"), "argument --device: cannot use 'cuda:99'"),
        (("info", "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        ((), "the following arguments are required"),
    ]:
        with pytest.raises(SystemExit) as stop:
            call(*arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_info(model, capsys):
    assert call("info", "--model", model) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__ and report["model"]["n_embed"] == 64 and report["model"]["downsampling"] == 2


@pytest.mark.parametrize("name", PHOTOS)
def test_demo(tmp_path, capsys, name):
    assert call("demo", tmp_path, "--photo", name, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    original, decoded = (np.asarray(Image.open(path)) for path in (PHOTOS[name], tmp_path / "decoded.png"))
    psnr, ssim = re.search(r"PSNR (\S+) dB, SSIM (\S+)", printed).groups()
    assert float(psnr) == pytest.approx(peak_signal_noise_ratio(original, decoded), abs=0.006)
    assert float(ssim) == pytest.approx(structural_similarity(original, decoded, channel_axis=2), abs=6e-5)
    assert float(psnr) > 20  # what a grey picture reaches is about 12
    assert "path        native: " in printed and "device      cpu" in printed
    both = np.asarray(Image.open(tmp_path / "side_by_side.png"))
    assert np.array_equal(both[:, :256], original) and np.array_equal(both[:, -256:], decoded)
    (codes,) = CodeFile.load(tmp_path / "codes.safetensors").codes.values()
    assert codes.shape == (32, 32) and codes.unique().numel() > 300


def test_the_shipped_model(capsys):
    assert len(PHOTOS) == 4
    assert sum(path.stat().st_size for path in SMALL_MODEL.iterdir()) < 8 << 20
    call("info", "--device", "cpu")
    report = json.loads(capsys.readouterr().out)["model"]
    assert report["downsampling"] == 8 and report["embed_dim"] == 4


def test_as_a_program(tmp_path):
    run = subprocess.run(
        [sys.executable, "-P", "-m", "movq_ext", "demo", tmp_path / "out", "--device", "cpu"], capture_output=True, text=True
    )
    assert run.returncode == 0 and "PSNR" in run.stdout and run.stderr == ""


def test_help_says_what_every_training_option_is(capsys):
    with pytest.raises(SystemExit):
        call("train", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainingConfig):
        flag = "--" + field.name.replace("_", "-")
        value = "" if isinstance(field.default, bool) else f" {field.name.upper()}"
        default = "" if isinstance(field.default, bool) else f" ({field.default})"
        assert f"{flag}{value} {field.metadata['help']}{default}" in text


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("movq_ext.cli.build_info", interrupted)
    assert call("info") == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on from what is there\n"
