"""WebDataset shards, decoded by the command line."""

import gzip
import io
import json
import tarfile
import tracemalloc

import numpy as np
import pytest
from shard_files import (
    GRIDS,
    SIZES,
    expected_pixels,
    file_names,
    npy_bytes,
    png_pixels,
    read_rejects,
    read_tar,
    run_decode,
    write_tar,
)

from movq_ext.bulk import webdataset
from movq_ext.io import files


def test_samples_and_their_other_files(model, model_folder, tmp_path):
    files = []
    for i, size in enumerate(SIZES):
        codes = GRIDS[i].astype(np.int32) if i % 2 else GRIDS[i].ravel()
        metadata = {"height": size[0], "width": size[1], "caption": "café"}
        files += [(f"deep/{i}.cls", b"7"), (f"deep/{i}.npy", npy_bytes(codes)), (f"deep/{i}.json", json.dumps(metadata).encode())]
    files.insert(0, ("deep/0.of.more.words", b"copied"))
    files += [("a.b/9.npy", npy_bytes(GRIDS[0].ravel())), ("__meta__", b"skipped")]
    source = write_tar(tmp_path / "x.tar", files)
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 0
    found = read_tar(tmp_path / "out/x.tar")
    assert len(found) == 3 * len(SIZES) + 2 and list(found)[-1] == "a.b/9.png" and found["deep/0.of.more.words"] == b"copied"
    for i in range(len(SIZES)):
        assert np.array_equal(png_pixels(found[f"deep/{i}.png"]), expected_pixels(model, i)) and found[f"deep/{i}.cls"] == b"7"
        assert json.loads(found[f"deep/{i}.json"])["caption"] == "café" and f"deep/{i}.npy" not in found
    assert np.array_equal(png_pixels(found["a.b/9.png"]), expected_pixels(model, 0))


def test_bad_samples(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_SAMPLE_BYTES", 4000)
    good = npy_bytes(GRIDS[0])
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}]), allow_pickle=True)
    huge = bytearray(npy_bytes(np.zeros((8, 8), np.int64)))
    huge[huge.index(b"(8, 8)") : huge.index(b"(8, 8)") + 14] = b"(999999999, 8)"
    floats = npy_bytes(np.zeros((4, 4)))
    bad = [
        ("1", [("npy", good), ("npy", good)], "the sample has two files of one type: ['npy', 'npy']"),
        ("2", [("txt", b"")], "a sample must have a .npy and no .png, got ['txt']"),
        ("3", [("npy", good), ("png", b"")], "a sample must have a .npy and no .png"),
        ("4", [("npy", pickled.getvalue())], "the .npy cannot be read: ValueError: Object arrays cannot be loaded"),
        ("5", [("npy", good[:-1])], "the .npy cannot be read"),
        ("6", [("npy", bytes(huge))], "the .npy cannot be read"),
        ("7", [("npy", good), ("json", b"{")], "the .json cannot be read"),
        ("8", [("npy", good), ("json", b'{"height": 8.5, "width": 8}')], "must be integers from 1 to 1048576, got 8.5 and 8"),
        ("9", [("npy", good), ("json", b'{"height": true, "width": 8}')], "must be integers from 1 to 1048576, got True and 8"),
        ("10", [("npy", floats)], "codes must be integers of one or two dimensions, got float64 of shape (4, 4)"),
        ("11", [("npy", good), ("bin", bytes(4001))], "expected at most 4000 bytes per sample, got more"),
        ("../12", [("npy", good)], "expected an image name inside the output folder"),
    ]
    files = [(f"{key}.{extension}", contents) for key, parts, _ in bad for extension, contents in parts]
    source = write_tar(tmp_path / "x.tar", [("0.npy", good), *files, ("13.json", b"[1]"), ("13.npy", good)])
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 1
    assert list(read_tar(tmp_path / "out/x.tar")) == ["0.png", "13.json", "13.png"]
    rejects = read_rejects(tmp_path / "out/x.tar.rejects.jsonl")
    assert [reject["name"] for reject in rejects] == [key for key, _, _ in bad]
    for reject, (_, _, reason) in zip(rejects, bad, strict=True):
        assert reason in reject["reason"], reject


def damaged_header(archive):
    """Damage the header of the second member."""
    return archive[:1024] + b"\xff" * 20 + archive[1044:]


def two_archives(archive):
    return archive * 2


def negative_size(archive):
    """Give the first member a size that leads back to its own header."""
    header = bytearray(archive[:512])
    header[124:136] = (256**12 - 512).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + archive[512:]


def compressed(archive):
    return gzip.compress(archive) + bytes(1024)


@pytest.mark.parametrize(
    "damage, reason",
    [(damaged_header, "no end-of-archive marker after 1 members"), (two_archives, "no end-of-archive marker after 4 members"),
     (negative_size, "damaged"), (compressed, "damaged or not an uncompressed tar file")],
)  # fmt: skip
def test_damage_that_tarfile_takes_for_the_end(model_folder, tmp_path, damage, reason):
    """tarfile stops silently at each of these, or never stops."""
    source = write_tar(tmp_path / "x.tar", [(f"{i}.npy", npy_bytes(GRIDS[0])) for i in range(4)])
    source.write_bytes(damage(source.read_bytes()))
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 2
    (reject,) = read_rejects(tmp_path / "out/x.tar.rejects.jsonl")
    assert reason in reject["reason"] and file_names(tmp_path / "out") == ["x.tar.rejects.jsonl"]


def test_links_and_other_members(model_folder, tmp_path):
    """Links and devices are rejected. Members that WebDataset ignores (folders, macOS's ._ files) are skipped."""
    source = tmp_path / "x.tar"
    with tarfile.open(source, "w") as tar:
        kinds = [tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]
        files = [(f"d/{i}.npy", kind) for i, kind in enumerate(kinds)]
        for name, kind in [("d", tarfile.DIRTYPE), *files, ("d/._0.npy", tarfile.REGTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "d/0.npy"
            member.size = len(npy_bytes(GRIDS[0])) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(npy_bytes(GRIDS[0])))
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 1
    rejects = read_rejects(tmp_path / "out/x.tar.rejects.jsonl")
    assert [reject["name"] for reject in rejects] == ["d/1", "d/2", "d/3"]
    assert {reject["reason"] for reject in rejects} == {"npy must be a regular file, got a link, device or sparse file"}
    assert list(read_tar(tmp_path / "out/x.tar")) == ["d/0.png"]


def test_sparse_members_are_rejected(model_folder, tmp_path):
    """The holes of a sparse member expand to any size."""
    source = tmp_path / "x.tar"
    with tarfile.open(source, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in [("0.npy", {}), ("0.txt", {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(100 << 20)})]:
            member = tarfile.TarInfo(name)
            member.pax_headers, contents = headers, npy_bytes(GRIDS[0])
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    assert run_decode(model_folder, source, "-o", tmp_path / "out") == 1
    (reject,) = read_rejects(tmp_path / "out/x.tar.rejects.jsonl")
    assert reject["reason"] == "txt must be a regular file, got a link, device or sparse file"


def test_files_of_a_sample_must_be_adjacent(model_folder, tmp_path):
    """In a tar sorted by suffix, codes would otherwise be decoded without their height and width."""
    size, codes = b'{"height": 7, "width": 7}', npy_bytes(GRIDS[0])
    files = [("0.json", size), ("1.json", size), ("0.npy", codes), ("1.npy", codes), ("2.npy", codes)]
    assert run_decode(model_folder, write_tar(tmp_path / "x.tar", files), "-o", tmp_path / "out") == 1
    assert list(read_tar(tmp_path / "out/x.tar")) == ["2.png"]
    reasons = [reject["reason"] for reject in read_rejects(tmp_path / "out/x.tar.rejects.jsonl")]
    assert ["must be adjacent" in reason for reason in reasons] == [False, False, True, True]


def test_codes_under_another_name_beside_an_image(model, model_folder, tmp_path, capsys):
    """The image that is already there is kept, and a mix of samples with and without one is refused rather than overwritten."""
    files = [("0.png", b"original"), ("0.vq.npy", npy_bytes(GRIDS[0])), ("1.vq.npy", npy_bytes(GRIDS[2])), ("1.npy", b"other")]
    source = write_tar(tmp_path / "x.tar", files)
    assert run_decode(model_folder, source, "-o", tmp_path / "out", "--key", ".vq.npy", "--image-key", "decoded.png") == 0
    found = read_tar(tmp_path / "out/x.tar")
    assert list(found) == ["0.png", "0.decoded.png", "1.npy", "1.decoded.png"]
    assert found["0.png"] == b"original" and found["1.npy"] == b"other"
    for name, i in (("0", 0), ("1", 2)):
        assert np.array_equal(png_pixels(found[f"{name}.decoded.png"]), expected_pixels(model, i))
    assert run_decode(model_folder, source, "-o", tmp_path / "out", "--key", "vq.npy", "--image-key", "decoded.png") == 0
    assert "decoded 0, already there 0" in capsys.readouterr().out  # the whole shard is skipped
    assert run_decode(model_folder, source, "-o", tmp_path / "clash", "--key", "vq.npy") == 1
    assert list(read_tar(tmp_path / "clash/x.tar")) == ["1.npy", "1.png"]
    (reject,) = read_rejects(tmp_path / "clash/x.tar.rejects.jsonl")
    assert reject["name"] == "0" and "a sample must have a .vq.npy and no .png" in reject["reason"]
    assert "choose other suffixes with --key and --image-key" in reject["reason"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.TAR.GZ"])
def test_compressed_tar(model, model_folder, tmp_path, name):
    archive = write_tar(tmp_path / "plain.tar", [(f"{i}.npy", npy_bytes(GRIDS[i])) for i in (0, 2, 4)]).read_bytes()
    source = tmp_path / "in" / name
    source.parent.mkdir()
    source.write_bytes(gzip.compress(archive[:3000]) + gzip.compress(archive[3000:]))  # as pigz and concatenation write it
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert file_names(tmp_path / "out") == ["x.tar"]
    found = read_tar(tmp_path / "out/x.tar")
    assert list(found) == ["0.png", "2.png", "4.png"]
    assert all(np.array_equal(png_pixels(found[f"{i}.png"]), expected_pixels(model, i)) for i in (0, 2, 4))


def cut_off(archive):
    return gzip.compress(archive)[:-30]


def flipped(archive):
    damaged = bytearray(gzip.compress(archive))
    damaged[-8] ^= 255  # of the checksum
    return bytes(damaged)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (cut_off, "damaged or not a gzip file: EOFError"),
        (flipped, "damaged or not a gzip file: BadGzipFile: CRC check failed"),
        (lambda archive: archive, "damaged or not a gzip file: BadGzipFile: Not a gzipped file"),
        (lambda archive: gzip.compress(b"text" * 1000), "damaged or not a gzip-compressed tar file"),
        (lambda archive: gzip.compress(archive[:4096]), "no end-of-archive marker after 4 members"),
        (lambda archive: gzip.compress(archive * 2), "no end-of-archive marker after 4 members"),
        (lambda archive: gzip.compress(negative_size(archive)), "damaged"),
    ],
)
def test_damaged_compressed_tar(model_folder, tmp_path, damage, reason):
    archive = write_tar(tmp_path / "x.tar", [(f"{i}.npy", npy_bytes(GRIDS[0])) for i in range(4)]).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(damage(archive))
    assert run_decode(model_folder, tmp_path / "x.tar.gz", "-o", tmp_path / "out") == 2
    (reject,) = read_rejects(tmp_path / "out/x.tar.rejects.jsonl")
    assert reason in reject["reason"] and file_names(tmp_path / "out") == ["x.tar.rejects.jsonl"]


def long_header(size):
    """Return an archive whose extended header claims and has this size."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
    return header.tobuf(tarfile.GNU_FORMAT) + bytes(size)


def many_members(size):
    return (tarfile.TarInfo("a/b.txt").tobuf() * (size // 512))[:size] + bytes(1024)


@pytest.mark.parametrize("content, small", [(bytes, 16 << 20), (long_header, 16 << 20), (many_members, 4 << 20)])
def test_gzip_bombs(model_folder, tmp_path, monkeypatch, content, small):
    """Memory does not follow what the file expands to."""
    monkeypatch.setattr(files, "MIN_EXPANDED_BYTES", 40 << 20)
    monkeypatch.setattr(webdataset, "MAX_SAMPLE_BYTES", 1 << 20)
    for size in (small, 64 << 20):
        source = tmp_path / f"{size}.tar.gz"
        source.write_bytes(gzip.compress(content(size)))
        assert source.stat().st_size < size // 150
        tracemalloc.start()
        try:
            status = run_decode(model_folder, source, "-o", tmp_path / "out")
            assert tracemalloc.get_traced_memory()[1] < 14 << 20
        finally:
            tracemalloc.stop()
        rejects = tmp_path / f"out/{size}.tar.rejects.jsonl"
        if size == 64 << 20:
            assert status == 2 and "expected at most 41943040 bytes after decompression" in rejects.read_text()
        elif content is long_header:
            assert status == 2 and "expected a header of at most 1048576 bytes, got 16777216" in rejects.read_text()


def test_members_are_not_held_in_memory(tmp_path):
    with tarfile.open(write_tar(tmp_path / "x.tar", [(f"{i}.txt", b"") for i in range(3)])) as tar:
        assert [(member.name, len(tar.members)) for member in webdataset._members(tar)] == [(f"{i}.txt", 0) for i in range(3)]


def test_two_spellings_of_a_key(model_folder, tmp_path):
    """Their images would be extracted to one file."""
    files = [(f"{key}.npy", npy_bytes(GRIDS[0])) for key in ("x/a", "x/./a", "x//a", "x/A")]
    assert run_decode(model_folder, write_tar(tmp_path / "x.tar", files), "-o", tmp_path / "out") == 1
    assert list(read_tar(tmp_path / "out/x.tar")) == ["x/a.png", "x/A.png"]
    assert [reject["name"] for reject in read_rejects(tmp_path / "out/x.tar.rejects.jsonl")] == ["x/./a", "x//a"]
