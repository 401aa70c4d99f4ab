"""Interrupted runs lose no finished image: every image is written as it is made."""

import gzip
import os
import re
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shard_files import (
    CODES,
    GRIDS,
    SIZES,
    file_names,
    npy_bytes,
    read_tar,
    run_decode,
    size_columns,
    start_decode,
    write_code_file,
    write_parquet,
    write_tar,
)

from movq_ext import from_pretrained, save_pretrained
from movq_ext.bulk.batches import BatchDecoder, Settings
from movq_ext.bulk.find import find_shards
from movq_ext.bulk.image_log import ImageLog
from movq_ext.bulk.run import decode_shard
from movq_ext.bulk.shards import Sample

FORMATS = ["safetensors", "npz", "parquet", "tar", "tar.gz"]


def write_shard(model, folder, form):
    """Write GRIDS as a shard and return its path."""
    if form == "safetensors":
        return write_code_file(model, folder / "x.safetensors")
    if form == "parquet":
        return write_parquet(folder / "x.parquet", **size_columns(), name=[str(i) for i in range(len(SIZES))])
    if form == "npz":
        folder.mkdir(exist_ok=True)
        np.savez(folder / "x.npz", **{str(i): grid for i, grid in enumerate(GRIDS)})
        return folder / "x.npz"
    source = write_tar(folder / "x.tar", [(f"{i}.npy", npy_bytes(grid)) for i, grid in enumerate(GRIDS)])
    if form == "tar.gz":
        source.with_suffix(".tar.gz").write_bytes(gzip.compress(source.read_bytes()))
        return source.with_suffix(".tar.gz")
    return source


def read_images(out, form):
    """Return the PNGs of a finished shard, in the order of GRIDS."""
    if form in ("safetensors", "npz"):
        return [(out / f"{i}.png").read_bytes() for i in range(len(SIZES))]
    if form == "parquet":
        return pq.read_table(out / "x.parquet")["image"].to_pylist()
    return list(read_tar(out / "x.tar").values())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, TypeError])
def test_an_interrupted_shard_resumes(model, model_folder, tmp_path, monkeypatch, capsys, form, error):
    """The images decoded before an interrupt or error are written and counted, and the next run decodes only the others."""
    source, out, progress, real = write_shard(model, tmp_path, form), tmp_path / "out", [], BatchDecoder.decode
    (whole,) = find_shards([write_shard(model, tmp_path / "whole", form)], tmp_path / "expected")
    calls = []

    def decode(self, codes):
        calls.append(len(codes))
        if len(calls) == 4:
            raise error("stop")
        return real(self, codes)

    decoder = BatchDecoder(Settings(model_folder, "cpu"))
    decode_shard(whole, decoder)
    monkeypatch.setattr(BatchDecoder, "decode", decode)
    with pytest.raises(error):
        decode_shard(find_shards([source], out)[0], decoder, progress.append)
    assert sum(progress) == 3
    assert run_decode(model_folder, source, "-o", out) == 0
    assert "decoded 3, already there 3, failed 0" in capsys.readouterr().out and len(calls) == 4 + 3
    assert read_images(out, form) == read_images(tmp_path / "expected", form)
    assert file_names(out) == file_names(tmp_path / "expected")


@pytest.mark.parametrize("form", FORMATS)
def test_running_out_of_memory_loses_no_image(model, model_folder, tmp_path, monkeypatch, capsys, form):
    """Here, the retry is interrupted."""
    source, out, real, calls = write_shard(model, tmp_path, form), tmp_path / "out", BatchDecoder.decode, []

    def decode(self, codes):
        calls.append(len(codes))
        if len(calls) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, codes)

    monkeypatch.setattr(BatchDecoder, "decode", decode)
    assert run_decode(model_folder, source, "-o", out) == 130
    assert "interrupted; run the same command again to continue" in capsys.readouterr().err
    assert run_decode(model_folder, source, "-o", out) == 0
    assert "decoded 4, already there 2, failed 0" in capsys.readouterr().out


ROWS, SIDE = 300, 24


def write_many_images(model, folder, form):
    """Write a shard that takes a few seconds."""
    codes = np.random.default_rng(0).integers(0, CODES, (ROWS, SIDE, SIDE), dtype=np.int32)
    if form == "npz":
        folder.mkdir()
        np.savez(folder / "x.npz", tokens=codes, label=np.arange(ROWS))
        return folder / "x.npz"
    return write_parquet(folder / "x.parquet", **{"codes": ["text"] * ROWS, "tokens": pa.array(codes.reshape(ROWS, -1).tolist())})


def finished_images(out, form):
    """Return the number of images that are written, or an estimate for a log."""
    if form == "npz":
        return len(list(out.glob("*.png")))
    return sum(log.stat().st_size for log in out.glob(".*.images.partial")) // (3 * (2 * SIDE) ** 2)


@pytest.mark.parametrize(
    "form, number, engine",
    [("npz", signal.SIGINT, "process"), ("parquet", signal.SIGTERM, "process"), ("parquet", signal.SIGINT, "ray")],
)
def test_signals(model, model_folder, tmp_path, capsys, form, number, engine):
    """The images that the bar counted are there, and the run that resumes decodes only the others."""
    source, out = write_many_images(model, tmp_path / "in", form), tmp_path / "out"
    process, log = start_decode(model_folder, source, out, "--column", "tokens", "--engine", engine), out.with_suffix(".log")
    end = time.monotonic() + 120
    while finished_images(out, form) < 20 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, number)
    status, text = process.wait(180), log.read_text()
    assert status == 128 + number, text
    assert ("interrupted" if number == signal.SIGINT else "terminated") + "; run the same command again to continue" in text
    counted = int(re.findall(r"\b(\d+)/300 ", text)[-1])
    assert run_decode(model_folder, source, "-o", out, "--column", "tokens") == 0
    summary = re.search(r"^decoded (\d+), already there (\d+), failed 0$", capsys.readouterr().out, re.MULTILINE)
    decoded, present = map(int, summary.groups())
    assert decoded + present == ROWS and present >= 10 and (engine == "ray" or present == counted)
    if form == "npz":
        assert file_names(out) == [f"{i:08}.png" for i in range(ROWS)]
    else:
        assert file_names(out) == ["x.parquet"] and pq.read_metadata(out / "x.parquet").num_rows == ROWS


# --- The log of finished images


@pytest.fixture
def samples():
    return [Sample(str(i), torch.arange(4 * i, 4 * i + 4).view(2, 2), (4, 4)) for i in range(3)]


def log_files(folder):
    return sorted(folder.glob(".*.images.partial"))


def test_a_log_that_was_cut_off_or_damaged(tmp_path, samples):
    """The images before the damage are found."""
    with ImageLog(tmp_path / "x.tar", b"weights") as images:
        for sample in samples:
            images.add(sample, sample.name.encode() * 100)
        assert [images.read(sample)[:1] for sample in samples] == [b"0", b"1", b"2"]
    (log,) = log_files(tmp_path)
    whole = log.read_bytes()
    damaged = bytearray(whole)
    damaged[-50] ^= 1
    huge = whole[: 2 * 144 + 32] + b"\xff" * 8 + whole[2 * 144 + 40 :]  # the size that the third record claims
    cut_off = [(whole, 3), (whole[:-1], 2), (whole[: 2 * 144 + 5], 2), (whole[:100], 0), (b"", 0)]
    for contents, found in [*cut_off, (damaged, 2), (huge, 2)]:
        log.write_bytes(contents)
        with ImageLog(tmp_path / "x.tar", b"weights") as images:
            assert [sample in images for sample in samples] == [i < found for i in range(3)], found
            if found == 2:
                assert images.read(samples[1]) == b"1" * 100


def test_a_log_of_another_model_or_other_codes(tmp_path, samples):
    with ImageLog(tmp_path / "x.tar", b"weights") as images:
        images.add(samples[0], b"png")
    first = samples[0]
    for name, weights, sample, found in [
        ("x.tar", b"weights", first, True),
        ("x.tar", b"others", first, False),
        ("y.tar", b"weights", first, False),
        ("x.tar", b"weights", Sample("0", first.codes + 1, (4, 4)), False),
        ("x.tar", b"weights", Sample("0", first.codes, (4, 3)), False),
        ("x.tar", b"weights", Sample("0", first.codes.view(1, 4), (4, 4)), False),
    ]:
        with ImageLog(tmp_path / name, weights) as images:
            assert (sample in images) is found


def test_another_model_does_not_reuse_the_images(model, model_folder, tmp_path, monkeypatch, capsys):
    """One output file never mixes two models' images."""
    other = from_pretrained(model_folder)
    other.decoder.conv_out.bias.data += 1
    save_pretrained(other, tmp_path / "other")
    source, out, real, calls = write_shard(model, tmp_path, "parquet"), tmp_path / "out", BatchDecoder.decode, []

    def decode(self, codes):
        calls.append(len(codes))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, codes)

    monkeypatch.setattr(BatchDecoder, "decode", decode)
    assert run_decode(model_folder, source, "-o", out) == 130
    assert run_decode(tmp_path / "other", source, "-o", out) == 0
    assert "decoded 6, already there 0" in capsys.readouterr().out and file_names(out) == ["x.parquet"]


def test_a_full_disk_keeps_the_log_readable(tmp_path, samples, monkeypatch):
    real, sizes = os.write, []

    def write(file, data):
        sizes.append(len(data))
        if len(sizes) == 2:
            real(file, data[:7])
            raise OSError(28, "No space left on device")
        return real(file, data)

    with ImageLog(tmp_path / "x.tar", b"weights") as images:
        images.add(samples[0], b"0" * 100)
        monkeypatch.setattr(os, "write", write)
        sizes.append(0)
        with pytest.raises(OSError, match="No space left"):
            images.add(samples[1], b"1" * 100)
        monkeypatch.undo()
        images.add(samples[2], b"2" * 100)
        assert [sample in images for sample in samples] == [True, False, True]
    with ImageLog(tmp_path / "x.tar", b"weights") as images:
        assert [sample in images for sample in samples] == [True, False, True] and images.read(samples[2]) == b"2" * 100
