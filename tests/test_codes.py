import hashlib
import json
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from movq_ext import MOVQ, from_pretrained, save_pretrained
from movq_ext.io import codes
from movq_ext.io.codes import (
    FORMAT,
    CodeFile,
    CodeFileError,
    codebook_fingerprint,
    decode_image,
    encode_image,
    name_problem,
    read_hashes,
)

DDCONFIG = dict(
    ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=(), in_channels=3, resolution=32, z_channels=4
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MOVQ(DDCONFIG, 64, 4).eval()


def two_images():
    file = CodeFile("book")
    file.add("a.jpg", torch.arange(6).view(2, 3), (15, 24))
    file.add("deep/b.png", torch.zeros(1, 1, dtype=torch.long), (1, 1))
    return file


def test_save_and_load(tmp_path):
    two_images().save(tmp_path / "new/codes.safetensors")
    loaded = CodeFile.load(tmp_path / "new/codes.safetensors")
    assert (loaded.codebook, loaded.sizes) == ("book", two_images().sizes)
    assert all(torch.equal(loaded.codes[name], tensor) for name, tensor in two_images().codes.items())
    assert loaded.codes["a.jpg"].dtype == torch.int32


def test_images_may_share_memory(tmp_path):
    """The same tensor twice, and views of a batch."""
    file, batch = CodeFile("book"), torch.arange(8, dtype=torch.int32).view(2, 2, 2)
    for name, grid in {"a": batch[0], "b": batch[0], "c": batch[1].t()}.items():
        file.add(name, grid, (2, 2))
    file.save(tmp_path / "x.safetensors")
    assert CodeFile.load(tmp_path / "x.safetensors").codes["c"].tolist() == [[4, 6], [5, 7]]


def test_loaded_codes_are_copies(tmp_path):
    """A file that is overwritten or cut short while its codes are decoded must not change or crash the run."""
    path = tmp_path / "x.safetensors"
    two_images().save(path)
    loaded = CodeFile.load(path)
    path.write_bytes(path.read_bytes()[:-24] + bytes([7]) * 24)  # in place
    assert loaded.codes["a.jpg"].tolist() == [[0, 1, 2], [3, 4, 5]]


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\\/"), min_size=1, max_size=60).filter(
    lambda name: name_problem(name) is None
)


@given(st.sets(NAMES, min_size=1, max_size=20))
def test_the_header_is_as_large_as_promised(names):
    file = CodeFile("book")
    for name in names:
        file.add(name, torch.zeros(1, 1), (10**9, 10**9), "0123456789abcdef")
    with TemporaryDirectory() as folder:
        file.save(f"{folder}/x.safetensors")
        header = int.from_bytes(Path(folder, "x.safetensors").read_bytes()[:8], "little")
        assert header <= file.header_bytes < 3 * header
        assert read_hashes(f"{folder}/x.safetensors") == ("book", file.hashes)


def test_an_interrupted_add_leaves_a_file_that_can_be_loaded(tmp_path):
    """A signal can arrive between any two statements."""

    class Interrupted(dict):
        def __setitem__(self, name, value):
            raise SystemExit

    file = CodeFile("book")
    file.add("a", torch.zeros(1, 1), (1, 1), "hash")
    for part in ("sizes", "hashes"):
        before = getattr(file, part)
        setattr(file, part, Interrupted(before))
        with pytest.raises(SystemExit):
            file.add("b", torch.zeros(1, 1), (1, 1), "hash")
        setattr(file, part, before)
        file.save(tmp_path / "x.safetensors")
        assert list(CodeFile.load(tmp_path / "x.safetensors").codes) == ["a"]


def test_a_full_file_can_be_saved(tmp_path):
    """About a thousand names of 4000 characters fill the header."""
    file, name = CodeFile("book"), "\u00fc" * 4000
    with pytest.raises(ValueError, match="the code file is full: its header would exceed 100000000 bytes"):
        for i in range(2000):
            file.add(f"{i}{name}", torch.zeros(1, 1), (1, 1))
    file.save(tmp_path / "x.safetensors")
    assert len(CodeFile.load(tmp_path / "x.safetensors").codes) == len(file.codes) > 900


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "codes.safetensors"
    two_images().save(path)

    def disk_full(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(codes, "write_safetensors", disk_full)
    with pytest.raises(OSError, match="No space left"):
        CodeFile("other").save(path)
    assert CodeFile.load(path).codebook == "book" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", [0, 7, 30, -1])
def test_truncated_files_are_refused(tmp_path, kept):
    path = tmp_path / "codes.safetensors"
    two_images().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is damaged"):
        CodeFile.load(path)


@pytest.mark.parametrize(("metadata", "message"), [
    (None, "expected a code file of format 'movq_ext.codes.1', got format None"),
    ({"format": "other"}, "got format 'other'"),
    ({"format": FORMAT}, "is damaged"),
    ({"format": FORMAT, "codebook": "x", "sizes": "{"}, "is damaged"),
    ({"format": FORMAT, "codebook": "x", "sizes": "[]"}, "is damaged"),
    ({"format": FORMAT, "codebook": "x", "sizes": "{}"}, "'a' has no size"),
    ({"format": FORMAT, "codebook": "x", "sizes": '{"a": [1]}'}, "is damaged"),
])  # fmt: skip
def test_damaged_metadata_are_refused(tmp_path, metadata, message):
    save_file({"a": torch.zeros(1, 1, dtype=torch.int32)}, tmp_path / "codes.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        CodeFile.load(tmp_path / "codes.safetensors")


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "b/../../a.png", "..\\a.png"])
def test_names_outside_the_output_folder_are_refused(tmp_path, name):
    metadata = {"format": FORMAT, "codebook": "x", "sizes": json.dumps({name: [1, 1]})}
    save_file({name: torch.zeros(1, 1, dtype=torch.int32)}, tmp_path / "codes.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="expected an image name inside the output folder, got "):
        CodeFile.load(tmp_path / "codes.safetensors")


def test_png_names():
    file = CodeFile("book")
    for name in ("a.jpg", "a.png", "b.jpg", "deep/a.jpg"):
        file.add(name, torch.zeros(1, 1), (1, 1))
    assert list(file.png_names().values()) == ["a.jpg.png", "a.png.png", "b.png", "deep/a.png"]


@pytest.mark.parametrize("other", ["a/./b.jpg", "a//b.jpg", "./a/b.jpg"])
def test_two_spellings_of_one_name_are_refused(tmp_path, other):
    """They would be decoded to the same file."""
    file = CodeFile("book")
    for name in ("a/b.jpg", other):
        file.add(name, torch.zeros(1, 1), (1, 1))
    file.save(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged: two names refer to the same image"):
        CodeFile.load(tmp_path / "x.safetensors")


def test_no_two_images_share_a_png():
    """Not even if one name is another name plus a suffix."""
    names = ["a.jpg", "a.png", "a.jpg.png", "b.jpg", "b.jpg.gif", "c", "c.png.png"]
    found = CodeFile("book", dict.fromkeys(names, torch.zeros(1, 1))).png_names()
    assert list(found) == names and len(set(found.values())) == len(names)
    assert found["b.jpg"] == "b.png" and found["c"] == "c.png"


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (17, 33), (8, 5)])
def test_images_of_any_size(model, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    indices = encode_image(model, image)
    assert indices.shape == (-(-size[0] // 2), -(-size[1] // 2))
    assert decode_image(model, indices, size).size == size[::-1]


@pytest.mark.parametrize(("grid", "size"), [((2, 2), (5, 4)), ((2, 2), (2, 4)), ((4,), (4, 1))])
def test_a_mismatched_size_is_refused(model, grid, size):
    with pytest.raises(ValueError, match=r"expected codes of shape \(\d+, \d+\) for an image of .*, got \("):
        decode_image(model, torch.zeros(grid, dtype=torch.int32), size)


def test_codebook_id(model):
    other = MOVQ(DDCONFIG, 64, 4)
    assert codebook_fingerprint(model) != codebook_fingerprint(other)
    other.load_state_dict(model.state_dict())
    assert codebook_fingerprint(other.half()) == codebook_fingerprint(model)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("stored", DTYPES)
def test_casts_keep_the_codebook_id(model, tmp_path, stored):
    """Whether `from_pretrained` casts, `to` does, or both. The id is that of the file in half precision."""
    save_pretrained(model, tmp_path, dtype=stored)
    expected = codebook_fingerprint(from_pretrained(tmp_path, dtype=stored))
    half = model.quantize.embedding.weight.detach().to(stored).half()
    assert expected == hashlib.sha256(half.numpy().tobytes()).hexdigest()[:16]
    for loaded in DTYPES:
        cast = from_pretrained(tmp_path, dtype=loaded)
        assert codebook_fingerprint(cast) == expected
        for dtype in (*DTYPES, torch.float64):
            assert codebook_fingerprint(deepcopy(cast).to(dtype)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", ["in place", "load_state_dict", "another layer"])
def test_a_changed_codebook_has_another_id(model, tmp_path, dtype, change):
    save_pretrained(model, tmp_path)
    changed = from_pretrained(tmp_path, dtype=dtype)
    replaced = changed.quantize.embedding.weight.detach() * (1 + 2**-7)  # the smallest step of bfloat16
    if change == "in place":
        changed.quantize.embedding.weight.data[3] = replaced[3]
    elif change == "load_state_dict":
        changed.load_state_dict({**changed.state_dict(), "quantize.embedding.weight": replaced})
    else:
        changed.quantize.embedding = torch.nn.Embedding.from_pretrained(replaced)
    assert codebook_fingerprint(changed) != codebook_fingerprint(from_pretrained(tmp_path))
    save_pretrained(changed, tmp_path / "changed")
    assert codebook_fingerprint(from_pretrained(tmp_path / "changed", dtype=dtype)) == codebook_fingerprint(changed)


# --- Untrusted files

NOT_A_SIZE = "expected two positive integers as the size of 'a', got "


@pytest.mark.parametrize(("size", "message"), [
    ("[1e999, 1]", NOT_A_SIZE), ("[true, 1]", NOT_A_SIZE), ('["1", 1]', NOT_A_SIZE), ("[-1, 1]", NOT_A_SIZE),
    ("[0, 1]", NOT_A_SIZE), ('[1, 1], "a": [2, 2]', "has a repeated key"), ("[1, 1, 1]", "is damaged: ValueError"),
    ("[" * 60, "is damaged"), ("[" + "{}," * 10**5 + "{}]", "characters of JSON"),
])  # fmt: skip
def test_untrusted_sizes(tmp_path, size, message):
    metadata = {"format": FORMAT, "codebook": "x", "sizes": '{"a": ' + size + "}"}
    save_file({"a": torch.zeros(1, 1, dtype=torch.int32)}, tmp_path / "codes.safetensors", metadata=metadata)
    with pytest.raises(CodeFileError, match=message):
        CodeFile.load(tmp_path / "codes.safetensors")


@pytest.mark.parametrize("grid", [torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.int32)])
def test_tensors_of_the_wrong_type_are_refused(tmp_path, grid):
    save_file({"a": grid}, tmp_path / "codes.safetensors", metadata={"format": FORMAT, "codebook": "x", "sizes": '{"a": [1, 1]}'})
    with pytest.raises(CodeFileError, match="expected 'a' to be int32 with 2 dimensions, got "):
        CodeFile.load(tmp_path / "codes.safetensors")


@pytest.mark.parametrize("name", [".", "a/..", "", "\0", "\udcff", "__metadata__", "x" * 5000])
def test_invalid_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="expected an image name"):
        CodeFile("book").add(name, torch.zeros(1, 1), (1, 1))
    if name.isascii() and name != "__metadata__":
        metadata = {"format": FORMAT, "codebook": "x", "sizes": json.dumps({name: [1, 1]})}
        save_file({name: torch.zeros(1, 1, dtype=torch.int32)}, tmp_path / "codes.safetensors", metadata=metadata)
        with pytest.raises(CodeFileError, match="expected an image name"):
            CodeFile.load(tmp_path / "codes.safetensors")


def test_names_that_json_escapes(tmp_path):
    file = CodeFile("book")
    file.add("\U0001f600" * 100, torch.zeros(1, 1), (10**9, 10**9))
    file.save(tmp_path / "codes.safetensors")
    assert CodeFile.load(tmp_path / "codes.safetensors").sizes == file.sizes
