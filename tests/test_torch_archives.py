"""The two formats of torch.save, as torch writes them and as others forge them."""

import functools
import struct
import warnings
import zipfile

import forged_checkpoints as forged
import pytest
import torch
from torch.utils import serialization

from movq_ext import CheckpointError
from movq_ext.io.checkpoint_files import read_tensors
from movq_ext.io.stored_tensors import Storage, load_entries
from movq_ext.io.torch_files import read_torch_file

DENSE = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
         "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32"]  # fmt: skip
SCALAR = forged.dictionary(a=forged.scalar())
LEGACY_SCALAR = forged.dictionary(a=forged.scalar(view=b"N"))


def unusual_tensors():
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(0, 100, (4, 6), generator=generator)
    flat = torch.randn(60, generator=generator)
    state = {dtype: grid.to(getattr(torch, dtype)) for dtype in DENSE}
    state |= {"row": flat[10:20], "column": flat.view(6, 10)[:, 3], "transposed": flat[:20].view(4, 5).t(), "whole": flat}
    state |= {"repeated": flat[:3].expand(2, 3), "scalar": torch.tensor(7.0), "empty": torch.empty(0, 3)}
    state |= {
        "parameter": torch.nn.Parameter(flat[:4].clone()),
        "channels": torch.randn(1, 4, 2, 3).to(memory_format=torch.channels_last),
    }
    state["attribute"] = torch.nn.Parameter(torch.ones(2))
    state["attribute"].note = "kept by torch.save"
    return state


@pytest.mark.parametrize("way", ["zip", "legacy", "no checksums", "alignment", "big-endian"])
def test_tensors_are_those_of_torch_load(tmp_path, way):
    """Every dtype and view, in each way of saving."""
    path = tmp_path / "a.pt"
    with serialization.config.patch(
        {"save.compute_crc32": way != "no checksums", "save.storage_alignment": 4096 if way == "alignment" else 64}
    ):
        state = unusual_tensors()
        if way == "legacy":  # torch.load does not read these
            state = {name: x for name, x in state.items() if name not in ("uint16", "uint32", "float8_e4m3fn", "float8_e5m2")}
        torch.save(state, path, _use_new_zipfile_serialization=way != "legacy")
    if way == "big-endian":
        path = rewrite(path, lambda name, content: b"big" if name.endswith("byteorder") else content)
    expected = torch.load(path, weights_only=True)
    found = read_tensors(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(*(x.detach().contiguous().flatten().view(torch.uint8) for x in (found[name], tensor))), name
    assert found["channels"].is_contiguous(memory_format=torch.channels_last)


def rewrite(path, change):
    """Return the path of a copy whose members' contents are change(name, content)."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".new"), "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return path.with_suffix(".new")


def test_tensors_of_one_storage_do_not_share_memory(tmp_path):
    flat = torch.arange(6.0)
    torch.save({"a": flat[:3], "b": flat[3:], "c": flat, "d": flat[:1].expand(6)}, tmp_path / "a.pt")
    state = read_tensors(tmp_path / "a.pt")
    for tensor in state.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.add_(1)
    assert [tensor.tolist() for tensor in state.values()] == [[1, 2, 3], [4, 5, 6], [1, 2, 3, 4, 5, 6], [1] * 6]


def test_a_legacy_storage_may_be_a_view_of_another(tmp_path):
    """As PyTorch wrote them before 0.4."""
    view = forged.tuple_of(forged.text("part"), forged.number(1), forged.number(2))
    forged.write_legacy(tmp_path / "a.pt", forged.dictionary(a=forged.tensor(3, 0, forged.sizes(2), forged.sizes(1), view)),
                        [struct.pack("<3f", 1, 2, 3)])  # fmt: skip
    assert read_tensors(tmp_path / "a.pt")["a"].tolist() == [2, 3]


def test_views_of_one_legacy_storage_read_it_once(tmp_path, monkeypatch):
    views = [forged.tuple_of(forged.text(str(i)), forged.number(i), forged.number(9 - i)) for i in range(8)]
    tensors = {f"t{i}": forged.tensor(9, 1, b")", b")", view) for i, view in enumerate(views)}
    forged.write_legacy(tmp_path / "a.pt", forged.dictionary(**tensors), [struct.pack("<9f", *range(9))])
    reads, read = [], Storage.read
    monkeypatch.setattr(Storage, "read", lambda storage: reads.append(storage) or read(storage))
    assert [tensor.item() for tensor in read_tensors(tmp_path / "a.pt").values()] == list(range(1, 9))
    assert len(reads) == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_tied_weights_stay_tied(tmp_path, legacy):
    """The file holds them once: they are larger than it together."""
    weight = torch.arange(3000.0)
    torch.save({f"t{i}": weight.detach() for i in range(9)} | {"view": weight[1:]}, tmp_path / "a.pt",
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    with pytest.raises(CheckpointError, match="claims to hold"):  # an overlapping tensor is not a tied one
        read_tensors(tmp_path / "a.pt")
    torch.save({f"t{i}": weight.detach() for i in range(9)}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    state = read_tensors(tmp_path / "a.pt")
    assert len(state) == 9 and all(tensor is state["t0"] and torch.equal(tensor, weight) for tensor in state.values())


def test_conjugated_and_negated_tensors(tmp_path):
    """torch.save stores the elements as they are, and the operation beside them."""
    values = [torch.tensor([1 + 2j, 3 - 4j]) for _ in range(4)]
    conj, neg, both, plain = values
    state = {"conj": conj.conj(), "neg": neg.conj().imag, "both": torch._neg_view(both.conj()), "plain": plain}
    torch.save(state, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {name: x.tolist() for name, x in state.items()}
    assert not any(tensor.is_conj() or tensor.is_neg() for tensor in found.values())


def test_only_one_directory_is_read(tmp_path):
    """torch reads one that zipfile does not see. Later versions of Python refuse the archive."""
    path = tmp_path / "a.pt"
    one, two = (functools.partial(forged.write_archive, value=SCALAR, storages=[struct.pack("<f", value)]) for value in (1, 2))
    forged.write_two_directories(path, one, two)
    assert torch.load(path, weights_only=True)["a"] == 2
    try:
        assert read_tensors(path)["a"] == 1
    except CheckpointError as error:
        assert "is damaged" in str(error)


def mark_encrypted(path):
    forged.write_archive(path, SCALAR)
    path.write_bytes(path.read_bytes().replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"))


def repeat_member(path):
    forged.write_archive(path, SCALAR)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a/data/0", b"four")


def compress_pickle(path):
    """The storage is large enough that all members together are smaller than the file claims."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", forged.PROTOCOL + SCALAR + forged.STOP, zipfile.ZIP_DEFLATED)
        archive.writestr("a/data/0", forged.ONE)


def compress_again(path):
    """As other programs zip a checkpoint."""
    forged.write_archive(path, SCALAR, [bytes(10_000)], zipfile.ZIP_DEFLATED)


def write_byteorder(path):
    forged.write_archive(path, SCALAR)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/byteorder", "middle")


def legacy_keys(keys):
    """A legacy file with other opcodes for its list of keys."""

    def write(path):
        forged.write_legacy(path, LEGACY_SCALAR)
        path.write_bytes(path.read_bytes().replace(b"](X\1\0\0\0" + b"0e.", keys + b"."))

    return write


def remove_header(path):
    forged.write_archive(path, SCALAR)
    with zipfile.ZipFile(path) as archive, open(path, "r+b") as file:
        file.seek(archive.getinfo("a/data/0").header_offset)
        file.write(b"none")


def cut_off(path):
    forged.write_legacy(path, LEGACY_SCALAR)
    path.write_bytes(path.read_bytes()[:-1])


def legacy(value, storages=(forged.ONE,)):
    return lambda path: forged.write_legacy(path, forged.dictionary(a=value), storages)


def archive(value, storages=(forged.ONE,)):
    return lambda path: forged.write_archive(path, forged.dictionary(a=value), storages)


VIEW = forged.tuple_of(forged.text("part"), forged.number(1), forged.number(1))
DOUBLED_KEY = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(16))  # 2**16 empty tuples
OTHER_TYPE = forged.storage(1, kind="torch.IntStorage", view=VIEW)
META = forged.call("torch._utils._rebuild_meta_tensor_no_storage", forged.name("torch.float32"), forged.sizes(2**62, 4),
                   forged.sizes(4, 1), b"\x89")  # fmt: skip
MODULE = forged.tuple_of(forged.text("module"), b"N", b"N", b"N") + b"Q"
FORGED = {
    "repeated member": (repeat_member, "two members of the archive have the same name"),
    "compressed pickle": (compress_pickle, "is a compressed or encrypted archive: expected one that torch.save wrote"),
    "compressed again": (compress_again, "is a compressed or encrypted archive"),
    "unknown byte order": (write_byteorder, "expected byteorder little or big, got middle"),
    "legacy keys that repeat themselves": (
        legacy_keys(b"]" + DOUBLED_KEY + b"a"),
        "expected a list of the storages' keys",
    ),
    "legacy keys that are text": (legacy_keys(forged.text("0")), "expected a list of the storages' keys after the tensors"),
    "view of another type": (legacy(b"0".join([forged.scalar(1, b"N"), OTHER_TYPE])), "expected a view of torch.float32, as its"),
    "meta tensor too large": (archive(META), "cannot load the tensors of .*a.pt: RuntimeError"),
    "claim of many digits": (archive(forged.scalar(1 << 2000)), "expected a storage's name and its number of elements"),
    "encrypted": (mark_encrypted, "is a compressed or encrypted archive"),
    "no local header": (remove_header, "no header of data/0 at byte"),
    "storage without a member": (archive(forged.scalar(), []), "KeyError: 'a/data/0'"),
    "large claim": (archive(forged.scalar(2)), "a storage of 4 bytes claims to hold 2 elements of torch.float32"),
    "negative claim": (archive(forged.scalar(-1)), "expected a storage's name and its number of elements"),
    "legacy claim": (legacy(forged.scalar(9, b"N")), "a storage of 36 bytes claims to hold 1 elements of torch.float32"),
    "legacy storage without data": (legacy(forged.scalar(1, b"N"), []), "the data of 1 storages are missing"),
    "legacy storage cut off": (cut_off, r"a file of \d+ bytes claims to hold"),
    "view outside": (legacy(forged.scalar(1, VIEW)), "a view does not lie within its storage"),
    "plain pickle": (lambda path: path.write_bytes(forged.PROTOCOL + b"}."), "is a pickle that torch.save did not write"),
    "legacy module": (legacy(MODULE), "has a whole module in the format before torch 1.6: expected its state_dict"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused(tmp_path, case):
    write, message = FORGED[case]
    write(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "a.pt")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    """A mixture of two models would be worse than an error."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(3)}, path)
    state = read_torch_file(path)[()]
    torch.save({"a": torch.ones(3), "b": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"a.pt changed while it was read"):
        load_entries(state, path)
