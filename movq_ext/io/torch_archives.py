"""The two formats of ``torch.save``: a zip archive since torch 1.6, and pickles followed by the storages before."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from .files import MAX_SHOWN_CHARACTERS, printable
from .stored_tensors import MAX_SIZE_BITS, Storage, StorageView, file_version
from .tensor_files import CheckpointError, check_claimed_bytes
from .torch_pickles import PickleReader, storage_dtype

ZIP_MAGIC = b"PK\3\4"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle, a number
LEGACY_VERSION = 1001  # the second
LOCAL_HEADER_BYTES = 30  # before a member's name
MIN_OPCODES = 1 << 20  # allowed whatever the file's size
BYTES_PER_OPCODE = 16  # of the file, for more: a tensor takes about 25 opcodes, and 600 bytes at least


def read_archive(path: Path) -> tuple[Any, set[str]]:
    """Return (content of a zip archive, names of the classes and functions in it).

    Raises CheckpointError for an archive that torch.save did not write, and a compressed one, which could fill the memory.
    """
    with open(path, "rb") as file:
        archive = Archive(path, file)
        reader = PickleReader(archive.find_storage, _max_opcodes(path))
        return reader.read(io.BytesIO(archive.read_member("data.pkl"))), reader.names


class Archive:
    """The members of a zip archive, which are not compressed. Only `zipfile` reads its directory.

    Checksums are not compared: torch.save can be told not to compute them.

    Args:
        path, file: the archive, and the same opened.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.version = path, file, file_version(file.fileno())
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        names = [member.filename for member in members]
        ends = [name.rpartition("/")[2] for name in names]
        if "constants.pkl" in ends:
            raise CheckpointError(f"{path} is a TorchScript archive: expected a state_dict saved by torch.save or safetensors")
        if "data.pkl" not in ends:
            raise CheckpointError(f"{path} is a zip archive that torch.save did not write: expected weights")
        if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
            raise CheckpointError(f"{path} is a compressed or encrypted archive: expected one that torch.save wrote")
        check_claimed_bytes(path, sum(member.file_size for member in members))
        if len(set(names)) < len(names) or ends.count("data.pkl") > 1:
            raise CheckpointError(f"{path} is damaged: two members of the archive have the same name")
        self.root = names[ends.index("data.pkl")].removesuffix("data.pkl")
        self.members = {member.filename: member for member in members}
        self.storages: dict[str, Storage] = {}
        self.byteorder = "little"
        if f"{self.root}byteorder" in self.members:
            self.byteorder = self.read_member("byteorder").decode()
            if self.byteorder not in ("little", "big"):
                raise ValueError(f"expected byteorder little or big, got {printable(self.byteorder, MAX_SHOWN_CHARACTERS)}")

    def find_member(self, name: str) -> tuple[int, int]:
        """Return (position of the first byte, number of bytes)."""
        member = self.members[self.root + name]
        self.file.seek(member.header_offset)
        header = self.file.read(LOCAL_HEADER_BYTES)
        if len(header) < LOCAL_HEADER_BYTES or not header.startswith(ZIP_MAGIC):
            raise ValueError(f"no header of {name} at byte {member.header_offset}")
        # The local header's extra field has another length than the directory's: torch.save aligns data with it.
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        position = member.header_offset + LOCAL_HEADER_BYTES + lengths
        check_claimed_bytes(self.path, position + member.file_size)
        return position, member.file_size

    def read_member(self, name: str) -> bytes:
        position, nbytes = self.find_member(name)
        self.file.seek(position)
        return self.file.read(nbytes)

    def find_storage(self, persistent_id: Any) -> Storage:
        """Return the storage of ``("storage", class, key, device, number of elements)``."""
        kind, storage_class, key, _, elements = persistent_id
        dtype = storage_dtype(storage_class)
        _check_persistent_id(kind, key, elements)
        if key not in self.storages:
            position, nbytes = self.find_member(f"data/{key}")
            if elements * dtype.itemsize > nbytes:
                raise ValueError(f"a storage of {nbytes} bytes claims to hold {elements} elements of {dtype}")
            self.storages[key] = Storage(self.path, self.version, dtype, nbytes, position, self.byteorder)
        return self.storages[key]


def read_legacy_file(path: Path) -> tuple[Any, set[str]]:
    """Return (content of a file in the format before torch 1.6, names of the classes and functions in it).

    Raises CheckpointError if the file was not written by torch.save or is shorter than its storages.
    """
    with open(path, "rb") as file:
        storages = LegacyStorages(path, file_version(file.fileno()))
        reader = PickleReader(storages.find_storage, _max_opcodes(path))
        if reader.read(file) != LEGACY_MAGIC or reader.read(file) != LEGACY_VERSION:
            raise CheckpointError(f"{path} is a pickle that torch.save did not write: expected weights")
        reader.read(file)  # sizes of C types where the file was written
        content, keys = reader.read(file), reader.read(file)
        storages.locate(keys, file)
        return content, reader.names


class LegacyStorages:
    """The storages of a file in the format before torch 1.6, whose positions are known once its pickles are read.

    Args:
        path, version: the file, and its `file_version`.
    """

    def __init__(self, path: Path, version: tuple[int, ...]) -> None:
        self.path, self.version = path, version
        self.storages: dict[str, Storage] = {}

    def find_storage(self, persistent_id: Any) -> Storage | StorageView:
        """Return the storage of ``("storage", class, key, device, number of elements, view)``, or the view.

        view is None or (key, first element, number of elements).
        """
        if persistent_id[0] == "module":
            raise CheckpointError(f"{self.path} has a whole module in the format before torch 1.6: expected its state_dict")
        kind, storage_class, key, _, elements, view = persistent_id
        dtype = storage_dtype(storage_class)
        _check_persistent_id(kind, key, elements)
        storage = self.storages.setdefault(key, Storage(self.path, self.version, dtype, elements * dtype.itemsize))
        if view is None:
            return storage
        _, first, elements = view
        if dtype != storage.dtype:
            raise ValueError(f"expected a view of {storage.dtype}, as its storage, got {dtype}")
        if not 0 <= first <= first + elements <= storage.nbytes // dtype.itemsize:
            raise ValueError("a view does not lie within its storage")
        return StorageView(storage, first)

    def locate(self, keys: Any, file: BinaryIO) -> None:
        """Set the positions of the storages, which follow in the order of keys. Each starts with its number of elements."""
        if type(keys) is not list or not all(type(key) is str for key in keys):
            raise ValueError("expected a list of the storages' keys after the tensors")
        for key in keys:
            storage = self.storages.pop(key)
            elements = int.from_bytes(file.read(8), "little")
            if elements * storage.dtype.itemsize != storage.nbytes:
                raise ValueError(f"a storage of {storage.nbytes} bytes claims to hold {elements} elements of {storage.dtype}")
            storage.position = file.tell()
            file.seek(storage.nbytes, os.SEEK_CUR)
        check_claimed_bytes(self.path, file.tell())
        if self.storages:
            raise ValueError(f"the data of {len(self.storages)} storages are missing")


def _check_persistent_id(kind: Any, key: Any, elements: Any) -> None:
    if kind != "storage" or type(key) is not str or type(elements) is not int or not 0 <= elements < 1 << MAX_SIZE_BITS:
        raise ValueError("expected a storage's name and its number of elements")


def _max_opcodes(path: Path) -> int:
    return MIN_OPCODES + path.stat().st_size // BYTES_PER_OPCODE
