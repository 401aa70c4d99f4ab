"""Every script in examples/ runs, on tiny inputs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from movq_ext import from_pretrained
from movq_ext.demo import SMALL_MODEL_PATH
from movq_ext.io.codes import CodeFile, codebook_fingerprint

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MAX_LINES = 50


def run_example(name, *arguments, folder):
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def code_file(tmp_path):
    """Return a code file of two images: one of whole cells in a folder, one that ends within a cell."""
    model = from_pretrained(SMALL_MODEL_PATH)
    file = CodeFile(codebook_fingerprint(model))
    file.add("a/whole.jpg", torch.randint(model.quantize.n_e, (2, 3)), (16, 24))
    file.add("cut.jpg", torch.randint(model.quantize.n_e, (1, 2)), (5, 9))
    file.save(tmp_path / "codes.safetensors")
    return tmp_path / "codes.safetensors"


def sizes(folder):
    return {path.relative_to(folder).as_posix(): Image.open(path).size for path in folder.rglob("*.png")}


SIZES = {"a/whole.png": (24, 16), "cut.png": (9, 5)}


def test_decode_codes(code_file, tmp_path):
    run_example("decode_codes.py", code_file, "decoded", folder=tmp_path)
    assert sizes(tmp_path / "decoded") == SIZES


def test_bulk_decode(code_file, tmp_path):
    command = ("bulk_decode.py", code_file, "decoded")
    assert "decoded 2, already there 0, rejected 0" in run_example(*command, folder=tmp_path)
    assert sizes(tmp_path / "decoded") == SIZES
    assert "decoded 0, already there 2, rejected 0" in run_example(*command, folder=tmp_path)


def test_both_decode_to_the_same_pictures(code_file, tmp_path):
    run_example("decode_codes.py", code_file, "one", folder=tmp_path)
    run_example("bulk_decode.py", code_file, "bulk", folder=tmp_path)
    for name in SIZES:
        (other,) = (tmp_path / "bulk").rglob(Path(name).name)
        np.testing.assert_array_equal(Image.open(tmp_path / "one" / name), Image.open(other))


def test_train(photo_folder, tmp_path):
    command = ("train.py", photo_folder, "training", "--batch-size", 1, "--crop", 16, "--steps")
    assert "trained to step 2" in run_example(*command, 2, folder=tmp_path)
    assert "trained to step 3" in run_example(*command, 3, folder=tmp_path)  # resumed
    assert from_pretrained(tmp_path / "training/model").downsampling == 8


def test_diffusers_pipeline(tmp_path):
    pytest.importorskip("diffusers")
    assert "parts replaced" in run_example("diffusers_pipeline.py", "--steps", 1, folder=tmp_path)
    assert sizes(tmp_path) == {"image.png": (64, 64)}


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_tested(example):
    assert len(example.read_text().splitlines()) < MAX_LINES
    assert f'"{example.name}"' in Path(__file__).read_text()
