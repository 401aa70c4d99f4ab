"""NumPy shards, decoded by the command line."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from shard_files import CODES, GRIDS, SIZES, expected_pixels, file_names, npy_bytes, png_pixels, read_rejects, run_decode

from movq_ext.bulk import npy_stream
from movq_ext.bulk.codebook import Codebook
from movq_ext.bulk.find import make_shard
from movq_ext.bulk.shards import ShardError

BATCH = np.stack([GRIDS[0]] * 2 + [GRIDS[2]])  # images x rows x columns
HEIGHTS, WIDTHS = np.array(SIZES).T


def write_npz(path, save=np.savez, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, **arrays)
    return path


def assert_images(model, folder, expected):
    """Expect PNGs of these names, with the images of these GRIDS."""
    assert file_names(folder) == sorted(f"{name}.png" for name in expected)
    for name, i in expected.items():
        assert np.array_equal(png_pixels((folder / f"{name}.png").read_bytes()), expected_pixels(model, i)), name


@pytest.mark.parametrize("array", [np.array(["a"], object), np.zeros((2, 0), np.int32), np.zeros((1, 9000, 9000), np.uint8)])
def test_an_error_shortens_the_name_of_an_array(tmp_path, array):
    source = write_npz(tmp_path / "x.npz", np.savez_compressed, **{"x" * 50_000: array})
    with pytest.raises(ShardError, match=r"^x{200}\.\.\.") as raised:
        list(make_shard(source, tmp_path / "out").samples(Codebook("", 1 << 14, 8)))
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "int64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_all_images(model, model_folder, tmp_path, save, dtype, order):
    codes = np.asarray(BATCH, dtype=dtype, order=order)
    source = write_npz(tmp_path / "in/x.npz", save, codes=codes, label=np.arange(3.0))
    shard = make_shard(source, tmp_path / "out")
    assert shard.count_samples() == 3
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert_images(model, tmp_path / "out/x", {"00000000": 0, "00000001": 0, "00000002": 2})


def test_names_and_sizes(model, model_folder, tmp_path):
    flat = np.stack([GRIDS[0].ravel(), GRIDS[2].ravel(), GRIDS[4].ravel()])
    names = np.array(["a", "deep/b.jpg", "c"])
    source = write_npz(tmp_path / "x.npz", codes=flat, name=names, height=HEIGHTS[[0, 2, 4]], width=WIDTHS[[0, 2, 4]])
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    assert_images(model, tmp_path / "out", {"a": 0, "deep/b.jpg": 2, "c": 4})
    source = write_npz(tmp_path / "y.npz", codes=BATCH, height=8, width=np.int16(8), name=np.array([b"p", b"q", b"\xff"]))
    assert run_decode(model_folder, source, "-o", tmp_path / "y") == 0
    assert_images(model, tmp_path / "y", {"p": 0, "q": 0, "\ufffd": 2})


def test_a_single_image(model, model_folder, tmp_path):
    for name, arrays in {"grid": {"codes": GRIDS[0]}, "sized": {"codes": GRIDS[1].ravel(), "height": 7, "width": 5}}.items():
        source = write_npz(tmp_path / f"{name}.npz", **arrays)
        assert run_decode(model_folder, source, "-o", tmp_path / name) == 0
        assert_images(model, tmp_path / name, {"codes": 0 if name == "grid" else 1})


def test_the_only_array(model, model_folder, tmp_path):
    """It is taken for the codes, whatever its name: numpy.savez(path, codes) calls it arr_0."""
    np.savez(tmp_path / "x.npz", BATCH)
    assert run_decode(model_folder, tmp_path / "x.npz", "-o", tmp_path / "out") == 0
    assert_images(model, tmp_path / "out", {"00000000": 0, "00000001": 0, "00000002": 2})


def test_an_array_per_image(model, model_folder, tmp_path):
    source = write_npz(tmp_path / "x.npz", cat=GRIDS[0], dog=GRIDS[2], labels=np.arange(9), all=BATCH)
    assert make_shard(source, tmp_path).count_samples() == 4
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 1
    rejects = read_rejects(tmp_path / "out/x.npz.rejects.jsonl")
    assert [reject["name"] for reject in rejects] == ["labels", "all"] and "with --column" in rejects[1]["reason"]
    (tmp_path / "out/x.npz.rejects.jsonl").unlink()
    assert_images(model, tmp_path / "out", {"cat": 0, "dog": 2})


def test_another_column(model, model_folder, tmp_path):
    source = write_npz(tmp_path / "x.npz", tokens=BATCH, codes=np.zeros((3, 2, 2)))
    assert run_decode(model_folder, source, "-o", tmp_path / "out", "--column", "tokens") == 0
    assert_images(model, tmp_path / "out", {"00000000": 0, "00000001": 0, "00000002": 2})
    assert run_decode(model_folder, source, "-o", tmp_path / "bad", "--column", "missing") == 2
    (reject,) = read_rejects(tmp_path / "bad/x.npz.rejects.jsonl")
    assert "must have an array 'missing', got ['tokens', 'codes']" in reject["reason"]


def test_bad_images(model, model_folder, tmp_path):
    names = ["good", "../out", "/abs", "too big", "good", "a/./b", "a/b"]
    codes = np.stack([GRIDS[0]] * len(names))
    codes[3, 0, 0] = CODES
    source = write_npz(tmp_path / "x.npz", codes=codes, name=np.array(names))
    for _ in range(2):
        assert run_decode(model_folder, source, "-o", tmp_path / "out") == 1
        rejects = read_rejects(tmp_path / "out/x.npz.rejects.jsonl")
        assert [reject["name"] for reject in rejects] == ["../out", "/abs", "too big", "good", "a/b"]
        reasons = " ".join(reject["reason"] for reject in rejects)
        assert "inside the output folder" in reasons and "in [0, 64)" in reasons and "has the same name" in reasons
    assert file_names(tmp_path / "out") == ["a/b.png", "good.png", "x.npz.rejects.jsonl"]


def forged_npz(path, members, compression=zipfile.ZIP_DEFLATED):
    """Write (name, contents) pairs, as numpy.load would read them."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, contents in members:
            archive.writestr(name, contents)
    return path


def npy_header(shape, dtype="|u1"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def pickled():
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "contents, reason",
    [
        (pickled(), "expected an array of numbers or text"),
        (npy_bytes(BATCH)[:-1], "codes is damaged: expected 384 bytes for int64 of shape (3, 4, 4)"),
        (npy_header((10**12, 4, 4)), "codes is damaged: expected 16000000000000 bytes"),
        (npy_header((10**12, 0, 4)), "not empty"),
        (npy_header((-1, -1)) + b"x", "not empty"),
        (npy_header((10**18, 10**18, 10**18)), "codes is damaged: expected"),
        (npy_header((9, 1, 1), "<U0"), "not empty"),
        (b"\x93NUMPY\x02\x00" + b"\xff" * 4, "expected .npy version (1, 0), got (2, 0)"),
        (b"no array", "codes is damaged"),
        (b"", "codes is damaged"),
        (npy_header((1 << 30, 1, 1)) + bytes(1 << 27), "bytes of DEFLATE, got"),
    ],
    ids=["pickle", "short", "long", "empty rows", "negative", "overflow", "empty dtype", "version", "text", "nothing", "bomb"],
)
def test_hostile_arrays(model_folder, tmp_path, contents, reason):
    source = forged_npz(tmp_path / "x.npz", [("codes.npy", contents)])
    tracemalloc.start()
    try:
        assert run_decode(model_folder, source, "-o", tmp_path / "out") == 2
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    (reject,) = read_rejects(tmp_path / "out/x.npz.rejects.jsonl")
    assert reason in reject["reason"] and reject["reason"].startswith(str(source))


def damaged_data(archive):
    """Damage the middle of the array, which the zip's checksum finds."""
    middle = len(archive) // 2
    return archive[:middle] + bytes([archive[middle] ^ 255]) + archive[middle + 1 :]


@pytest.mark.parametrize(
    "damage, reason",
    [(damaged_data, "damaged"), (lambda archive: archive[:-30], "not an .npz file"), (lambda archive: b"", "not an .npz file")],
)
def test_damaged_files(model_folder, tmp_path, damage, reason):
    codes = np.random.default_rng(0).integers(0, CODES, (40, 4, 4), dtype=np.uint8)
    source = write_npz(tmp_path / "x.npz", codes=codes)
    source.write_bytes(damage(source.read_bytes()))
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 2
    assert reason in read_rejects(tmp_path / "out/x.npz.rejects.jsonl")[0]["reason"]


@pytest.mark.parametrize(
    "members, reason",
    [
        ([("codes.npy", npy_bytes(BATCH)), ("height.npy", npy_bytes(np.arange(1, 3)))], "height: expected one value per image"),
        ([("codes.npy", npy_bytes(BATCH)), ("name.npy", npy_bytes(np.array("a")))], "name: expected one value per image"),
        ([("codes.npy", npy_bytes(BATCH))] * 2, "two arrays have the same name"),
        ([("readme.txt", b"")], "must have an array 'codes', got []"),
    ],
)
def test_arrays_that_do_not_fit_together(model_folder, tmp_path, members, reason):
    with pytest.warns(UserWarning) if len(set(members)) < len(members) else io.StringIO():
        source = forged_npz(tmp_path / "x.npz", members)
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 2
    assert reason in read_rejects(tmp_path / "out/x.npz.rejects.jsonl")[0]["reason"]


def test_memory_does_not_follow_the_number_of_images(model, tmp_path):
    """They are read one by one."""
    source = forged_npz(tmp_path / "x.npz", [("codes.npy", npy_header((40 << 20, 1, 1)) + bytes(40 << 20))])
    tracemalloc.start()
    try:
        samples = make_shard(source, tmp_path / "out").samples(Codebook.from_model(model))
        assert sum(1 for _, sample in zip(range(10**4), samples, strict=False)) == 10**4
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_a_single_read_is_bounded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(npy_stream, "MAX_ARRAY_BYTES", 100)
    source = write_npz(tmp_path / "x.npz", codes=BATCH)
    with pytest.raises(ShardError, match="expected at most 100 bytes at once, got shape"):
        list(make_shard(source, tmp_path / "out").samples(Codebook.from_model(model)))
