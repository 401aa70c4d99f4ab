import os
import pickle
import struct
import zipfile

import pytest
import torch
from checkpoints import make_movq, same_weights
from safetensors.torch import save_file

from movq_ext import CheckpointError, from_pretrained, save_pretrained
from movq_ext.io.tensor_files import format_names


def test_entries_other_than_tensors_are_refused(tmp_path):
    torch.save({**make_movq().state_dict(), "note": "hello"}, tmp_path / "note.pt")
    with pytest.raises(CheckpointError, match="expected only tensors, got other entries: note"):
        from_pretrained(tmp_path / "note.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="expected a dictionary of named tensors, got list"):
        from_pretrained(tmp_path / "list.pt")


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["ours", "ckpt"])
def test_truncated_files_are_refused(tmp_path, kind, kept):
    if kind == "ours":
        save_pretrained(make_movq(), tmp_path)
        path = tmp_path / "model.safetensors"
    else:
        path = tmp_path / "movq.ckpt"
        torch.save(make_movq().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        from_pretrained(path)


class Bomb:
    """Pickles to code that creates a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_does_not_run(tmp_path, legacy):
    path, trace = tmp_path / "bomb.ckpt", tmp_path / "ran"
    state = {"state_dict": make_movq().state_dict(), "callback": Bomb(str(trace))}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="objects other than tensors, which could run code"):
        from_pretrained(path)
    path.write_bytes(pickle.dumps(Bomb(str(trace))))
    with pytest.raises(CheckpointError):
        from_pretrained(path)
    assert not trace.exists()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    torch.save(make_movq().state_dict(), tmp_path / "movq.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "movq.ckpt") as old,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, bytes(50 << 20) if name.endswith("/data/0") else old.read(name))
    with pytest.raises(CheckpointError, match="is a compressed or encrypted archive: expected one"):
        from_pretrained(tmp_path / "bomb.ckpt")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    """A stride of 0 gives a tensor any size."""
    expanded = torch.zeros(1).expand(10**6, 10**6)
    torch.save({**make_movq().state_dict(), "decoder.conv_in.bias": expanded}, tmp_path / "movq.ckpt")
    with pytest.raises(CheckpointError, match="bytes claims to hold 40000"):
        from_pretrained(tmp_path / "movq.ckpt", dtype=torch.float16)


def test_a_header_that_claims_terabytes_is_refused(tmp_path):
    for declared in (2**40, 2**63, 2**64 - 1):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", declared) + b"{}")
        with pytest.raises(CheckpointError, match="is damaged"):
            from_pretrained(tmp_path / "a.safetensors")
    header = b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="is damaged"):
        from_pretrained(tmp_path / "a.safetensors")


def test_format_names():
    assert format_names(["b", "a\x1b"]) == "a\\x1b, b"
    assert format_names(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


@pytest.mark.parametrize("name", ["movq", "movq.bin", "movq.ckpt", "movq.safetensors", "da39a3ee5e6b"])
@pytest.mark.parametrize("as_safetensors", [True, False])
def test_the_bytes_tell_the_format(tmp_path, name, as_safetensors):
    (save_file if as_safetensors else torch.save)(dict(make_movq().state_dict()), tmp_path / name)
    assert same_weights(from_pretrained(tmp_path / name), make_movq())


@pytest.mark.parametrize(("start", "message"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 271115680\n", "is a Git LFS pointer .*git lfs pull"),
    (b"<!DOCTYPE html>\n<html lang=en>", "is an HTML page"), (b"\n  <HTML><body>", "is an HTML page"),
    (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is an XML document"),
    (b'{"error":"Repository not found"}', "is a JSON document"), (b'{"err": {"code": 404}}', "is a JSON document"),
    (b"\x1f\x8b\x08", "is a gzip archive"), (b"GGUF\3\0\0\0", "is a GGUF file"), (b"\x89HDF\r\n", "is an HDF5 file"),
    (b"\x93NUMPY\1\0", "is a NumPy array"), (b"", "is damaged: the file is empty"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["movq.safetensors", "movq.ckpt", "movq"])
def test_files_that_are_no_weights_are_named(tmp_path, name, start, message):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(CheckpointError, match=rf"/{name} {message}"):
        from_pretrained(tmp_path / name)
