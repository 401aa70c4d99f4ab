"""Code files as shards, decoded by the command line."""

import gzip
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import GRIDS, SIZES, expected_pixels, file_names, png_pixels, read_rejects, run_decode, write_code_file

from movq_ext.bulk import image_folder
from movq_ext.bulk.shards import SampleError
from movq_ext.io.codes import CodeFile, codebook_fingerprint


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


# --- Names that would share a file


def write_named(model, path, names):
    file = CodeFile(codebook_fingerprint(model))
    for i, name in enumerate(names):
        file.add(name, torch.full((1, 1), i), (2, 2))
    file.save(path)
    return path


def test_other_spellings_of_a_name(model, model_folder, tmp_path, capsys):
    """Three images were decoded to two files."""
    source = write_named(model, tmp_path / "x.safetensors", ["x/./a.jpg", "x/a.png", "x/a.jpg.jpg", "./b.jpg", "x//c.jpg"])
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    assert "decoded 5, " in capsys.readouterr().out
    assert file_names(tmp_path / "out") == ["b.png", "x/a.jpg.jpg.png", "x/a.jpg.png", "x/a.png.png", "x/c.png"]


SIMILAR = ["x/a.jpg", "X/A.jpg", "x/\u00e9.jpg", "x/e\u0301.jpg", "x./a.jpg"]


def test_names_that_differ_in_case(model, model_folder, tmp_path):
    """They are different files here."""
    source = write_named(model, tmp_path / "x.safetensors", SIMILAR)
    np.savez(tmp_path / "x.npz", **{name: np.zeros((1, 1), int) for name in SIMILAR})
    for path in (source, tmp_path / "x.npz"):
        assert run_decode(model_folder, path, "-o", tmp_path / path.suffix) == 0
        assert len(file_names(tmp_path / path.suffix)) == len(SIMILAR)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_names_that_differ_in_case_on_other_file_systems(model, model_folder, tmp_path, monkeypatch, suffix):
    """exFAT and SMB would overwrite one image with another, or take it for finished."""
    if suffix == ".npz":
        np.savez(tmp_path / "x.npz", **{name: np.zeros((1, 1), int) for name in SIMILAR})
    else:
        write_named(model, tmp_path / "x.safetensors", SIMILAR)
    simulate_file_system(monkeypatch, lambda path: re.sub(r"\.(/|$)", r"\1", unicodedata.normalize("NFC", path).lower()))
    for _ in range(2):
        assert run_decode(model_folder, tmp_path / f"x{suffix}", "-o", tmp_path / "out") == 1
        rejects = read_rejects(tmp_path / f"out/x{suffix}.rejects.jsonl")
        assert len(rejects) == 3
        reasons = {reject["reason"] for reject in rejects}
        assert all(reason.endswith(" of an earlier image are one file on this file system") for reason in reasons), reasons


def simulate_file_system(monkeypatch, spelling):
    """Make os.path.exists find a file that PngNames has created by every path of the same spelling."""
    exists = os.path.exists

    def exists_in_any_spelling(path):
        probe = next((folder for folder in Path(path).parents if folder.name.startswith(".names.")), None)
        return exists(path) if probe is None else spelling(str(path)) in map(spelling, map(str, probe.rglob("*")))

    monkeypatch.setattr(os.path, "exists", exists_in_any_spelling)


def test_names_that_only_some_file_systems_distinguish(tmp_path, monkeypatch):
    """NTFS ignores case, but its \u00df differs from ss."""
    simulate_file_system(monkeypatch, str.lower)
    names = image_folder.PngNames(tmp_path)
    for name in ("stra\u00dfe.png", "strasse.png", "\ufb01.png", "fi.png"):
        names.add(name)
    for name, other in (("STRASSE.png", "strasse.png"), ("Fi.png", "fi.png")):
        with pytest.raises(SampleError, match=f"{name} and {other} of an earlier image are one file on this file system"):
            names.add(name)
    with pytest.raises(SampleError, match="an earlier image has the same name"):
        names.add("strasse.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "ignore, name, other",
    [(str.lower, "a.png", "A.png"), (lambda name: unicodedata.normalize("NFC", name), "\u00e9.png", "e\u0301.png")],
)
def test_file_systems_that_ignore_case(tmp_path, monkeypatch, ignore, name, other):
    """Found by looking for a file under another spelling."""
    names = image_folder.PngNames(tmp_path / "new")
    names.add(name)
    assert not (tmp_path / "new").exists()  # not looked at until two names are similar
    names.add(other)
    assert list((tmp_path / "new").iterdir()) == []
    simulate_file_system(monkeypatch, ignore)
    names = image_folder.PngNames(tmp_path)
    names.add(name)
    with pytest.raises(SampleError, match=f"{other} and {name} of an earlier image are one file on this file system"):
        names.add(other)


def test_names_that_windows_reserves(model, model_folder, tmp_path):
    """They are ordinary names here."""
    names = ["C:/x.jpg", "con.jpg", "a/NUL", "aux/x.jpg", "a:b", "a?.jpg", "a./b", "a /b", "LPT1.x/b"]
    source = write_named(model, tmp_path / "x.safetensors", names)
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    assert len(file_names(tmp_path / "out")) == len(names)
