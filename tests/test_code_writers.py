"""Every format that encode writes can be read by decode, and names its images."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from shard_files import CODES, SIZES, npy_bytes, random_codes, read_tar, write_parquet, write_tar

from movq_ext.bulk.code_writers import WRITERS, read_image_hashes, save_codes
from movq_ext.bulk.codebook import Codebook
from movq_ext.bulk.find import make_shard
from movq_ext.io.codes import CodeFile

BOOK = Codebook("book", CODES, 2)
NAMES = ["photos/a.jpg", "photos/a.png", "photos/.hidden.jpg", "photos/a_jpg.x", "no suffix", "v1.0/x.y.png", "v1.0/x_y.jpg"]


def code_file():
    file = CodeFile(BOOK.fingerprint)
    for i, name in enumerate(NAMES):
        size = SIZES[i % len(SIZES)]
        file.add(name, torch.from_numpy(random_codes(size, seed=i)), size, "" if i == 1 else f"hash {i}")
    return file


@pytest.mark.parametrize("suffix", WRITERS)
def test_decode_reads_what_was_written(tmp_path, suffix):
    file, path = code_file(), tmp_path / os.fsdecode(b"\xff") / f"x{suffix}"
    path.parent.mkdir()
    save_codes(file, path)
    samples = list(make_shard(path, tmp_path / "out").samples(BOOK))
    assert [sample.problem for sample in samples] == [""] * len(NAMES)
    found = sorted((sample.size, sample.codes.tolist()) for sample in samples)
    assert found == sorted((file.sizes[name], file.codes[name].tolist()) for name in NAMES)
    assert read_image_hashes(path, BOOK) == {name: file.hashes.get(name, "") for name in NAMES}


@pytest.mark.parametrize("suffix", WRITERS)
def test_codes_of_another_codebook_are_refused(tmp_path, suffix):
    other, path = Codebook("other", CODES, 2), tmp_path / f"x{suffix}"
    save_codes(code_file(), path)
    with pytest.raises(ValueError, match="was made with codebook book, but the model has other"):
        read_image_hashes(path, other)
    with pytest.raises(ValueError, match="was made with codebook book, but the model has other"):
        for sample in make_shard(path, tmp_path / "out").samples(other):
            raise ValueError(sample.problem)


@pytest.mark.parametrize("suffix", WRITERS)
def test_damaged_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    save_codes(code_file(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"x\{suffix} is damaged"):
        read_image_hashes(path, BOOK)


def test_keys_of_a_webdataset(tmp_path):
    """A key has no dot and tells images apart that differ in their suffix only."""
    save_codes(code_file(), tmp_path / "x.tar")
    keys = [name.removesuffix(".npy") for name in read_tar(tmp_path / "x.tar") if name.endswith(".npy")]
    assert keys == ["photos/a", "photos/a_png", "photos/_hidden", "photos/a_jpg", "no suffix", "v1.0/x_y", "v1.0/x_y_jpg"]


def test_rows_of_parquet(tmp_path):
    save_codes(code_file(), tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["name", "height", "width", "source_hash", "codes"]
    assert table["name"].to_pylist() == NAMES
    assert np.array_equal(table["codes"][1].as_py(), random_codes(SIZES[1], seed=1))


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_decoded_images_do_not_count_as_encoded(tmp_path, suffix):
    """Their files keep the names and the codebook of the codes."""
    save_codes(code_file(), tmp_path / f"x{suffix}")
    if suffix == ".tar":
        files = read_tar(tmp_path / "x.tar").items()
        write_tar(tmp_path / "y.tar", [(name.replace(".npy", ".png"), contents) for name, contents in files])
    else:
        table = pq.read_table(tmp_path / "x.parquet")
        pq.write_table(table.drop_columns("codes").append_column("image", table["name"]), tmp_path / "y.parquet")
    assert read_image_hashes(tmp_path / f"y{suffix}", BOOK) == {}


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_files_from_elsewhere_have_no_names(tmp_path, suffix):
    if suffix == ".tar":
        write_tar(tmp_path / "x.tar", [("a.npy", npy_bytes(random_codes((8, 8)))), ("a.json", b'{"name": "a"}')])
    else:
        write_parquet(tmp_path / "x.parquet", name=list("abcdef"))
    assert read_image_hashes(tmp_path / f"x{suffix}", BOOK) == {}


def test_images_of_one_colour(tmp_path):
    """Their codes are all equal. Run lengths would shrink them to a file that a reader refuses as a decompression bomb."""
    file, path = CodeFile(BOOK.fingerprint), tmp_path / "x.parquet"
    for i in range(4):
        file.add(f"{i}.png", torch.zeros(3000, 2000), (6000, 4000))
    save_codes(file, path)
    assert [sample.problem for sample in make_shard(path, tmp_path / "out").samples(BOOK)] == [""] * 4
    assert path.stat().st_size < 16 << 20
