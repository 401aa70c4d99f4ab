"""Parquet shards, decoded by the command line."""

import io
import os
import signal
import subprocess
import sys
import tracemalloc
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import (
    CODES,
    GRIDS,
    SIZES,
    expected_pixels,
    file_names,
    png_pixels,
    read_rejects,
    run_decode,
    size_columns,
    write_parquet,
)

from movq_ext.bulk import parquet, parquet_child, parquet_reader, run
from movq_ext.bulk.codebook import CODEBOOK_KEY, Codebook
from movq_ext.bulk.parquet import ParquetShard
from movq_ext.bulk.shards import ShardError
from movq_ext.io.codes import codebook_fingerprint


@pytest.mark.parametrize("form", ["rows", "flat", "fixed", "tensor", "large", "int16", "uint64"])
def test_every_type_of_codes(model, model_folder, tmp_path, form):
    codes = [grid.ravel().tolist() for grid in GRIDS]
    if form == "rows":
        codes = pa.array([grid.tolist() for grid in GRIDS])
    elif form == "tensor":
        codes = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([GRIDS[0]] * len(SIZES)))
    elif form == "fixed":
        codes = pa.array([GRIDS[0].ravel().tolist()] * len(SIZES), pa.list_(pa.int32(), GRIDS[0].size))
    else:
        codes = pa.array(codes, pa.large_list(pa.int64()) if form == "large" else pa.list_(getattr(pa, form, pa.int32)()))
    columns = {**size_columns(), "name": list("abcdef"), "when": pa.array(range(6), pa.timestamp("ns")), "tags": [["a"]] * 6}
    if form in ("fixed", "tensor"):
        del columns["height"], columns["width"]
    source = write_parquet(tmp_path / "in/deep/x.parquet", codes, **columns)
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert file_names(tmp_path / "out") == ["deep/x.parquet"]
    before, after = pq.read_table(source), pq.read_table(tmp_path / "out/deep/x.parquet")
    assert after.drop_columns(["image"]).equals(before.drop_columns(["codes"]))
    for i, png in enumerate(after["image"].to_pylist()):
        assert np.array_equal(png_pixels(png), expected_pixels(model, 0 if form in ("fixed", "tensor") else i))


def test_chunks_and_row_groups_keep_the_order(model, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHUNK_BYTES", 300)
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", 2)
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 2)
    source = write_parquet(tmp_path / "x.parquet", **size_columns(), name=[f"n{i}" for i in range(6)])
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    table = pq.ParquetFile(tmp_path / "out/x.parquet")
    assert table.num_row_groups == 3
    assert table.read()["name"].to_pylist() == [f"n{i}" for i in range(6)]
    for i, png in enumerate(table.read()["image"].to_pylist()):
        assert np.array_equal(png_pixels(png), expected_pixels(model, i))


def test_bad_rows(model, model_folder, tmp_path, capsys):
    bad = {
        "codes of another model": ([[0, CODES]], 2, 4, r"codes must be in [0, 64), got values from 0 to 64"),
        "negative": ([[0, -1]], 2, 4, "got values from -1 to 0"),
        "null": (None, 2, 4, "codes must be integers of one or two dimensions, got none"),
        "null code": ([[0, None]], 2, 4, "codes must not contain nulls"),
        "null row": ([None, [0]], 2, 4, "codes must not contain nulls"),
        "ragged": ([[0, 1], [2]], 4, 4, "codes must have rows of equal length"),
        "empty": ([], 2, 4, "got int64 of shape (0,)"),
        "another size": ([[0, 1]], 9, 4, "expected 5 x 2 codes for an image of 9 x 4 pixels (height x width), got shape (1, 2)"),
        "no width": ([[0, 1]], 2, None, "height and width must be integers from 1 to 1048576, got 2 and None"),
        "zero height": ([[0, 1]], 0, 4, "got 0 and 4"),
    }
    codes, height, width, _ = zip(*bad.values(), strict=True)
    columns = {"name": [*bad, "good"], "height": [*height, 8], "width": [*width, 8]}
    write_parquet(tmp_path / "in/x.parquet", pa.array([*codes, GRIDS[0].tolist()], pa.list_(pa.list_(pa.int64()))), **columns)
    write_parquet(tmp_path / "in/y.parquet", **size_columns())
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    found = pq.read_table(tmp_path / "out/x.parquet")
    assert found["name"].to_pylist() == ["good"]
    assert np.array_equal(png_pixels(found["image"][0].as_py()), expected_pixels(model, 0))
    assert pq.read_table(tmp_path / "out/y.parquet").num_rows == len(SIZES)
    rejects = read_rejects(tmp_path / "out/x.parquet.rejects.jsonl")
    assert [reject["name"] for reject in rejects] == list(bad)
    assert {reject["source"] for reject in rejects} == {str(tmp_path / "in/x.parquet")}
    for reject, (*_, reason) in zip(rejects, bad.values(), strict=True):
        assert reason in reject["reason"], reject
    captured = capsys.readouterr()
    assert "decoded 7, already there 0, failed 10\nshards: done 2, already there 0, failed 0\n" in captured.out
    assert "rejects.jsonl" in captured.out and f"error: {tmp_path}/in/x.parquet: negative: codes must be" in captured.err


def test_1d_codes_without_a_size(model_folder, tmp_path):
    source = write_parquet(tmp_path / "x.parquet", pa.array([[1] * 9, [1] * 8]))
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 1
    assert png_pixels(pq.read_table(tmp_path / "out/x.parquet")["image"][0].as_py()).shape == (6, 6, 3)
    (reject,) = read_rejects(tmp_path / "out/x.parquet.rejects.jsonl")
    assert reject["name"] == "row 1"
    assert "1-D codes without height and width must form a square, got 8 codes" in reject["reason"]


def test_codebook_in_the_metadata(model, model_folder, tmp_path):
    source = write_parquet(tmp_path / "x.parquet", **size_columns())
    metadata = {CODEBOOK_KEY.encode(): codebook_fingerprint(model).encode()}
    pq.write_table(pq.read_table(source).replace_schema_metadata(metadata), source)
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    assert pq.read_schema(tmp_path / "out/x.parquet").metadata == metadata


@pytest.mark.parametrize("codes, kind", [([{"a": 1}], "struct<a: int64>"), ([1], "int64"), (["1"], "string")])
def test_codes_that_are_not_a_list(model_folder, tmp_path, codes, kind):
    assert run_decode(model_folder, write_parquet(tmp_path / "x.parquet", pa.array(codes)), "-o", tmp_path / "out") == 1
    (reject,) = read_rejects(tmp_path / "out/x.parquet.rejects.jsonl")
    assert reject["reason"] == f"codes must be a list of integers, got {kind}"


def test_unreadable_rows(model_folder, tmp_path):
    """A name that is not UTF-8 or a date out of range rejects its own row and no other."""
    blobs = pa.array([b"\xff\xfe", b"b", b"c"], pa.binary())
    named = pa.Array.from_buffers(pa.string(), 3, blobs.buffers())
    height = pa.array([2, 2**31 - 1, 2], pa.int32()).cast(pa.date32())
    for column in ({"name": named}, {"height": height, "width": height}):
        source = write_parquet(tmp_path / f"{len(column)}.parquet", pa.array([[1], [2], [3]]), **column)
        assert run_decode(model_folder, source, "-o", tmp_path / "out") == 1
    (first, *_), (_, second, _) = (read_rejects(tmp_path / f"out/{i}.parquet.rejects.jsonl") for i in (1, 2))
    assert first["name"] == "row 0" and "the row cannot be read: UnicodeDecodeError" in first["reason"]
    assert second["name"] == "row 1" and "the row cannot be read: OverflowError" in second["reason"]
    assert pq.read_table(tmp_path / "out/1.parquet").num_rows == 2


def test_without_pyarrow(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert run_decode(model_folder, write_parquet(tmp_path / "x.parquet"), "-o", tmp_path / "out") == 2
    assert "Parquet files need pyarrow: pip install 'movq_ext[parquet]'" in capsys.readouterr().err


def test_codes_under_another_name_beside_an_image(model, model_folder, tmp_path):
    """The image that is already there is kept; without --image-column the shard is refused."""
    table = pa.table({"image": [b"original"] * 6, "tokens": [grid.tolist() for grid in GRIDS], "codes": ["text"] * 6})
    source = tmp_path / "x.parquet"
    pq.write_table(table, source)
    out, names = tmp_path / "out", ("--column", "tokens")
    assert run_decode(model_folder, source, "-o", out, *names) == 2
    reason = read_rejects(out / "x.parquet.rejects.jsonl")[0]["reason"]
    assert "must have a column 'tokens', no column 'image'" in reason and "with --column and --image-column" in reason
    assert run_decode(model_folder, source, "-o", out, *names, "--image-column", "decoded") == 0
    found = pq.read_table(out / "x.parquet")
    assert found.column_names == ["image", "codes", "decoded"]
    assert found.drop_columns(["decoded"]).equals(table.drop_columns(["tokens"]))
    for i, png in enumerate(found["decoded"].to_pylist()):
        height, width = SIZES[i]  # the shard has no sizes, so its images cover the whole grid
        assert np.abs(png_pixels(png)[:height, :width].astype(int) - expected_pixels(model, i)).max() == 0


def test_the_images_may_take_the_name_of_the_codes(model_folder, tmp_path):
    source = write_parquet(tmp_path / "x.parquet")
    assert run_decode(model_folder, source, "-o", tmp_path / "out", "--image-column", "codes") == 0
    assert pq.read_table(tmp_path / "out/x.parquet").column_names == ["codes"]


# --- Files that ask for more memory than they have bytes


def write_run_length_bomb(path):
    """One row of 2**24 equal codes, run-length encoded."""
    codes = pa.ListArray.from_arrays(pa.array([0, 1 << 24], pa.int32()), pa.array(np.zeros(1 << 24, np.int64)))
    pq.write_table(pa.table({"codes": codes}), path)


def write_compressed_bomb(path):
    """Columns are copied on, so they are read too."""
    table = pa.table({"codes": [[1]] * 3, "blob": [bytes(1 << 26)] * 3})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


def write_many_row_groups(path):
    """No batch is large, but all of them together are."""
    table = pa.table({"codes": [[1]] * 128, "blob": [bytes(1 << 20)] * 128})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False, row_group_size=8)


def write_null_columns(path):
    """Rows that take no memory at all until they are samples."""
    pq.write_table(pa.table({"codes": pa.nulls(1 << 21)}), path)


def write_dictionary_bomb(path):
    """One large value that many rows refer to."""
    table = pa.table({"codes": [[1]] * 256, "blob": [bytes(1 << 20)] * 256})
    pq.write_table(table, path, compression="zstd", write_statistics=False)


@pytest.mark.parametrize(
    "write", [write_run_length_bomb, write_compressed_bomb, write_many_row_groups, write_null_columns, write_dictionary_bomb]
)
def test_a_small_file_of_large_contents(model, tmp_path, write):
    write(tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 1 << 16
    codebook, before = Codebook.from_model(model), pa.total_allocated_bytes()
    shard = ParquetShard(tmp_path / "x.parquet", tmp_path / "out.parquet")
    with pytest.raises(ShardError, match=r"x\.parquet: expected at most 67108864 bytes after decompression, got more"):
        for _ in shard.samples(codebook):
            assert pa.total_allocated_bytes() - before < 64 << 20


def test_a_file_may_expand_a_hundredfold(model, tmp_path):
    """Above 64 MiB, the limit follows the file's size."""
    noise = np.random.default_rng(0).bytes(1 << 20)
    table = pa.table({"codes": [[1]] * 40, "blob": [noise + bytes(1 << 20)] * 40})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False, row_group_size=4)
    samples = ParquetShard(tmp_path / "x.parquet", tmp_path / "out.parquet").samples(Codebook.from_model(model))
    assert sum(sample.payload_bytes for sample in samples) > 80 << 20


def test_batches_that_are_too_large_together(model, tmp_path, monkeypatch):
    """Their footer claims little, and the child has memory for one of them."""
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", 1)
    starts = pa.array(range(0, (17 << 20) + 1, 1 << 20), pa.int32())
    codes = pa.ListArray.from_arrays(starts, pa.array(np.zeros(17 << 20, np.int64)))
    pq.write_table(pa.table({"codes": codes}), tmp_path / "x.parquet", row_group_size=1)
    with (
        pytest.raises(ShardError, match=r"expected at most 67108864 bytes after decompression, got more"),
        parquet_reader.open_parquet(tmp_path / "x.parquet") as (_, batches),
    ):
        list(batches)


def test_columns_with_a_dictionary(model_folder, tmp_path):
    """Each batch refers to the whole dictionary, but it takes memory once."""
    noise = np.random.default_rng(0)
    labels = pa.array([noise.bytes(1000) for _ in range(2000)] * 20).dictionary_encode()
    table = pa.table({"codes": [[1]] * 40_000, "label": labels})
    pq.write_table(table, tmp_path / "x.parquet")
    with parquet_reader.open_parquet(tmp_path / "x.parquet") as (_, batches):
        batches = list(batches)
    assert sum(batch.nbytes for batch in batches) > 100 * (tmp_path / "x.parquet").stat().st_size
    assert pa.Table.from_batches(batches).equals(table)
    columns = {"label": pa.array(list("aabbcc")).dictionary_encode(), "name": list("abcdef"), **size_columns()}
    source = write_parquet(tmp_path / "y.parquet", **columns)
    before = pq.read_table(source)
    pq.write_table(before, source, row_group_size=2)
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    assert pq.read_table(tmp_path / "out/y.parquet").drop_columns(["image"]).equals(before.drop_columns(["codes"]))


def test_a_row_of_a_large_dictionary_does_not_fill_a_row_group(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 1 << 16)
    columns = {"label": pa.array([bytes([i]) * (1 << 16) for i in range(6)]).dictionary_encode(), **size_columns()}
    assert run_decode(model_folder, write_parquet(tmp_path / "x.parquet", **columns), "-o", tmp_path / "out") == 0
    assert pq.read_metadata(tmp_path / "out/x.parquet").num_row_groups == 1


@pytest.mark.parametrize("number, hint", [(signal.SIGKILL, "; out of memory?"), (signal.SIGTERM, "")])
def test_a_reader_that_is_killed(tmp_path, monkeypatch, number, hint):
    """The file may be intact."""
    monkeypatch.setattr(parquet_reader, "CHILD", tmp_path / "killed.py")
    (tmp_path / "killed.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    with pytest.raises(ShardError) as info, parquet_reader.open_parquet(write_parquet(tmp_path / "x.parquet")):
        pass
    assert str(info.value) == f"{tmp_path}/x.parquet: the process that read it was killed (signal {int(number)}){hint}"


@pytest.mark.parametrize("executable", [None, ""])
def test_without_a_python_executable(model_folder, tmp_path, monkeypatch, capsys, executable):
    """As in a program that embeds Python."""
    monkeypatch.setattr(sys, "executable", executable)
    assert run_decode(model_folder, write_parquet(tmp_path / "x.parquet"), "-o", tmp_path / "out") == 2
    assert f"reading Parquet needs a Python executable, got sys.executable = {executable!r}" in capsys.readouterr().err


def test_signals_and_printed_text_do_not_reach_the_stream(tmp_path, monkeypatch):
    """Signals for the whole process group, sitecustomize and libraries that print."""
    source, folder = write_parquet(tmp_path / "x.parquet"), tmp_path / "path"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("print('hello')\n")
    (folder / "pyarrow.py").write_text(
        "import os, signal, sys\n"
        "print('hello')\n"
        "os.write(1, b'hello\\n')\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.path.remove({str(folder)!r})\n"
        "del sys.modules['pyarrow']\n"
        "import pyarrow\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    with parquet_reader.open_parquet(source) as (_, batches):
        assert pa.Table.from_batches(batches).equals(pq.read_table(source))
    source.write_bytes(b"PAR1" * 9)
    with pytest.raises(ShardError, match="is damaged or not a Parquet file: ArrowInvalid"), parquet_reader.open_parquet(source):
        pass


def test_a_file_that_crashes_pyarrow(model, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_reader, "CHILD", tmp_path / "crash.py")
    (tmp_path / "crash.py").write_text("import os\nos.abort()\n")
    shard = ParquetShard(write_parquet(tmp_path / "x.parquet"), tmp_path / "out.parquet")
    with pytest.raises(ShardError, match=r"x\.parquet is damaged: reading it crashed pyarrow \(signal 6\)"):
        list(shard.samples(Codebook.from_model(model)))


def test_a_reader_that_is_not_read_to_its_end(model, tmp_path):
    """It ends with the block, even while it writes to a full pipe."""
    source = write_parquet(tmp_path / "x.parquet", photo=[np.random.default_rng(0).bytes(1 << 20)] * len(SIZES))
    with parquet_reader.open_parquet(source) as (schema, _):
        assert schema.names == ["codes", "photo"]


def test_nested_codes_of_many_empty_rows(model, tmp_path):
    """They must not become a Python object each."""
    rows = pa.ListArray.from_arrays(pa.array(np.zeros(10**6 + 1, np.int32)), pa.array([], pa.int64()))
    codes = pa.ListArray.from_arrays(pa.array([0, 10**6], pa.int32()), rows)
    pq.write_table(pa.table({"codes": codes}), tmp_path / "x.parquet")
    tracemalloc.start()
    try:
        (sample,) = ParquetShard(tmp_path / "x.parquet", tmp_path / "out").samples(Codebook.from_model(model))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert "got int64 of shape (1000000, 0)" in sample.problem


@pytest.mark.parametrize("column", ["name", "height"])
def test_a_list_in_place_of_a_name_or_number(model, tmp_path, column):
    source = write_parquet(tmp_path / "x.parquet", **{column: [[1, 2]] * len(SIZES)})
    problems = {sample.problem for sample in ParquetShard(source, tmp_path / "out").samples(Codebook.from_model(model))}
    assert problems == {f"{column}: expected text or a number, got list<element: int64>"}


def test_a_path_that_is_not_utf8(model_folder, tmp_path):
    source = write_parquet(tmp_path / "x.parquet", **size_columns()).rename(tmp_path / os.fsdecode(b"\xff.parquet"))
    for _ in range(2):
        assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    shard = ParquetShard(source, tmp_path / "out" / source.name)
    assert shard.count_samples() == shard.count_images() == len(SIZES)


def test_a_long_footer_is_not_counted(tmp_path, monkeypatch):
    """It could take several hundred times its size."""
    source = write_parquet(tmp_path / "x.parquet")
    assert ParquetShard(source, tmp_path / "out").count_samples() == len(SIZES)
    monkeypatch.setattr(parquet_reader, "MAX_COUNTED_FOOTER_BYTES", 10)
    assert ParquetShard(source, tmp_path / "out").count_samples() is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit memory")
@pytest.mark.parametrize("hard_limit", [None, 16 << 30])
def test_a_footer_that_lies(tmp_path, hard_limit):
    """The footer claims less than a page then takes: only the reader's memory limit helps, even below a hard one."""
    source, peak = tmp_path / "x.parquet", tmp_path / "peak"
    write_compressed_bomb(source)
    honest, data = pq.read_metadata(source).row_group(0).total_byte_size, source.read_bytes()
    assert honest > 1 << 27 and data.count(zigzag(honest)) == 1
    source.write_bytes(data.replace(zigzag(honest), b"\xd0\x8f\x80\x80\0"))  # 1000 in as many bytes
    assert pq.read_metadata(source).row_group(0).total_byte_size == 1000
    program = (
        "import atexit, re, resource, runpy, sys\n"
        f"if {hard_limit}: resource.setrlimit(resource.RLIMIT_DATA, ({hard_limit}, {hard_limit}))\n"
        "status = lambda: open('/proc/self/status').read()\n"
        f"atexit.register(lambda: open({str(peak)!r}, 'w').write(re.search(r'VmHWM:\\s*(\\d+)', status())[1]))\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    command = [sys.executable, "-P", "-c", program, parquet_reader.CHILD, source, "256", str(64 << 20)]
    run = subprocess.run(command, capture_output=True, env={**os.environ, **parquet_reader.CHILD_ENVIRONMENT})
    assert b"expected at most 67108864 bytes after decompression, got more" in run.stderr
    assert int(peak.read_text()) << 10 < 192 << 20  # pyarrow itself takes 80 MiB


def test_a_system_without_vmdata(monkeypatch):
    """The limit then starts from the peak resident size."""
    for status in (io.StringIO("Name: python\n"), FileNotFoundError()):
        monkeypatch.setattr(parquet_child, "open", Mock(side_effect=[status]), raising=False)
        assert parquet_child.allocated_bytes() > 1 << 20


def zigzag(number):
    """Return a positive number as the footer stores it."""
    number, encoded = 2 * number, b""
    while number > 127:
        encoded, number = encoded + bytes([number & 127 | 128]), number >> 7
    return encoded + bytes([number])
