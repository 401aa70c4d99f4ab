"""What all formats of shards have in common."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import (
    GRIDS,
    SIZES,
    file_names,
    npy_bytes,
    read_rejects,
    run_decode,
    size_columns,
    write_code_file,
    write_parquet,
    write_tar,
)

from movq_ext.bulk.codebook import CODEBOOK_KEY, Codebook
from movq_ext.bulk.find import find_shards
from movq_ext.bulk.parquet import ParquetShard
from movq_ext.bulk.shards import FieldNames
from movq_ext.bulk.webdataset import WebDatasetShard


def test_count_samples(model, tmp_path):
    write_parquet(tmp_path / "in/a.parquet")
    write_code_file(model, tmp_path / "in/b.safetensors")
    write_tar(tmp_path / "in/c.tar", [])
    for name in ("d.parquet", "e.safetensors"):
        (tmp_path / "in" / name).touch()
    assert [shard.count_samples() for shard in find_shards([tmp_path / "in"], tmp_path / "out")] == [6, 6, None, None, None]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_payload_bytes(model, tmp_path, kind):
    if kind == "parquet":
        source = write_parquet(tmp_path / "x.parquet", **size_columns(), photo=[bytes(5000)] * 6)
        shard = ParquetShard(source, tmp_path / "out")
    else:
        source = write_tar(tmp_path / "x.tar", [("0.npy", npy_bytes(GRIDS[0])), ("0.jpg", bytes(5000))])
        shard = WebDatasetShard(source, tmp_path / "out")
    assert all(5000 <= sample.payload_bytes < 5500 for sample in shard.samples(Codebook.from_model(model)))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-700])


def of_another_codebook(path):
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({CODEBOOK_KEY: "0123"}), path)


def without_codes(path):
    pq.write_table(pq.read_table(path).drop_columns(["codes"]), path)


def with_image(path):
    pq.write_table(pq.read_table(path).append_column("image", pa.array([b""] * len(SIZES))), path)


def corrupted(path):
    contents = bytearray(path.read_bytes())
    contents[40:400] = bytes(360)
    path.write_bytes(contents)


@pytest.mark.parametrize(
    "damage, reason",
    [(truncated, "damaged"), (of_another_codebook, "made with codebook 0123"), (without_codes, "must have a column 'codes'"),
     (with_image, "no column 'image'"), (corrupted, "damaged"), ("a header", "no end-of-archive marker"),
     ("its end", "no end-of-archive marker"), ("no tar", "damaged or not an uncompressed tar")],
)  # fmt: skip
def test_bad_shards(model_folder, tmp_path, capsys, damage, reason):
    """A bad shard yields its rejects file alone, other shards are decoded, and a repaired one is decoded by the next run."""
    good = write_parquet(tmp_path / "in/good.parquet", **size_columns())
    if isinstance(damage, str):
        bad = write_tar(tmp_path / "in/bad.tar", [(f"{i}.npy", npy_bytes(GRIDS[i])) for i in range(len(SIZES))])
        whole = bad.read_bytes()
        bad.write_bytes({"a header": whole[:1200], "its end": whole[:1024], "no tar": b"no tar" * 1000 + bytes(1024)}[damage])
    else:
        bad = write_parquet(tmp_path / "in/bad.parquet", **size_columns(), noise=list(np.random.default_rng(0).bytes(600)[:6]))
        whole = bad.read_bytes()
        damage(bad)
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    assert file_names(tmp_path / "out") == [f"{bad.name}.rejects.jsonl", "good.parquet"]
    (reject,) = read_rejects(tmp_path / f"out/{bad.name}.rejects.jsonl")
    assert reject["name"] is None and reject["source"] == str(bad) and reason in reject["reason"]
    captured = capsys.readouterr()
    assert "shards: done 1, already there 0, failed 1" in captured.out and reason in captured.err
    good.unlink()
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 2  # no shard could be decoded
    bad.write_bytes(whole)
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert file_names(tmp_path / "out") == [bad.name, "good.parquet"]


@pytest.mark.parametrize(
    "names, message",
    [
        ({"key": ""}, "key: expected a file's suffix without its leading dot, got ''"),
        ({"key": "../x"}, "key: expected a file's suffix"),
        ({"key": ".npy"}, "key: expected a file's suffix"),
        ({"image_key": "a/b.png"}, "image_key: expected a file's suffix"),
        ({"image_key": "jpg"}, "image_key: expected a suffix that ends in png, got 'jpg'"),
        ({"column": ""}, "column: expected a name, got ''"),
        ({"image_column": ""}, "image_column: expected a name, got ''"),
    ],
)
def test_bad_field_names(model_folder, tmp_path, capsys, names, message):
    with pytest.raises(ValueError, match=message):
        FieldNames(**names)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in names.items()]
    if names != {"key": ".npy"}:  # the command line removes the dot
        assert run_decode(model_folder, write_parquet(tmp_path / "x.parquet"), "-o", tmp_path / "out", *options) == 2
        assert f"--{message.replace('_', '-')}" in capsys.readouterr().err
