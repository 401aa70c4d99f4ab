"""Parquet shards, decoded by the command line."""

import sys

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

from movq_ext.bulk import parquet, run
from movq_ext.bulk.codebook import CODEBOOK_KEY
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
    monkeypatch.setattr(parquet, "BATCH_ROWS", 2)
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
        "empty": ([], 2, 4, "got float64 of shape (0,)"),
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
