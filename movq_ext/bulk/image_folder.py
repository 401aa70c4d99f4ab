"""Shards whose images are written to a folder, one PNG each."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from ..io.files import MAX_REASON_CHARACTERS, MAX_SHOWN_CHARACTERS, atomic_write, printable, text_to_path
from .shards import CopyImage, FinishedImages, Sample, SampleError, Shard

# Errors that concern one path. All others, such as a full disk, would stop every image.
PATH_ERRORS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL}


class ImageFolderShard(Shard):
    """A shard that is decoded to a folder of PNGs, named by the samples' payloads.

    An earlier run may have written some of them, so `is_done` is always False.
    """

    @classmethod
    def target_of(cls, relative: Path) -> Path:
        return relative.with_suffix("")

    @property
    def rejects_path(self) -> Path:
        return self.target / f"{self.source.name}.rejects.jsonl"

    def is_done(self) -> bool:
        return False

    def image_path(self, sample: Sample) -> Path:
        return self.target / text_to_path(str(sample.payload))

    def open_images(self, weights_digest: bytes) -> AbstractContextManager[FinishedImages]:
        return nullcontext(ImageFolder(self.image_path))

    @contextmanager
    def open_writer(self, images: FinishedImages) -> Iterator[CopyImage]:
        yield lambda sample: None  # the images are in place


class ImageFolder:
    """The images in a folder. An image is finished if its file exists, whatever model it was decoded with.

    Args:
        path_of: returns the path of a sample's image.
    """

    def __init__(self, path_of: Callable[[Sample], Path]) -> None:
        self._path_of = path_of

    def __contains__(self, sample: Sample) -> bool:
        return os.path.exists(self._path_of(sample))  # Path.exists() raises OSError for a name that is too long

    def add(self, sample: Sample, png: bytes) -> None:
        path = self._path_of(sample)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                partial.write_bytes(png)
        except FileNotFoundError:
            if not path.exists():  # otherwise another run wrote it, and removed our partial file as stale
                raise
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in PATH_ERRORS:
                raise
            raise SampleError(f"the PNG cannot be written: {printable(str(error), MAX_REASON_CHARACTERS)}") from error

    def read(self, sample: Sample) -> bytes:
        return self._path_of(sample).read_bytes()


class PngNames:
    """The names of PNGs in a folder. Finds two that the file system takes for one: the later image would be lost.

    Args:
        folder: the folder, which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: set[str] = set()
        self._similar: dict[str, list[str]] = {}  # by a spelling that ignores what file systems ignore

    def add(self, name: str) -> None:
        """Add a relative path with ``/``. Raises SampleError if it is taken."""
        if name in self._names:
            raise SampleError("an earlier image has the same name")
        similar = self._similar.setdefault(_fold(name), [])
        if similar and self._ignores_case:  # otherwise, many similar names would take long to compare
            for other in similar:
                if self._are_one_file(other, name):
                    shown, other = (printable(text, MAX_SHOWN_CHARACTERS) for text in (name, other))
                    raise SampleError(f"{shown} and {other} of an earlier image are one file on this file system")
        self._names.add(name)
        similar.append(name)

    @cached_property
    def _ignores_case(self) -> bool:
        """True if the folder's file system ignores the case, the Unicode normal form or the last dot of names."""
        return any(self._are_one_file(*names) for names in (("A", "a"), ("\u00e9", "e\u0301"), ("a.", "a")))

    def _are_one_file(self, name: str, other: str) -> bool:
        """Ask the folder's file system. False if it cannot have such names: writing the images reports that."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self._folder, prefix=".names.") as probe:
            try:
                path = probe / text_to_path(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                return os.path.exists(probe / text_to_path(other))
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno not in PATH_ERRORS:
                    raise
                return False


def _fold(name: str) -> str:
    """Return a spelling that is the same for names that some file system takes for one."""
    parts = unicodedata.normalize("NFC", name).casefold().split("/")
    return "/".join(part.rstrip(". ") for part in parts)
