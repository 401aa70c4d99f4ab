"""Options of the decode command."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from shard_files import CODES, file_names, read_rejects, run_decode, size_columns, write_parquet

from movq_ext.bulk import ray_engine, run
from movq_ext.cli import decode, main
from movq_ext.cli.common import memory_size


@pytest.mark.parametrize(
    "text, size", [("7", 7), ("500M", 500 << 20), ("1.5g", 3 << 29), ("2 GiB", 2 << 30), ("4KB", 4096), ("1T", 1 << 40)]
)
def test_memory_sizes(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "5X", "-1", "1.2.3", "0", "9" * 400])
def test_bad_memory_sizes(model_folder, tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        run_decode(model_folder, tmp_path, f"--max-memory={text}")
    assert f"expected a size such as 500M or 8G, got '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize("threads", ["0", "-1", "x", "1025", "99999999999"])
def test_bad_threads(model_folder, tmp_path, capsys, threads):
    with pytest.raises(SystemExit):
        run_decode(model_folder, tmp_path, f"--threads={threads}")
    assert f"--threads: expected a number from 1 to 1024, got '{threads}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "engine, shards, installed, used",
    [("auto", 2, True, "Ray"), ("auto", 1, True, "process"), ("auto", 2, False, "process"), ("process", 2, True, "process")],
)
def test_choice_of_engine(model_folder, tmp_path, monkeypatch, capsys, engine, shards, installed, used):
    for i in range(shards):
        write_parquet(tmp_path / f"in/{i}.parquet", **size_columns())
    monkeypatch.setattr(ray_engine, "run_with_ray", run.run_in_process)
    monkeypatch.setattr(decode, "find_spec", lambda name: installed or None)
    arguments = [tmp_path / "in", "-o", tmp_path / "out", "--model", model_folder, "--device", "cpu", "--engine", engine]
    assert main(["decode", *map(str, arguments)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(used)


def test_images_of_too_many_pixels(model_folder, tmp_path, capsys):
    """A small file of equal codes can ask for an image that takes days. It is rejected, and the others are decoded."""
    codes = pa.array([[[1]], [[1, 2], [3, 4]], [[5, 6, 7], [1, 1, 1]]])
    source = write_parquet(tmp_path / "x.parquet", codes, height=[16384, 4, 4], width=[16384, 4, 6])
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 1
    assert "of at most 67108864 pixels, got 16384 x 16384 (height x width): raise the limit with --max-pixels" in (
        capsys.readouterr().err
    )
    assert run_decode(model_folder, source, "-o", tmp_path / "small", "--max-pixels", "23") == 1
    assert [reject["name"] for reject in read_rejects(tmp_path / "small/x.parquet.rejects.jsonl")] == ["row 0", "row 2"]
    assert run_decode(model_folder, source, "-o", tmp_path / "large", "--max-pixels", str(1 << 28)) == 1
    assert "expected 8192 x 8192 codes" in read_rejects(tmp_path / "large/x.parquet.rejects.jsonl")[0]["reason"]


def test_an_ascii_locale(model_folder, tmp_path):
    """Names that are not ASCII, in files and of files, are written and printed."""
    np.savez(tmp_path / "\u00e9.npz", **{"\u00fc": np.zeros((1, 1), int), "bad \u00e4": np.full((1, 1), CODES)})
    write_parquet(tmp_path / "\u00e9.parquet", pa.array([[1], [CODES]]), name=["\u00fc", "bad \u00e4"])
    out = tmp_path.with_name("ascii")
    command = [sys.executable, "-P", "-m", "movq_ext", "decode", tmp_path, "-o", out, "--model", model_folder]
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([*command, "--device", "cpu", "--engine", "process"], capture_output=True, text=True, env=env, cwd="/")
    assert run.returncode == 1 and "decoded 2, already there 0, failed 2\nshards: done 2, " in run.stdout, run.stderr
    assert run.stderr.count("bad \\xe4: codes must be in") == 2
    outputs = ["\u00e9.parquet", "\u00e9.parquet.rejects.jsonl", "\u00e9/\u00e9.npz.rejects.jsonl", "\u00e9/\u00fc.png"]
    assert file_names(out) == sorted(outputs)
