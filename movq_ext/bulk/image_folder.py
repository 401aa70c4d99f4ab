"""Shards whose images are written to a folder, one PNG each."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from ..io.files import MAX_REASON_CHARACTERS, atomic_write, printable
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
        return self.target / str(sample.payload)

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
