"""Decoding of whole shards, by runs that are interrupted, repeated or concurrent."""

import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shard_files import (
    CODES,
    GRIDS,
    MANY_ROWS,
    MANY_SHARDS,
    SIZES,
    assert_every_image_once,
    file_names,
    modification_times,
    npy_bytes,
    read_rejects,
    run_decode,
    size_columns,
    start_decode,
    wait_for_first_shard,
    write_code_file,
    write_many_shards,
    write_parquet,
    write_tar,
)

from movq_ext.bulk import parquet, run
from movq_ext.bulk.batches import BatchDecoder, Settings
from movq_ext.bulk.code_files import CodeFileShard
from movq_ext.bulk.parquet import ParquetShard
from movq_ext.bulk.run import decode_shard
from movq_ext.bulk.shards import Sample
from movq_ext.bulk.webdataset import WebDatasetShard


def test_chunks(monkeypatch):
    """Every sample is in one chunk; chunks are bounded in bytes and in samples."""
    monkeypatch.setattr(run, "CHUNK_BYTES", 300)
    monkeypatch.setattr(run, "MAX_CHUNK_SAMPLES", 3)
    sizes = [(8, 8), (7, 5), (8, 8), (0, 0), (0, 0), (0, 0), (10, 10), (1, 1)]
    samples = [Sample(str(i), size=size) for i, size in enumerate(sizes)] + [Sample("8", payload_bytes=297), Sample("9")]
    found = [[sample.name for sample in chunk] for chunk in run._chunks(samples)]
    assert found == [["0", "1", "2"], ["3", "4", "5"], ["6"], ["7", "8"], ["9"]]


def test_a_second_run_decodes_only_what_is_missing(model, model_folder, tmp_path, capsys):
    for i in range(3):
        write_parquet(tmp_path / f"in/{i}.parquet", **size_columns())
    write_code_file(model, tmp_path / "in/3.safetensors", [("bad", torch.full((1, 1), CODES), (2, 2))])
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    before = modification_times(tmp_path / "out")
    (tmp_path / "out/1.parquet").unlink()
    (tmp_path / "out/3/4.png").unlink()
    capsys.readouterr()
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    assert "decoded 7, already there 5, failed 1\nshards: done 2, already there 2, failed 0" in capsys.readouterr().out
    after = modification_times(tmp_path / "out")
    changed = {path.name for path in before if before[path] != after[path]}
    assert set(after) == set(before) and changed == {"1.parquet", "4.png", "3.safetensors.rejects.jsonl"}


def test_a_second_run_reports_the_rejects_of_the_first(model_folder, tmp_path, capsys):
    """The first may have been killed before it reported them."""
    write_parquet(tmp_path / "in/x.parquet", pa.array([[1], [CODES], [-1]]))
    for expected in ("decoded 1, already there 0, failed 2", "decoded 0, already there 0, failed 2"):
        assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 1
        captured = capsys.readouterr().out
        assert expected in captured and "rejects.jsonl" in captured


def test_a_single_finished_shard(model_folder, tmp_path, capsys):
    for _ in range(2):
        assert run_decode(model_folder, write_parquet(tmp_path / "x.parquet"), "-o", tmp_path / "out") == 0
    assert "decoded 0, already there 0, failed 0\nshards: done 0, already there 1, failed 0" in capsys.readouterr().out


def test_a_folder_at_the_path_of_the_output(model_folder, tmp_path, capsys):
    """It does not count as a finished shard."""
    source = write_parquet(tmp_path / "x.parquet")
    (tmp_path / "out/x.parquet").mkdir(parents=True)
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 2
    assert f"Is a directory: '{tmp_path}/out" in capsys.readouterr().err.replace("' -> '", "Is a directory: '")


@pytest.mark.parametrize("kind", [ParquetShard, WebDatasetShard])
def test_two_runs_at_once(model_folder, decoder, tmp_path, monkeypatch, kind):
    """The run that finishes first leaves the other's partial files alone, and the other does not need its images."""
    if kind is ParquetShard:
        source = write_parquet(tmp_path / "x.parquet", pa.array([[1], [CODES], [2]]))
    else:
        source = write_tar(tmp_path / "x.tar", [(f"{i}.npy", npy_bytes(np.array([i]))) for i in (1, CODES, 2)])
    shard, real, other = kind(source, tmp_path / "out" / source.name), decoder.decode, []

    def decode(codes):
        if not other:
            with ThreadPoolExecutor(1) as thread:
                other.append(thread.submit(decode_shard, shard, BatchDecoder(Settings(model_folder, "cpu"))).result())
                other.append((modification_times(tmp_path / "out"), read_rejects(shard.rejects_path)))
        return real(codes)

    monkeypatch.setattr(decoder, "decode", decode)
    report = decode_shard(shard, decoder)
    assert (other[0].decoded, other[0].rejected) == (2, 1)
    assert (report.decoded, report.present, report.rejected, report.error) == (2, 0, 1, "")
    assert shard.target in other[1][0] and read_rejects(shard.rejects_path) == other[1][1]
    assert [path.name.split(".")[-2:] for path in other[1][0] if path.name.startswith(".")] == [["output", "partial"]]
    assert file_names(tmp_path / "out") == [source.name, f"{source.name}.rejects.jsonl"]


@pytest.mark.parametrize("kind", [ParquetShard, WebDatasetShard])
def test_shards_are_written_atomically(decoder, tmp_path, monkeypatch, kind):
    """An exception leaves only a hidden log of images behind, and the rejects are written before the images appear."""
    if kind is ParquetShard:
        source = write_parquet(tmp_path / "in/x.parquet", **size_columns())
    else:
        files = [(f"{i}.npy", npy_bytes(GRIDS[i])) for i in range(4)]
        source = write_tar(tmp_path / "in/x.tar", [*files, ("5.txt", b"")])
    shard, seen = kind(source, tmp_path / "out" / source.name), []
    real = decoder.decode

    def decode(codes):
        seen.append(sorted(path.name for path in (tmp_path / "out").iterdir()))
        if len(seen) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(codes)

    monkeypatch.setattr(decoder, "decode", decode)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        decode_shard(shard, decoder)
    assert all(name.startswith(f".{source.name}.") and name.endswith(".partial") for files in seen for name in files)
    (log,) = file_names(tmp_path / "out")
    assert re.fullmatch(rf"\.{source.name}\.\w+\.images\.partial", log)

    def replace(*paths):
        seen.append(file_names(tmp_path / "out"))
        os.rename(*paths)

    monkeypatch.setattr(os, "replace", replace)
    report = decode_shard(shard, decoder)
    images = 6 if kind is ParquetShard else 4
    assert report.present >= 2 and report.decoded + report.present == images
    rejects = [] if kind is ParquetShard else [f"{source.name}.rejects.jsonl"]
    assert file_names(tmp_path / "out") == [source.name, *rejects]
    if kind is WebDatasetShard:
        assert f"{source.name}.rejects.jsonl" in seen[-1] and source.name not in seen[-1]


@pytest.mark.parametrize("kind", [ParquetShard, WebDatasetShard])
def test_a_finished_shard_is_counted_but_not_decoded(decoder, tmp_path, kind):
    """A worker can die after it finished a shard and before it reported."""
    if kind is ParquetShard:
        source = write_parquet(tmp_path / "x.parquet", pa.array([[1], [CODES], [2, 3]]))
    else:
        codes = [np.array([1]), np.array([CODES]), np.array([2, 3])]
        source = write_tar(tmp_path / "x.tar", [(f"{i}.npy", npy_bytes(array)) for i, array in enumerate(codes)])
    shard, progress = kind(source, tmp_path / "out" / source.name), []
    first = decode_shard(shard, decoder)
    before = modification_times(tmp_path / "out")
    second = decode_shard(shard, decoder, progress.append)
    assert (first.decoded, first.present, first.rejected) == (1, 0, 2)
    assert (second.decoded, second.present, second.rejected) == (0, 1, 2)
    assert before == modification_times(tmp_path / "out") and sum(progress) == 3


def test_a_full_disk(decoder, tmp_path, monkeypatch):
    shard = ParquetShard(write_parquet(tmp_path / "x.parquet", **size_columns()), tmp_path / "out/x.parquet")

    @contextmanager
    def disk_full(path):
        yield path.with_suffix(".partial")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "atomic_write", disk_full)
    report = decode_shard(shard, decoder)
    assert "No space left" in report.error and report.decoded == 0 and not shard.target.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG])
def test_a_full_disk_fails_the_shard_of_images(model, model_folder, tmp_path, monkeypatch, capsys, number):
    """Not image by image: the next run decodes them."""

    def disk_full(path, data):
        raise OSError(number, os.strerror(number), str(path))

    source, out = write_code_file(model, tmp_path / "x.safetensors"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", disk_full)
        assert run_decode(model_folder, source, "-o", out) == 2
    captured = capsys.readouterr()
    assert os.strerror(number) in captured.err and "decoded 0, already there 0, failed 0" in captured.out
    assert [reject["name"] for reject in read_rejects(out / "x.safetensors.rejects.jsonl")] == [None]
    assert run_decode(model_folder, source, "-o", out) == 0
    assert file_names(out) == [f"{i}.png" for i in range(len(SIZES))]


def test_two_runs_in_one_folder_of_images(model, model_folder, decoder, tmp_path, monkeypatch):
    """The run that finishes first leaves the other's partial files alone, even if that has not written them to its slow disk."""
    source = write_code_file(model, tmp_path / "x.safetensors")
    shard, real, other = CodeFileShard(source, tmp_path / "out"), Path.write_bytes, []

    def write_bytes(path, data):
        real(path, data)
        if not other:
            other.append(None)
            other[0] = decode_shard(shard, BatchDecoder(Settings(model_folder, "cpu")))
            assert path.exists()

    monkeypatch.setattr(decoder, "threads", 1)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    report = decode_shard(shard, decoder)
    assert (other[0].error, report.error) == ("", "") and other[0].decoded == len(SIZES)
    assert file_names(tmp_path / "out") == [f"{i}.png" for i in range(len(SIZES))]


@pytest.mark.parametrize("in_worker", [False, True])
def test_logs_of_a_finished_shard_are_removed(model_folder, decoder, tmp_path, in_worker):
    """A run can be killed after it wrote the output and before it removed its log."""
    source = write_parquet(tmp_path / "x.parquet", **size_columns())
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    (tmp_path / "out/.x.parquet.0123456789abcdef.images.partial").touch()
    if in_worker:
        decode_shard(ParquetShard(source, tmp_path / "out/x.parquet"), decoder)
    else:
        assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    assert file_names(tmp_path / "out") == ["x.parquet"]


def test_exit_status_with_a_finished_and_a_bad_shard(model_folder, tmp_path):
    write_parquet(tmp_path / "in/good.parquet", **size_columns())
    (tmp_path / "in/bad.parquet").write_bytes(b"bad")
    for _ in range(2):  # good.parquet is decoded by the first run and present in the second
        assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 1


def test_a_killed_run_can_be_restarted(model_folder, tmp_path):
    source, out = write_many_shards(tmp_path / "in"), tmp_path / "out"
    process = start_decode(model_folder, source, out, "--engine", "process")
    wait_for_first_shard(process, out)
    process.kill()
    process.wait()
    before = modification_times(out)
    assert not all((out / f"{i}.parquet").exists() for i in range(MANY_SHARDS))
    for path in out.glob("*.parquet"):
        assert pq.read_table(path).num_rows == MANY_ROWS
    assert run_decode(model_folder, source, "-o", out) == 0
    assert_every_image_once(out)
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path.suffix == ".parquet")


def test_more_rejects_than_fit_in_memory(model_folder, tmp_path, monkeypatch):
    """They are moved to disk, and all are listed."""
    monkeypatch.setattr(run, "MAX_REJECTS_BYTES", 1000)
    source = write_parquet(tmp_path / "x.parquet", pa.array([[CODES + i] for i in range(100)] + [[1]]))
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 1
    reasons = [reject["reason"] for reject in read_rejects(tmp_path / "out/x.parquet.rejects.jsonl")]
    assert len(reasons) == 100 and all(f"values from {CODES + i}" in reason for i, reason in enumerate(reasons))


@pytest.mark.parametrize("kind", [ParquetShard, WebDatasetShard])
def test_a_locked_log_of_a_finished_shard_stays(model_folder, tmp_path, kind):
    """Its run is alive and has not noticed yet that another has finished the shard."""
    name = "x.parquet" if kind is ParquetShard else "x.tar"
    write = write_parquet if kind is ParquetShard else lambda path: write_tar(path, [("0.npy", npy_bytes(GRIDS[0]))])
    source = write(tmp_path / name)
    shard = kind(source, tmp_path / "out" / name)
    with shard.open_images(b"weights") as images:
        images.add(Sample("0", torch.from_numpy(GRIDS[0]), (8, 8)), b"png")
        for _ in range(2):  # the first run decodes the shard, the second finds it finished
            assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
            assert len(file_names(tmp_path / "out")) == 2
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    assert file_names(tmp_path / "out") == [name]
