import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from movq_ext import MOVQ
from movq_ext.io import codes
from movq_ext.io.codes import CodeFile, codebook_id, decode_image, encode_image

DDCONFIG = dict(
    ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=(), in_channels=3, resolution=32, z_channels=4
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MOVQ(DDCONFIG, 64, 4).eval()


def filled():
    file = CodeFile("book")
    file.add("a.jpg", torch.arange(6).view(2, 3), (15, 24))
    file.add("deep/b.png", torch.zeros(1, 1, dtype=torch.long), (1, 1))
    return file


def test_save_and_load(tmp_path):
    filled().save(tmp_path / "new/codes.safetensors")
    loaded = CodeFile.load(tmp_path / "new/codes.safetensors")
    assert (loaded.codebook, loaded.sizes) == ("book", filled().sizes)
    assert all(torch.equal(loaded.codes[name], tensor) for name, tensor in filled().codes.items())
    assert loaded.codes["a.jpg"].dtype == torch.int32


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "codes.safetensors"
    filled().save(path)

    def disk_full(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(codes, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        CodeFile("other").save(path)
    assert CodeFile.load(path).codebook == "book" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", [0, 7, 30, -1])
def test_truncated_files_are_refused(tmp_path, kept):
    path = tmp_path / "codes.safetensors"
    filled().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is damaged"):
        CodeFile.load(path)


@pytest.mark.parametrize(("metadata", "message"), [
    (None, "expected a code file of format 'movq_ext.codes.1', got format None"),
    ({"format": "other"}, "got format 'other'"),
    ({"format": codes.FORMAT}, "is damaged"),
    ({"format": codes.FORMAT, "codebook": "x", "sizes": "{"}, "is damaged"),
    ({"format": codes.FORMAT, "codebook": "x", "sizes": "[]"}, "is damaged"),
    ({"format": codes.FORMAT, "codebook": "x", "sizes": "{}"}, "'a' has no size"),
    ({"format": codes.FORMAT, "codebook": "x", "sizes": '{"a": [1]}'}, "is damaged"),
])  # fmt: skip
def test_damaged_metadata_are_refused(tmp_path, metadata, message):
    save_file({"a": torch.zeros(1, 1, dtype=torch.int32)}, tmp_path / "codes.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        CodeFile.load(tmp_path / "codes.safetensors")


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "b/../../a.png", "..\\a.png"])
def test_names_outside_the_output_folder_are_refused(tmp_path, name):
    metadata = {"format": codes.FORMAT, "codebook": "x", "sizes": json.dumps({name: [1, 1]})}
    save_file({name: torch.zeros(1, 1, dtype=torch.int32)}, tmp_path / "codes.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="expected an image name inside the output folder, got "):
        CodeFile.load(tmp_path / "codes.safetensors")


def test_png_names():
    file = CodeFile("book")
    for name in ("a.jpg", "a.png", "b.jpg", "deep/a.jpg"):
        file.add(name, torch.zeros(1, 1), (1, 1))
    assert list(file.png_names().values()) == ["a.jpg.png", "a.png.png", "b.png", "deep/a.png"]


@pytest.mark.parametrize("other", ["a/./b.jpg", "a//b.jpg", "./a/b.jpg"])
def test_a_name_in_two_ways_is_refused(tmp_path, other):
    """They would be decoded to one file."""
    file = CodeFile("book")
    for name in ("a/b.jpg", other):
        file.add(name, torch.zeros(1, 1), (1, 1))
    file.save(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged: two names refer to the same image"):
        CodeFile.load(tmp_path / "x.safetensors")


def test_no_two_pictures_have_one_png():
    """Not even where one's own name is what another has with a suffix added."""
    names = ["a.jpg", "a.png", "a.jpg.png", "b.jpg", "b.jpg.gif", "c", "c.png.png"]
    found = CodeFile("book", dict.fromkeys(names, torch.zeros(1, 1))).png_names()
    assert list(found) == names and len(set(found.values())) == len(names)
    assert found["b.jpg"] == "b.png" and found["c"] == "c.png"


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (17, 33), (8, 5)])
def test_pictures_of_any_size(model, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    indices = encode_image(model, image)
    assert indices.shape == (-(-size[0] // 2), -(-size[1] // 2))
    assert decode_image(model, indices, size).size == size[::-1]


@pytest.mark.parametrize(("grid", "size"), [((2, 2), (5, 4)), ((2, 2), (2, 4)), ((4,), (4, 1))])
def test_a_size_that_does_not_fit_is_refused(model, grid, size):
    with pytest.raises(ValueError, match=r"expected codes of shape \(\d+, \d+\) for an image of .*, got \("):
        decode_image(model, torch.zeros(grid, dtype=torch.int32), size)


def test_codebook_id(model):
    other = MOVQ(DDCONFIG, 64, 4)
    assert codebook_id(model) != codebook_id(other)
    other.load_state_dict(model.state_dict())
    assert codebook_id(other.half()) == codebook_id(model)
