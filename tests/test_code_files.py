"""Code files as shards, decoded by the command line."""

import gzip

import numpy as np
import pytest
import torch
from shard_files import GRIDS, SIZES, expected_pixels, file_names, png_pixels, read_rejects, run_decode, write_code_file


def test_a_folder_of_code_files(model, model_folder, tmp_path):
    write_code_file(model, tmp_path / "in/a/x.safetensors")
    write_code_file(model, tmp_path / "in/y.safetensors")
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert file_names(tmp_path / "out") == sorted(f"{folder}/{i}.png" for folder in ("a/x", "y") for i in range(len(SIZES)))
    for i in range(len(SIZES)):
        assert np.array_equal(png_pixels((tmp_path / f"out/a/x/{i}.png").read_bytes()), expected_pixels(model, i))


def test_a_code_file_without_suffix(model, model_folder, tmp_path):
    """The encode command writes to any name."""
    assert run_decode(model_folder, write_code_file(model, tmp_path / "codes"), "-o", tmp_path / "out") == 0
    assert file_names(tmp_path / "out") == [f"{i}.png" for i in range(len(SIZES))]


def test_names_that_cannot_be_written(model, model_folder, tmp_path):
    """A name that is too long, and one below another image's path, are rejected; the other images are decoded."""
    codes = torch.from_numpy(GRIDS[0])
    bad = [("n" * 300, codes, SIZES[0]), ("0.png/below", codes, SIZES[0])]
    source = write_code_file(model, tmp_path / "x.safetensors", bad)
    for _ in range(2):
        assert run_decode(model_folder, source, "-o", tmp_path / "out") == 1
        found = read_rejects(tmp_path / "out/x.safetensors.rejects.jsonl")
        assert {reject["name"] for reject in found} == {bad[0][0], bad[1][0]} and "File name too long" in str(found)
        assert len(list((tmp_path / "out").glob("*.png"))) == 6


@pytest.mark.parametrize("name", ["x.gz", "part-0"])
def test_a_file_of_another_format(model_folder, tmp_path, name):
    """An unknown suffix means a code file, so the message must allow for another format."""
    (tmp_path / name).write_bytes(gzip.compress(bytes(10240)))
    assert run_decode(model_folder, tmp_path / name, "-o", tmp_path / "out") == 2
    (reject,) = read_rejects(tmp_path / f"out/{name}.rejects.jsonl")
    assert f"{name} is damaged or not a code file: " in reject["reason"]
