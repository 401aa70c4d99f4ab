"""Where encode writes to: a folder of shards, or one code file.

An image goes to a journal as soon as it is encoded, and to a shard when the shard is full. Shards are written atomically, and a
finished one is never changed. If the process is killed or the disk is full, the next process finds the images of the unfinished
shard in the journal. The journal also locks the output: processes write to it one after the other.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from ..io.codes import MAX_HEADER_BYTES, CodeFile, name_problem
from ..io.files import MAX_REASON_CHARACTERS, follow_link, printable, remove_partial_files
from ..io.folders import search_folder
from .code_writers import WRITERS, read_image_hashes, save_codes
from .codebook import Codebook
from .journal import Journal
from .parquet_reader import import_pyarrow

DEFAULT_SHARD_SIZE = 10_000  # images
MAX_SHARD_BYTES = 1 << 30  # of codes, which are in memory until the shard is written
JOURNAL_SUFFIX = ".unfinished.jsonl"


class CodeOutput(ABC):
    """A context manager with a method `add`. Leaving it writes the images that are only in the journal.

    Args:
        out: the folder or file.
        journal: its journal. The folder of the journal is created.
        codebook: of the model that encodes the images.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a file is damaged or was made with another codebook.
    """

    def __init__(self, out: Path, journal: Path, codebook: Codebook) -> None:
        self.out, self.codebook = out, codebook
        self.hashes: dict[str, str] = {}  # of the images that the output holds, by name; "" if unknown
        journal.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(journal, out)
        try:
            self._load()
            recovered = self._journal.recover(codebook)
            for name, codes in recovered.codes.items():
                if name not in self.hashes:  # a shard may have been written before the journal was cleared
                    self._collect(name, codes, recovered.sizes[name], recovered.hashes.get(name, ""))
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.flush()
            self._journal.delete()
        finally:
            self._journal.close()

    def holds(self, name: str, source_hash: str) -> bool:
        """Return True if the output holds an image.

        Raises ValueError if it holds another one of the same name, or if the name is invalid.
        """
        if (problem := name_problem(name)) is not None:
            raise ValueError(problem)
        if name in self.hashes and self.hashes[name] not in ("", source_hash):
            raise ValueError(f"{name} is already there with other contents: encode to another output")
        return name in self.hashes

    @abstractmethod
    def require_room(self, names: Iterable[str]) -> None:
        """Raise ValueError if the output cannot hold images of these names besides those that it holds."""

    def add(self, name: str, codes: Tensor, size: tuple[int, int], source_hash: str = "") -> None:
        """Add an image.

        Args:
            name: a name that `holds` accepts.
            codes: indices ``(h, w)``.
            size: (height, width) of the image in pixels.
            source_hash: content_hash of the image's file.

        Raises:
            OSError: a file cannot be written. The journal keeps the images that were added before.
        """
        if self._is_full(name, codes):
            self.flush()
        self._journal.append(self.codebook.fingerprint, name, codes, size, source_hash)
        self._collect(name, codes, size, source_hash)

    def flush(self) -> None:
        """Write the images that are only in the journal."""
        self._write()
        self._journal.clear()

    def _save(self, file: CodeFile, path: Path) -> None:
        try:
            save_codes(file, path)
        except Exception as error:  # pyarrow has errors of its own
            reason = printable(str(error), MAX_REASON_CHARACTERS)
            kept = f"its images are in {self._journal.path} for the next run"
            raise OSError(f"cannot write {path}; {kept}: {reason}") from error

    @abstractmethod
    def _load(self) -> None:
        """Fill in `hashes`."""

    @abstractmethod
    def _collect(self, name: str, codes: Tensor, size: tuple[int, int], source_hash: str) -> None:
        """Add an image that is in the journal."""

    @abstractmethod
    def _write(self) -> None:
        """Write the collected images."""

    def _is_full(self, name: str, codes: Tensor) -> bool:
        return False


class ShardFolder(CodeOutput):
    """A folder of shards ``codes-00000``, ``codes-00001``, ... A finished shard is never changed.

    Args:
        out: the folder. Images of all shards in it and its subfolders count as encoded.
        codebook: see CodeOutput.
        suffix: of the shards that are written.
        shard_size: maximum number of images of a shard. A shard also ends at MAX_SHARD_BYTES.
    """

    def __init__(self, out: Path, codebook: Codebook, suffix: str, shard_size: int = DEFAULT_SHARD_SIZE) -> None:
        if suffix == ".parquet":
            import_pyarrow()  # raises an error now rather than after the first shard
        self._suffix, self._shard_size = suffix, shard_size
        self._shard, self._shard_bytes, self._index = CodeFile(codebook.fingerprint), 0, 0
        super().__init__(out, out / JOURNAL_SUFFIX, codebook)

    def _load(self) -> None:
        search = search_folder(self.out, WRITERS, hidden=(".", "_"))
        if search.unreadable:
            raise search.unreadable[0]
        for path in search.files:
            self.hashes |= read_image_hashes(path, self.codebook)
        stems = (path.stem for path in search.files if path.parent == self.out)
        self._index = 1 + max((int(match[1]) for stem in stems if (match := re.fullmatch(r"codes-(\d+)", stem))), default=-1)
        remove_partial_files(self._path.with_suffix(suffix) for suffix in WRITERS)

    @property
    def _path(self) -> Path:
        return self.out / f"codes-{self._index:05d}{self._suffix}"

    def require_room(self, names: Iterable[str]) -> None:
        """Do nothing: a folder has room for any number of shards."""

    def _is_full(self, name: str, codes: Tensor) -> bool:
        full = len(self._shard.codes) >= self._shard_size or not self._shard.has_room([name])
        return full or self._shard_bytes + 4 * codes.numel() > MAX_SHARD_BYTES

    def _collect(self, name: str, codes: Tensor, size: tuple[int, int], source_hash: str) -> None:
        if self._is_full(name, codes):
            self._write()
        self._shard.add(name, codes, size, source_hash)
        self._shard_bytes += 4 * codes.numel()
        self.hashes[name] = source_hash

    def _write(self) -> None:
        if self._shard.codes:
            self._save(self._shard, self._path)
            self._shard, self._shard_bytes = CodeFile(self.codebook.fingerprint), 0
            self._index += 1


class SingleFile(CodeOutput):
    """One code file, written once at the end of a run."""

    def __init__(self, out: Path, codebook: Codebook) -> None:
        self._file, self._changed = CodeFile(codebook.fingerprint), False
        out = follow_link(out)  # the journal, which is the lock, is beside the file
        super().__init__(out, out.with_name(f".{out.name}{JOURNAL_SUFFIX}"), codebook)

    def _load(self) -> None:
        if self.out.exists():
            self._file = CodeFile.load(self.out)
            self.codebook.check_fingerprint(self._file.codebook, self.out)
        self.hashes = {name: self._file.hashes.get(name, "") for name in self._file.codes}
        remove_partial_files([self.out])

    def require_room(self, names: Iterable[str]) -> None:
        new = set(names) - self.hashes.keys()
        if not self._file.has_room(new):
            problem = f"{self.out} cannot hold {len(self.hashes) + len(new)} images"
            raise ValueError(f"{problem}: their names exceed {MAX_HEADER_BYTES} bytes; choose a folder as output, for shards")

    def _collect(self, name: str, codes: Tensor, size: tuple[int, int], source_hash: str) -> None:
        self._file.add(name, codes, size, source_hash)
        self.hashes[name], self._changed = source_hash, True

    def _write(self) -> None:
        if self._changed:
            self._save(self._file, self.out)
            self._changed = False
