import os
import pickle
import struct
import zipfile

import pytest
import torch
from checkpoints import make_movq

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
    with pytest.raises(CheckpointError, match=r"a file of \d+ bytes claims to hold 5\d{7}"):
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
