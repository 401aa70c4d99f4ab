import gzip
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from movq_ext import MOVQ, cli, from_pretrained, save_pretrained
from movq_ext.bulk import ray_engine, run, shards
from movq_ext.bulk.run import BatchDecoder, Settings, decode_shard, peak_values
from movq_ext.bulk.shards import Codebook, ParquetShard, Sample, WebDatasetShard, find_shards
from movq_ext.cli import main, memory_size
from movq_ext.io.codes import CodeFile, codebook_id, decode_image
from movq_ext.io.files import atomic_write, remove_partial_files

DDCONFIG = dict(
    ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=(), in_channels=3, resolution=32, z_channels=4
)
CODES = 64
CELL = 2
SIZES = [(8, 8), (7, 5), (8, 8), (1, 2), (16, 4), (7, 5)]  # pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    save_pretrained(MOVQ(DDCONFIG, CODES, 4), path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return from_pretrained(folder)


@pytest.fixture(scope="module")
def decoder(folder):
    return BatchDecoder(Settings(folder, "cpu"))


def grid(size, seed=0):
    shape = tuple(-(-side // CELL) for side in size)
    return np.random.default_rng(seed).integers(0, CODES, shape)


GRIDS = [grid(size, seed) for seed, size in enumerate(SIZES)]


def wanted(model, i):
    return np.asarray(decode_image(model, torch.from_numpy(GRIDS[i]), SIZES[i]))


def pixels(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image)


def parquet(path, codes=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    codes = pa.array([grid.tolist() for grid in GRIDS]) if codes is None else codes
    pq.write_table(pa.table({"codes": codes, **columns}), path, row_group_size=4)
    return path


def sides():
    return {"height": [size[0] for size in SIZES], "width": [size[1] for size in SIZES]}


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def webdataset(path, samples):
    """samples: (name in the tar, contents) of every file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in samples:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def call(folder, *arguments):
    return main(["decode", *map(str, arguments), "--model", str(folder), "--device", "cpu", "--engine", "process"])


# --- What shards hold, and what is made of them


@pytest.mark.parametrize("form", ["rows", "flat", "fixed", "tensor", "large", "int16", "uint64"])
def test_parquet(model, folder, tmp_path, form):
    codes = [grid.ravel().tolist() for grid in GRIDS]
    if form == "rows":
        codes = pa.array([grid.tolist() for grid in GRIDS])
    elif form == "tensor":
        codes = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([GRIDS[0]] * len(SIZES)))
    elif form == "fixed":
        codes = pa.array([GRIDS[0].ravel().tolist()] * len(SIZES), pa.list_(pa.int32(), GRIDS[0].size))
    else:
        codes = pa.array(codes, pa.large_list(pa.int64()) if form == "large" else pa.list_(getattr(pa, form, pa.int32)()))
    columns = {**sides(), "name": list("abcdef"), "when": pa.array(range(6), pa.timestamp("ns")), "tags": [["a"]] * 6}
    if form in ("fixed", "tensor"):
        del columns["height"], columns["width"]
    source = parquet(tmp_path / "in/deep/x.parquet", codes, **columns)
    assert call(folder, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["deep/x.parquet"]
    before, after = pq.read_table(source), pq.read_table(tmp_path / "out/deep/x.parquet")
    assert after.drop_columns(["image"]).equals(before.drop_columns(["codes"]))
    for i, png in enumerate(after["image"].to_pylist()):
        assert np.array_equal(pixels(png), wanted(model, 0 if form in ("fixed", "tensor") else i))


def test_webdataset(model, folder, tmp_path):
    samples = []
    for i, size in enumerate(SIZES):
        codes = GRIDS[i].astype(np.int32) if i % 2 else GRIDS[i].ravel()
        size = {"height": size[0], "width": size[1], "caption": "café"}
        samples += [(f"deep/{i}.cls", b"7"), (f"deep/{i}.npy", npy(codes)), (f"deep/{i}.json", json.dumps(size).encode())]
    samples.insert(0, ("deep/0.of.more.words", b"kept"))
    source = webdataset(tmp_path / "x.tar", [*samples, ("a.b/9.npy", npy(GRIDS[0].ravel())), ("__meta__", b"skipped")])
    assert call(folder, source, "-o", tmp_path / "out") == 0
    found = members(tmp_path / "out/x.tar")
    assert len(found) == 3 * len(SIZES) + 2 and list(found)[-1] == "a.b/9.png" and found["deep/0.of.more.words"] == b"kept"
    for i in range(len(SIZES)):
        assert np.array_equal(pixels(found[f"deep/{i}.png"]), wanted(model, i)) and found[f"deep/{i}.cls"] == b"7"
        assert json.loads(found[f"deep/{i}.json"])["caption"] == "café" and f"deep/{i}.npy" not in found
    assert np.array_equal(pixels(found["a.b/9.png"]), wanted(model, 0))


def code_file(model, path, extra=()):
    file = CodeFile(codebook_id(model))
    for i, size in enumerate(SIZES):
        file.add(f"{i}.jpg", torch.from_numpy(GRIDS[i]), size)
    for name, codes, size in extra:
        file.add(name, codes, size)
    file.save(path)
    return path


def test_files_of_codes_in_a_folder(model, folder, tmp_path):
    code_file(model, tmp_path / "in/a/x.safetensors")
    code_file(model, tmp_path / "in/y.safetensors")
    assert call(folder, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert names(tmp_path / "out") == sorted(f"{at}/{i}.png" for at in ("a/x", "y") for i in range(len(SIZES)))
    for i in range(len(SIZES)):
        assert np.array_equal(pixels((tmp_path / f"out/a/x/{i}.png").read_bytes()), wanted(model, i))


def test_a_file_of_codes_of_another_name(model, folder, tmp_path):
    """As encode writes where it is told to."""
    assert call(folder, code_file(model, tmp_path / "codes"), "-o", tmp_path / "out") == 0
    assert names(tmp_path / "out") == [f"{i}.png" for i in range(len(SIZES))]


def test_chunks(monkeypatch):
    """Bounded in pixels and in samples, and all of them."""
    monkeypatch.setattr(run, "CHUNK_BYTES", 300)
    monkeypatch.setattr(run, "MOST_SAMPLES", 3)
    sizes = [(8, 8), (7, 5), (8, 8), (0, 0), (0, 0), (0, 0), (10, 10), (1, 1)]
    samples = [Sample(str(i), size=size) for i, size in enumerate(sizes)] + [Sample("8", rest_bytes=297), Sample("9")]
    found = [[sample.name for sample in chunk] for chunk in run._chunks(samples)]
    assert found == [["0", "1", "2"], ["3", "4", "5"], ["6"], ["7", "8"], ["9"]]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_what_goes_with_a_picture_is_counted(model, tmp_path, kind):
    if kind == "parquet":
        shard = ParquetShard(parquet(tmp_path / "x.parquet", **sides(), photo=[bytes(5000)] * 6), tmp_path / "out")
    else:
        shard = WebDatasetShard(
            webdataset(tmp_path / "x.tar", [("0.npy", npy(GRIDS[0])), ("0.jpg", bytes(5000))]), tmp_path / "out"
        )
    assert all(5000 <= sample.rest_bytes < 5500 for sample in shard.samples(Codebook.of(model)))


def test_chunks_keep_the_order(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHUNK_BYTES", 300)
    monkeypatch.setattr(shards, "ROWS", 2)
    source = parquet(tmp_path / "x.parquet", **sides(), name=[f"n{i}" for i in range(6)])
    assert call(folder, source, "-o", tmp_path / "out") == 0
    table = pq.ParquetFile(tmp_path / "out/x.parquet")
    assert table.num_row_groups == 3
    assert table.read()["name"].to_pylist() == [f"n{i}" for i in range(6)]
    for i, png in enumerate(table.read()["image"].to_pylist()):
        assert np.array_equal(pixels(png), wanted(model, i))


# --- What cannot be decoded


def test_bad_rows(model, folder, tmp_path, capsys):
    bad = {
        "codes of another model": ([[0, CODES]], 2, 4, r"codes must be in [0, 64), got values from 0 to 64"),
        "negative": ([[0, -1]], 2, 4, "got values from -1 to 0"),
        "none": (None, 2, 4, "codes must be integers of one or two dimensions, got none"),
        "a hole": ([[0, None]], 2, 4, "codes must have no nulls"),
        "a row without": ([None, [0]], 2, 4, "codes must have no nulls"),
        "ragged": ([[0, 1], [2]], 4, 4, "codes must be rows of one length"),
        "empty": ([], 2, 4, "got float64 of shape (0,)"),
        "another size": ([[0, 1]], 9, 4, "a picture of 9 x 4 (height x width) has 5 x 2 codes, got (1, 2)"),
        "no width": ([[0, 1]], 2, None, "height and width must be whole numbers from 1 to 1048576, got 2 and None"),
        "no height": ([[0, 1]], 0, 4, "got 0 and 4"),
    }
    codes, height, width, _ = zip(*bad.values(), strict=True)
    columns = {"name": [*bad, "good"], "height": [*height, 8], "width": [*width, 8]}
    parquet(tmp_path / "in/x.parquet", pa.array([*codes, GRIDS[0].tolist()], pa.list_(pa.list_(pa.int64()))), **columns)
    parquet(tmp_path / "in/y.parquet", **sides())
    assert call(folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    found = pq.read_table(tmp_path / "out/x.parquet")
    assert found["name"].to_pylist() == ["good"] and np.array_equal(pixels(found["image"][0].as_py()), wanted(model, 0))
    assert pq.read_table(tmp_path / "out/y.parquet").num_rows == len(SIZES)
    rejects = lines(tmp_path / "out/x.parquet.rejects.jsonl")
    assert [one["name"] for one in rejects] == list(bad)
    assert {one["source"] for one in rejects} == {str(tmp_path / "in/x.parquet")}
    for one, (*_, reason) in zip(rejects, bad.values(), strict=True):
        assert reason in one["reason"], one
    captured = capsys.readouterr()
    assert "decoded 7, already there 0, failed 10\nshards: done 2, already there 0, failed 0\n" in captured.out
    assert "rejects.jsonl" in captured.out and f"error: {tmp_path}/in/x.parquet: negative: codes must be" in captured.err


def test_flat_codes_without_a_size(folder, tmp_path):
    source = parquet(tmp_path / "x.parquet", pa.array([[1] * 9, [1] * 8]))
    assert call(folder, source, "-o", tmp_path / "out") == 1
    assert pixels(pq.read_table(tmp_path / "out/x.parquet")["image"][0].as_py()).shape == (6, 6, 3)
    (reject,) = lines(tmp_path / "out/x.parquet.rejects.jsonl")
    assert reject["name"] == "row 1" and "8 codes in one line are no square" in reject["reason"]


def test_bad_samples(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_SAMPLE", 4000)
    good = npy(GRIDS[0])
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}]), allow_pickle=True)
    huge = bytearray(npy(np.zeros((8, 8), np.int64)))
    huge[huge.index(b"(8, 8)") : huge.index(b"(8, 8)") + 14] = b"(999999999, 8)"
    bad = [
        ("1", [("npy", good), ("npy", good)], "a file of the sample comes twice: ['npy', 'npy']"),
        ("2", [("txt", b"")], "a sample must have a .npy and no .png, got ['txt']"),
        ("3", [("npy", good), ("png", b"")], "a sample must have a .npy and no .png"),
        ("4", [("npy", pickled.getvalue())], "the .npy cannot be read: ValueError: Object arrays cannot be loaded"),
        ("5", [("npy", good[:-1])], "the .npy cannot be read"),
        ("6", [("npy", bytes(huge))], "the .npy cannot be read"),
        ("7", [("npy", good), ("json", b"{")], "the .json cannot be read"),
        ("8", [("npy", good), ("json", b'{"height": 8.5, "width": 8}')], "whole numbers from 1 to 1048576, got 8.5 and 8"),
        ("9", [("npy", good), ("json", b'{"height": true, "width": 8}')], "whole numbers from 1 to 1048576, got True and 8"),
        ("10", [("npy", npy(np.zeros((4, 4))))], "codes must be integers of one or two dimensions, got float64 of shape (4, 4)"),
        ("11", [("npy", good), ("bin", bytes(4001))], "the sample has more than 4000 bytes"),
        ("../12", [("npy", good)], "expected an image name inside the output folder"),
    ]
    files = [(f"{key}.{extension}", data) for key, parts, _ in bad for extension, data in parts]
    source = webdataset(tmp_path / "x.tar", [("0.npy", good), *files, ("13.json", b"[1]"), ("13.npy", good)])
    assert call(folder, source, "-o", tmp_path / "out") == 1
    assert list(members(tmp_path / "out/x.tar")) == ["0.png", "13.json", "13.png"]
    rejects = lines(tmp_path / "out/x.tar.rejects.jsonl")
    assert [one["name"] for one in rejects] == [key for key, _, _ in bad]
    for one, (_, _, reason) in zip(rejects, bad, strict=True):
        assert reason in one["reason"], one


def truncated(path):
    path.write_bytes(path.read_bytes()[:-700])


def of_another_codebook(path):
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({shards.CODEBOOK_KEY: b"0123"}), path)


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
     (with_image, "none called 'image'"), (corrupted, "damaged"), ("a header", "not the end of a tar"),
     ("its end", "not the end of a tar"), ("no tar", "damaged or no tar")],
)  # fmt: skip
def test_bad_shards(folder, tmp_path, capsys, damage, reason):
    """Nothing of a bad shard is written but why; the others are done; when it is whole the next run does it."""
    good = parquet(tmp_path / "in/good.parquet", **sides())
    if isinstance(damage, str):
        bad = webdataset(tmp_path / "in/bad.tar", [(f"{i}.npy", npy(GRIDS[i])) for i in range(len(SIZES))])
        whole = bad.read_bytes()
        bad.write_bytes({"a header": whole[:1200], "its end": whole[:1024], "no tar": b"no tar" * 1000 + bytes(1024)}[damage])
    else:
        bad = parquet(tmp_path / "in/bad.parquet", **sides(), noise=list(np.random.default_rng(0).bytes(600)[:6]))
        whole = bad.read_bytes()
        damage(bad)
    assert call(folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    assert names(tmp_path / "out") == [f"{bad.name}.rejects.jsonl", "good.parquet"]
    (reject,) = lines(tmp_path / f"out/{bad.name}.rejects.jsonl")
    assert reject["name"] is None and reject["source"] == str(bad) and reason in reject["reason"]
    captured = capsys.readouterr()
    assert "shards: done 1, already there 0, failed 1" in captured.out and reason in captured.err
    good.unlink()
    assert call(folder, tmp_path / "in", "-o", tmp_path / "out") == 2  # nothing could be done
    bad.write_bytes(whole)
    assert call(folder, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert names(tmp_path / "out") == [bad.name, "good.parquet"]


def test_its_own_codebook(model, folder, tmp_path):
    source = parquet(tmp_path / "x.parquet", **sides())
    own = {shards.CODEBOOK_KEY: codebook_id(model).encode()}
    pq.write_table(pq.read_table(source).replace_schema_metadata(own), source)
    assert call(folder, source, "-o", tmp_path / "out") == 0
    assert pq.read_schema(tmp_path / "out/x.parquet").metadata == own


@pytest.mark.parametrize("codes, kind", [([{"a": 1}], "struct<a: int64>"), ([1], "int64"), (["1"], "string")])
def test_codes_that_are_no_list(folder, tmp_path, codes, kind):
    assert call(folder, parquet(tmp_path / "x.parquet", pa.array(codes)), "-o", tmp_path / "out") == 1
    (reject,) = lines(tmp_path / "out/x.parquet.rejects.jsonl")
    assert reject["reason"] == f"codes must be a list of integers, got {kind}"


def test_rows_that_cannot_be_read(folder, tmp_path):
    """A name that is no UTF-8 and a day out of reach are the fault of their rows alone."""
    blobs = pa.array([b"\xff\xfe", b"b", b"c"], pa.binary())
    named = pa.Array.from_buffers(pa.string(), 3, blobs.buffers())
    height = pa.array([2, 2**31 - 1, 2], pa.int32()).cast(pa.date32())
    for column in ({"name": named}, {"height": height, "width": height}):
        source = parquet(tmp_path / f"{len(column)}.parquet", pa.array([[1], [2], [3]]), **column)
        assert call(folder, source, "-o", tmp_path / "out") == 1
    (first, *_), (_, second, _) = (lines(tmp_path / f"out/{i}.parquet.rejects.jsonl") for i in (1, 2))
    assert first["name"] == "row 0" and "the row cannot be read: UnicodeDecodeError" in first["reason"]
    assert second["name"] == "row 1" and "the row cannot be read: OverflowError" in second["reason"]
    assert pq.read_table(tmp_path / "out/1.parquet").num_rows == 2


def test_a_picture_of_too_many_pixels(model):
    codes = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match=r"1048576 x 1000 .* has more than 268435456 pixels"):
        Codebook.of(model).grid(codes, (1 << 20, 1000))


def test_names_that_are_no_files(model, folder, tmp_path):
    """One that is too long for the disk, and one below another's picture, are reported and stop no other."""
    codes = torch.from_numpy(GRIDS[0])
    bad = [("n" * 300, codes, SIZES[0]), ("0.png/below", codes, SIZES[0])]
    source = code_file(model, tmp_path / "x.safetensors", bad)
    for _ in range(2):
        assert call(folder, source, "-o", tmp_path / "out") == 1
        found = lines(tmp_path / "out/x.safetensors.rejects.jsonl")
        assert {one["name"] for one in found} == {bad[0][0], bad[1][0]} and "File name too long" in str(found)
        assert len(list((tmp_path / "out").glob("*.png"))) == 6


def a_member_damaged(contents):
    """The header of the second of them."""
    return contents[:1024] + b"\xff" * 20 + contents[1044:]


def two_archives(contents):
    return contents * 2


def backwards(contents):
    """A header whose size leads back to itself."""
    header = bytearray(contents[:512])
    header[124:136] = (256**12 - 512).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + contents[512:]


def compressed(contents):
    return gzip.compress(contents) + bytes(1024)


@pytest.mark.parametrize(
    "damage, reason",
    [(a_member_damaged, "not the end of a tar file after its 1 members"), (two_archives, "not the end of a tar file after its 4"),
     (backwards, "damaged"), (compressed, "damaged or no tar file (one that is compressed is not read)")],
)  # fmt: skip
def test_no_member_of_a_tar_is_missed(folder, tmp_path, damage, reason):
    """tarfile takes them all for the end, or for no end."""
    source = webdataset(tmp_path / "x.tar", [(f"{i}.npy", npy(GRIDS[0])) for i in range(4)])
    source.write_bytes(damage(source.read_bytes()))
    assert call(folder, source, "-o", tmp_path / "out") == 2
    (reject,) = lines(tmp_path / "out/x.tar.rejects.jsonl")
    assert reason in reject["reason"] and names(tmp_path / "out") == ["x.tar.rejects.jsonl"]


def test_links_and_other_members(folder, tmp_path):
    """A link's codes are missed aloud; what no sample has in WebDataset (folders, files of macOS) is passed over."""
    source = tmp_path / "x.tar"
    with tarfile.open(source, "w") as tar:
        kinds = [tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]
        files = [(f"d/{i}.npy", kind) for i, kind in enumerate(kinds)]
        for name, kind in [("d", tarfile.DIRTYPE), *files, ("d/._0.npy", tarfile.REGTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "d/0.npy"
            member.size = len(npy(GRIDS[0])) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(npy(GRIDS[0])))
    assert call(folder, source, "-o", tmp_path / "out") == 1
    rejects = lines(tmp_path / "out/x.tar.rejects.jsonl")
    assert [one["name"] for one in rejects] == ["d/1", "d/2", "d/3"]
    assert {one["reason"] for one in rejects} == {"npy is no file but a link or device"}
    assert list(members(tmp_path / "out/x.tar")) == ["d/0.png"]


def test_a_sample_in_two_places(folder, tmp_path):
    """As in a tar that is sorted by suffix: the codes would be decoded without their height and width."""
    said, codes = b'{"height": 7, "width": 7}', npy(GRIDS[0])
    source = webdataset(
        tmp_path / "x.tar", [("0.json", said), ("1.json", said), ("0.npy", codes), ("1.npy", codes), ("2.npy", codes)]
    )
    assert call(folder, source, "-o", tmp_path / "out") == 1
    assert list(members(tmp_path / "out/x.tar")) == ["2.png"]
    reasons = [one["reason"] for one in lines(tmp_path / "out/x.tar.rejects.jsonl")]
    assert ["came before" in reason for reason in reasons] == [False, False, True, True]


def test_a_picture_that_is_not_finite(folder, tmp_path):
    broken = from_pretrained(folder)
    broken.quantize.embedding.weight.data[5] = float("nan")
    save_pretrained(broken, tmp_path / "broken")
    source = parquet(tmp_path / "x.parquet", pa.array([[[1, 2]], [[1, 5]], [[2, 1]]]))
    assert call(tmp_path / "broken", source, "-o", tmp_path / "out") == 1
    assert pq.read_table(tmp_path / "out/x.parquet").num_rows == 2
    assert "NaN or infinity" in lines(tmp_path / "out/x.parquet.rejects.jsonl")[0]["reason"]


@pytest.mark.parametrize("name", ["x.tar.gz", "part-0"])
def test_a_file_of_another_kind(folder, tmp_path, name):
    """By its suffix it is taken for what encode wrote, and need not be damaged."""
    (tmp_path / name).write_bytes(gzip.compress(bytes(10240)))
    assert call(folder, tmp_path / name, "-o", tmp_path / "out") == 2
    (reject,) = lines(tmp_path / f"out/{name}.rejects.jsonl")
    assert f"{name} is damaged or not a code file: " in reject["reason"]


# --- Where shards are


def test_finding(folder, tmp_path):
    parquet(tmp_path / "in/a.parquet")
    (tmp_path / "in/notes.txt").touch()
    (tmp_path / "in/_hidden.parquet").touch()
    (tmp_path / "in/.b.parquet.1.2.partial").touch()
    (tmp_path / "codes/x").mkdir(parents=True)
    for name in ("x.safetensors", "x/y.safetensors"):  # x/y/a.jpg in the first and a.jpg in the second would be one file
        (tmp_path / "codes" / name).touch()
    assert [shard.source.name for shard in find_shards([tmp_path / "in"], tmp_path / "out")] == ["a.parquet"]
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    for inputs, out, error, message in [
        ([tmp_path / "missing"], "out", FileNotFoundError, "no such file: .*missing"),
        ([tmp_path / "empty"], "out", ValueError, r"empty holds no shards \(.parquet, .tar, .safetensors\)"),
        ([tmp_path / "pipe.tar"], "out", OSError, "expected a regular file, got a folder, pipe or device"),
        ([tmp_path / "in"], "in", ValueError, "the output .* lies in the input"),
        ([tmp_path / "in"], "in/deep/er", ValueError, "the output .* lies in the input"),
        ([tmp_path / "in", tmp_path / "in/a.parquet"], "out", ValueError, "would both be written to .*a.parquet"),
        ([tmp_path / "codes"], "out", ValueError, "codes/x/y.safetensors would be written to .*, among those of "),
    ]:
        with pytest.raises(error, match=message):
            find_shards(inputs, tmp_path / out)
    with pytest.raises(ValueError, match="would take its place"):
        find_shards([tmp_path / "in/a.parquet"], tmp_path / "in")


def test_folders_within(folder, tmp_path):
    """Those that are hidden are passed over; what is there but cannot be read is not."""
    for name in ("split=train/a", "_delta_log/b", ".cache/deep/c"):
        parquet(tmp_path / f"in/{name}.parquet")
    (tmp_path / "in/dangling.parquet").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in/circle").symlink_to(tmp_path / "in")
    assert call(folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    assert names(tmp_path / "out") == ["dangling.parquet.rejects.jsonl", "split=train/a.parquet"]
    assert "no such file" in lines(tmp_path / "out/dangling.parquet.rejects.jsonl")[0]["reason"]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    parquet(tmp_path / "in/a.parquet")
    (tmp_path / "in/closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        find_shards([tmp_path / "in"], tmp_path / "out")


def test_a_folder_in_the_place_of_the_pictures(folder, tmp_path, capsys):
    """It is not what was done already."""
    source = parquet(tmp_path / "x.parquet")
    (tmp_path / "out/x.parquet").mkdir(parents=True)
    assert call(folder, source, "-o", tmp_path / "out") == 2
    assert f"Is a directory: '{tmp_path}/out" in capsys.readouterr().err.replace("' -> '", "Is a directory: '")


def test_one_shard_that_is_there(folder, tmp_path, capsys):
    for _ in range(2):
        assert call(folder, parquet(tmp_path / "x.parquet"), "-o", tmp_path / "out") == 0
    assert "decoded 0, already there 0, failed 0\nshards: done 0, already there 1, failed 0" in capsys.readouterr().out


def test_counts(model, tmp_path):
    parquet(tmp_path / "in/a.parquet")
    code_file(model, tmp_path / "in/b.safetensors")
    webdataset(tmp_path / "in/c.tar", [])
    for name in ("d.parquet", "e.safetensors"):
        (tmp_path / "in" / name).touch()
    assert [shard.count() for shard in find_shards([tmp_path / "in"], tmp_path / "out")] == [6, 6, None, None, None]


def test_without_pyarrow(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert call(folder, parquet(tmp_path / "x.parquet"), "-o", tmp_path / "out") == 2
    assert "Parquet files need pyarrow: pip install 'movq_ext[parquet]'" in capsys.readouterr().err


# --- Batches and memory


@contextmanager
def pooled(decoder, told=None):
    with ThreadPoolExecutor(2) as pool:
        yield lambda samples: decoder(samples, pool, [].append if told is None else told.append)


def samples_of(sizes):
    return [Sample(str(i), torch.from_numpy(grid(size, i)), size) for i, size in enumerate(sizes)]


def test_batches(decoder, model, monkeypatch):
    """Pictures of one grid together, as many as the memory takes; each comes out as by itself."""
    monkeypatch.setattr(decoder, "device", torch.device("meta"))  # not a CPU
    monkeypatch.setattr(decoder, "max_memory", 3 * decoder.picture_bytes((4, 4)) + 1)
    batches, decode = [], decoder.decode

    def decode_on_cpu(codes):
        batches.append(tuple(codes.shape))
        decoder.device = torch.device("cpu")
        images = decode(codes)
        decoder.device = torch.device("meta")
        return images

    monkeypatch.setattr(decoder, "decode", decode_on_cpu)
    sizes = [(8, 8), (7, 7), (4, 4), (8, 7), (8, 8), (8, 8), (3, 3)]
    samples = samples_of(sizes)
    samples.insert(1, Sample("bad", problem="no codes"))
    with pooled(decoder, told := []) as run:
        found = run(samples)
    assert sum(told) == len(samples)
    assert batches == [(3, 4, 4), (2, 4, 4), (2, 2, 2)]
    assert isinstance(found[1], ValueError) and str(found.pop(1)) == "no codes"
    del samples[1]
    for sample, png in zip(samples, found, strict=True):
        got, single = (np.asarray(image, float) for image in (pixels(png), decode_image(model, sample.codes, sample.size)))
        assert np.abs(got - single).max() <= 1


def test_out_of_memory(decoder, monkeypatch, caplog):
    """Half the pictures, then one, then strips, then a reason: and what was learnt is remembered."""
    monkeypatch.setattr(decoder, "device", torch.device("meta"))
    monkeypatch.setattr(decoder, "max_memory", 5 * decoder.picture_bytes((4, 4)))
    monkeypatch.setattr(decoder, "_less", {})
    tried, room = [], 2

    def decode(codes):
        tried.append(len(codes))
        if codes.shape[1] == 4 and len(codes) > room:
            if decoder.picture_bytes((4, 4)) > decoder.room((4, 4)):  # in strips
                if decoder.room((4, 4)) < 2000:
                    raise ValueError("max_memory must be at least 2000 bytes")
                raise torch.OutOfMemoryError("again")
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(len(codes), 3, 8, 8)

    def empty_cache():
        assert sys.exc_info() == (None, None, None)  # an error's traceback holds the tensors of what raised it

    monkeypatch.setattr(decoder, "decode", decode)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    with pooled(decoder) as run, caplog.at_level(logging.WARNING):
        assert all(isinstance(png, bytes) for png in run(samples_of([(8, 8)] * 5)))
        assert tried == [5, 2, 2, 1] and "out of memory with 5 pictures of 4 x 4 codes" in caplog.text
        run(samples_of([(8, 8)] * 4))
        assert tried[4:] == [2, 2]
        room = 0
        found = run(samples_of([(8, 8), (6, 6), (6, 6)]))
    assert "max_memory must be at least" in str(found[0])
    assert all(isinstance(png, bytes) for png in found[1:]) and tried[-1] == 2  # no picture suffers for one of another size


def test_out_of_memory_on_a_cpu(decoder, monkeypatch):
    """torch has no class of error for it. One picture in ever less memory, then a reason; the others are decoded."""
    monkeypatch.setattr(decoder, "_less", {})
    real, rooms = decoder.decode, []

    def decode(codes):
        if codes.shape[1] == 8:
            rooms.append(decoder.room((8, 8)))
            if rooms[-1] >= 2000:
                torch.empty(1 << 60, dtype=torch.uint8)
            raise ValueError("max_memory must be at least 2000 bytes")
        return real(codes)

    monkeypatch.setattr(decoder, "decode", decode)
    with pooled(decoder) as run:
        found = run(samples_of([(8, 8), (16, 16), (8, 8)]))
    assert [isinstance(png, bytes) for png in found] == [True, False, True] and "max_memory must be at least" in str(found[1])
    assert len(rooms) > 2 and rooms == sorted(rooms, reverse=True)


def test_memory_by_default(folder, monkeypatch):
    """Of the machine's for the threads, and of what a GPU has free."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(run, "CONTAINER_LIMITS", ())
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    device = torch.device("cpu")
    assert [run.memory(device, threads) for threads in (1, 4, 8)] == [machine // 4, machine, machine]
    assert 0 < BatchDecoder(Settings(folder, "cpu", threads=1)).max_memory < machine // 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert run.memory(torch.device("cuda"), 1) == 1000


@pytest.mark.parametrize(
    "text, size", [("1073741824\n", 1 << 30), ("max\n", None), ("9223372036854771712\n", None), (None, None)]
)
def test_memory_of_a_container(tmp_path, monkeypatch, text, size):
    if text is not None:
        (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(run, "CONTAINER_LIMITS", (tmp_path / "memory.max",))
    assert run.machine_memory() == (size or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def test_memory_of_a_decode(folder, tmp_path):
    """--max-memory holds, in strips, and pictures stay what they are."""
    big = pa.array([np.random.default_rng(0).integers(0, CODES, (48, 32)).tolist()])
    source = parquet(tmp_path / "x.parquet", big)
    for out, *limit in (("whole",), ("strips", "--max-memory", "1M"), ("refused", "--max-memory", "1K")):
        assert call(folder, source, "-o", tmp_path / out, *limit) == (out == "refused")
    tables = [pq.read_table(tmp_path / out / "x.parquet") for out in ("whole", "strips")]
    whole, strips = (pixels(table["image"][0].as_py()).astype(int) for table in tables)
    assert np.abs(whole - strips).max() <= 1
    assert "max_memory must be at least" in lines(tmp_path / "refused/x.parquet.rejects.jsonl")[0]["reason"]


def test_strips_are_used_where_a_picture_does_not_fit(decoder, monkeypatch):
    limits = []
    monkeypatch.setattr(decoder.model, "decode", lambda quantised, max_memory: limits.append(max_memory) or torch.zeros(1))
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    for limit in (decoder.picture_bytes((4, 4)), decoder.picture_bytes((4, 4)) - 1):
        monkeypatch.setattr(decoder, "max_memory", limit)
        decoder.decode(codes)
    assert limits == [None, limit]


def test_peak_values():
    """By hand: 128 + 256 channels of the last level's first block at every pixel, and less further up."""
    config = {**DDCONFIG, "ch": 128, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2}
    assert peak_values(MOVQ(config, 8, 4).decoder) == 2 * (256 + 128)


@pytest.mark.parametrize(
    "text, size", [("7", 7), ("500M", 500 << 20), ("1.5g", 3 << 29), ("2 GiB", 2 << 30), ("4KB", 4096), ("1T", 1 << 40)]
)
def test_memory_sizes(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("threads", ["0", "-1", "x", "1025", "99999999999"])
def test_bad_threads(folder, tmp_path, capsys, threads):
    with pytest.raises(SystemExit):
        call(folder, tmp_path, f"--threads={threads}")
    assert f"--threads: must be 1 to 1024, got {threads}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "M", "5X", "-1", "1.2.3", "0"])
def test_bad_memory_sizes(folder, tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        call(folder, tmp_path, f"--max-memory={text}")
    assert f"invalid memory_size value: '{text}'" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_on_a_gpu(folder, model, dtype):
    decoder = BatchDecoder(Settings(folder, "cuda", dtype))
    assert decoder.batch_size((4, 4)) > 100
    samples = samples_of([(8, 8)] * 7)
    with pooled(decoder) as run:
        for sample, png in zip(samples, run(samples), strict=True):
            single = np.asarray(decode_image(model, sample.codes, sample.size), float)
            assert np.abs(pixels(png) - single).max() <= (1 if dtype == torch.float32 else 8)


# --- Runs that are stopped


def stamps(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_second_run_repeats_nothing(model, folder, tmp_path, capsys):
    for i in range(3):
        parquet(tmp_path / f"in/{i}.parquet", **sides())
    code_file(model, tmp_path / "in/3.safetensors", [("bad", torch.full((1, 1), CODES), (2, 2))])
    assert call(folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    before = stamps(tmp_path / "out")
    (tmp_path / "out/1.parquet").unlink()
    (tmp_path / "out/3/4.png").unlink()
    capsys.readouterr()
    assert call(folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    assert "decoded 7, already there 5, failed 1\nshards: done 2, already there 2, failed 0" in capsys.readouterr().out
    after = stamps(tmp_path / "out")
    changed = {path.name for path in before if before[path] != after[path]}
    assert set(after) == set(before) and changed == {"1.parquet", "4.png", "3.safetensors.rejects.jsonl"}


def test_a_second_run_says_what_the_first_could_not_decode(folder, tmp_path, capsys):
    """Which may have been killed before it said so itself."""
    parquet(tmp_path / "in/x.parquet", pa.array([[1], [CODES], [-1]]))
    for said in ("decoded 1, already there 0, failed 2", "decoded 0, already there 0, failed 2"):
        assert call(folder, tmp_path / "in", "-o", tmp_path / "out") == 1
        captured = capsys.readouterr().out
        assert said in captured and "rejects.jsonl" in captured


@pytest.mark.parametrize("kind", [ParquetShard, WebDatasetShard])
def test_two_runs_at_once(folder, decoder, tmp_path, monkeypatch, kind):
    """The first that is ready takes the other's partial file for one of the dead. What it wrote, and why not all, is left."""
    if kind is ParquetShard:
        source = parquet(tmp_path / "x.parquet", pa.array([[1], [CODES], [2]]))
    else:
        source = webdataset(tmp_path / "x.tar", [(f"{i}.npy", npy(np.array([i]))) for i in (1, CODES, 2)])
    shard, real, other = kind(source, tmp_path / "out" / source.name), decoder.decode, []

    def decode(codes):
        if not other:
            with ThreadPoolExecutor(1) as thread:
                other.append(thread.submit(decode_shard, shard, BatchDecoder(Settings(folder, "cpu"))).result())
                other.append((stamps(tmp_path / "out"), lines(shard.rejects)))
        return real(codes)

    monkeypatch.setattr(decoder, "decode", decode)
    report = decode_shard(shard, decoder)
    assert (other[0].decoded, other[0].rejected) == (2, 1)
    assert (report.decoded, report.present, report.rejected, report.error) == (0, 2, 1, "")
    assert shard.target in other[1][0] and lines(shard.rejects) == other[1][1]
    assert names(tmp_path / "out") == [source.name, f"{source.name}.rejects.jsonl"]


@pytest.mark.parametrize("kind", [ParquetShard, WebDatasetShard])
def test_a_shard_is_written_at_once(decoder, tmp_path, monkeypatch, kind):
    """What raises on the way, of whatever kind, leaves nothing; a reason for it is there before the pictures are."""
    if kind is ParquetShard:
        source = parquet(tmp_path / "in/x.parquet", **sides())
    else:
        source = webdataset(tmp_path / "in/x.tar", [(f"{i}.npy", npy(GRIDS[i])) for i in range(4)] + [("5.txt", b"")])
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
    assert all(len(files) == 1 and files[0].endswith(".partial") for files in seen) and names(tmp_path / "out") == []
    monkeypatch.setattr(os, "replace", lambda *paths: seen.append(names(tmp_path / "out")) or os.rename(*paths))
    report = decode_shard(shard, decoder)
    assert report.decoded == (6 if kind is ParquetShard else 4) and names(tmp_path / "out")[0] == source.name
    if kind is WebDatasetShard:
        assert f"{source.name}.rejects.jsonl" in seen[-1] and source.name not in seen[-1]


@pytest.mark.parametrize("kind", [ParquetShard, WebDatasetShard])
def test_a_shard_that_is_done(decoder, tmp_path, kind):
    """By a worker that died before it reported: it is not done again."""
    if kind is ParquetShard:
        source = parquet(tmp_path / "x.parquet", pa.array([[1], [CODES], [2, 3]]))
    else:
        codes = [np.array([1]), np.array([CODES]), np.array([2, 3])]
        source = webdataset(tmp_path / "x.tar", [(f"{i}.npy", npy(array)) for i, array in enumerate(codes)])
    shard, told = kind(source, tmp_path / "out" / source.name), []
    first = decode_shard(shard, decoder)
    before = stamps(tmp_path / "out")
    second = decode_shard(shard, decoder, told.append)
    assert (first.decoded, first.present, first.rejected) == (1, 0, 2)
    assert (second.decoded, second.present, second.rejected) == (0, 1, 2)
    assert before == stamps(tmp_path / "out") and sum(told) == 3


def test_a_full_disk(decoder, tmp_path, monkeypatch):
    shard = ParquetShard(parquet(tmp_path / "x.parquet", **sides()), tmp_path / "out/x.parquet")

    @contextmanager
    def full(path):
        yield path.with_suffix(".partial")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "atomic_write", full)
    report = decode_shard(shard, decoder)
    assert "No space left" in report.error and report.decoded == 0 and not shard.target.exists()


def test_partial_files_of_the_dead(tmp_path):
    for name in (".x.parquet.12.34.partial", ".y.parquet.12.34.partial", ".x.parquet", "x.parquet.12.34.partial"):
        (tmp_path / name).touch()
    remove_partial_files([tmp_path / "x.parquet", tmp_path / "gone/x.parquet"])
    assert names(tmp_path) == [".x.parquet", ".y.parquet.12.34.partial", "x.parquet.12.34.partial"]


def test_the_longest_names(tmp_path):
    """A file that is being written needs no longer one, and what the dead leave of it is found."""
    path, left = tmp_path / f"{'é' * 125}.png", tmp_path / "left"
    with atomic_write(path) as partial:
        partial.write_text("whole")
        left.hardlink_to(partial)
        name = partial.name
    left.rename(tmp_path / name)
    remove_partial_files([path])
    assert names(tmp_path) == [path.name] and path.read_text() == "whole"


RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}  # a cluster of our own, whatever else runs here
AWAY = "/"  # Ray's workers look for packages in the current folder first, -P or not: there must not be the source folder
ROWS, SIDE, SHARDS = 250, 24, 5


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Shards that take a second or so each."""
    path = tmp_path_factory.mktemp("many")
    for i in range(SHARDS):
        codes = np.random.default_rng(i).integers(0, CODES, (ROWS, SIDE * SIDE)).tolist()
        parquet(path / f"{i}.parquet", pa.array(codes), name=[f"{i}-{row}" for row in range(ROWS)])
    return path


def start(folder, source, out, *more):
    command = [sys.executable, "-P", "-m", "movq_ext", "decode", source, "-o", out, "--model", folder, "--device", "cpu"]
    env = {**os.environ, **RAY, "OMP_NUM_THREADS": "1"}
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [*command, "--threads", "1", *more], stdout=log, stderr=log, env=env, cwd=AWAY, start_new_session=True
        )


def first_output(process, out, seconds=120):
    """Wait until one shard is done and another is being made."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if list(out.glob("*.parquet")) and list(out.glob(".*.partial")):
            return
        time.sleep(0.02)
    raise AssertionError(f"no shard was made: {out.with_suffix('.log').read_text()}")


def require_every_picture_once(out):
    assert names(out) == [f"{i}.parquet" for i in range(SHARDS)]
    found = [name for i in range(SHARDS) for name in pq.read_table(out / f"{i}.parquet")["name"].to_pylist()]
    assert found == [f"{i}-{row}" for i in range(SHARDS) for row in range(ROWS)]


def test_a_run_that_is_killed(folder, many, tmp_path):
    out = tmp_path / "out"
    process = start(folder, many, out, "--engine", "process")
    first_output(process, out)
    process.kill()
    process.wait()
    before = stamps(out)
    assert not all((out / f"{i}.parquet").exists() for i in range(SHARDS))
    for path in out.glob("*.parquet"):
        assert pq.read_table(path).num_rows == ROWS
    assert call(folder, many, "-o", out) == 0
    require_every_picture_once(out)
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path.suffix == ".parquet")


def workers_of(process, kind):
    """The Ray workers of a class below a process: their ids."""
    parents, titles = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat, open(f"/proc/{entry}/cmdline") as title:
                    parents[int(entry)], titles[int(entry)] = int(stat.read().rpartition(")")[2].split()[1]), title.read()
            except OSError:  # it ended
                continue

    def is_below(pid):
        while pid in parents and pid != process.pid:
            pid = parents[pid]
        return pid == process.pid

    return [pid for pid, title in titles.items() if title.startswith("ray::") and kind in title and is_below(pid)]


@pytest.mark.parametrize("victim", ["Worker", "Attempts"])
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="finds workers in /proc")
def test_a_ray_worker_that_is_killed(folder, many, tmp_path, victim):
    """On a real cluster of this machine: no picture is lost or made twice, and the run ends well."""
    out = tmp_path / "out"
    process = start(folder, many, out, "--engine", "ray")
    first_output(process, out)
    workers = workers_of(process, victim)
    assert workers, out.with_suffix(".log").read_text()
    before = stamps(out)
    os.kill(workers[0], signal.SIGKILL)
    log = out.with_suffix(".log")
    assert process.wait(180) == 0, log.read_text()
    require_every_picture_once(out)
    # A shard whose worker died between its last picture and its report is there already for the next.
    text = log.read_text()
    decoded, present = map(int, re.search(r"^decoded (\d+), already there (\d+), failed 0$", text, re.MULTILINE).groups())
    assert decoded + present == SHARDS * ROWS and present in (0, ROWS) and "images/s, Ray" in text
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path.suffix == ".parquet")


POISON = """
import os, sys
from pathlib import Path
from movq_ext.bulk import ray_engine
from movq_ext.bulk.run import Settings
from movq_ext.bulk.shards import find_shards

class Deadly(ray_engine.Worker):
    def decode(self, shard):
        if shard.source.name == "1.parquet":
            with open(DEATHS, "a") as file:
                file.write("x")
            os._exit(1)
        return super().decode(shard)

ray_engine.Worker = Deadly
shards = find_shards([Path(sys.argv[1])], Path(sys.argv[2]))
for report in ray_engine.run_with_ray(shards, Settings(Path(sys.argv[3]), "cpu", threads=1), lambda pictures: None):
    print(Path(report.source).name, report.decoded, report.error)
"""


def test_a_shard_that_kills_its_workers(folder, tmp_path):
    """It is given up after some tries, and the others are done."""
    for i in range(3):
        parquet(tmp_path / f"in/{i}.parquet", **sides())
    deaths = tmp_path / "deaths"
    program = POISON.replace("DEATHS", repr(str(deaths)))  # the worker has arguments of its own
    command = [sys.executable, "-P", "-c", program, tmp_path / "in", tmp_path / "out", folder]
    env = {**os.environ, **RAY}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, cwd=AWAY)
    assert run.returncode == 0, run.stderr
    found = [line.split()[:2] for line in run.stdout.splitlines() if "raylet" not in line]
    assert sorted(found) == [["0.parquet", "6"], ["1.parquet", "0"], ["2.parquet", "6"]], run.stdout
    assert "the workers that decoded it died 4 times" in run.stdout and deaths.read_text() == "xxxx"
    assert names(tmp_path / "out") == ["0.parquet", "2.parquet"]


def test_a_model_that_is_missing(many, tmp_path, capsys):
    assert main(["decode", str(many), "-o", str(tmp_path / "out"), "--model", str(tmp_path / "missing"), "--engine", "ray"]) == 2
    assert "error: no such file or folder: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "engine, number, installed, used",
    [("auto", 2, True, "Ray"), ("auto", 1, True, "process"), ("auto", 2, False, "process"), ("process", 2, True, "process")],
)
def test_which_engine(folder, tmp_path, monkeypatch, capsys, engine, number, installed, used):
    for i in range(number):
        parquet(tmp_path / f"in/{i}.parquet", **sides())
    monkeypatch.setattr(ray_engine, "run_with_ray", run.run_in_process)
    monkeypatch.setattr(cli, "find_spec", lambda name: installed or None)
    arguments = [tmp_path / "in", "-o", tmp_path / "out", "--model", folder, "--device", "cpu", "--engine", engine]
    assert main(["decode", *map(str, arguments)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(used)


def test_codebook(model):
    assert Codebook.of(model) == Codebook(codebook_id(model), CODES, CELL)
