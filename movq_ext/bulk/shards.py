"""Shards: files that hold the codes of many images.

- ``x.parquet``: rows with a column ``codes`` (a list of integers, or a list of rows) and, optionally, ``name``, ``height`` and
  ``width``. The output is ``x.parquet``: the same rows with a column ``image`` (PNG) instead of ``codes``.
- ``x.tar``, a WebDataset: samples with ``key.npy`` (1-D or 2-D integers) and, optionally, ``key.json`` with ``height`` and
  ``width``. The output is ``x.tar``: the same samples with ``key.png`` instead of ``key.npy``.
- ``x.safetensors``: a file that ``encode`` wrote. The output is a folder ``x`` with one PNG per image.

Height and width are in pixels. The grid has one code per ``downsampling`` x ``downsampling`` pixels, rounded up. If a sample has
no height and width, its image covers the whole grid, and 1-D codes form a square. Other columns and files are copied to the
output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ..io.files import wrap_errors
from .codebook import Codebook

T = TypeVar("T")


class ShardError(ValueError):
    """The file is damaged or not a shard."""


class SampleError(ValueError):
    """One sample cannot be decoded or written."""


@dataclass
class Sample:
    """One image to decode.

    Args:
        name: its name in the shard.
        codes: ``(h, w)`` int64, or None if they are invalid.
        size: (height, width) of the image in pixels.
        problem: why the codes are invalid.
        payload: what the format writes along with the image, such as other columns.
        payload_bytes: approximate size of the payload.
    """

    name: str
    codes: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    problem: str = ""
    payload: Any = None
    payload_bytes: int = 0


WriteImage = Callable[[Sample, bytes], None]  # takes the sample and its image as PNG


class Shard(ABC):
    """A file of codes, and the output that its images are written to. Each format is a subclass.

    Args:
        source: the file of codes.
        target: the output: a file or, for a format that writes one file per image, a folder.
    """

    suffix: ClassVar[str]  # of source

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target

    @classmethod
    def target_of(cls, relative: Path) -> Path:
        """Return the target, relative to the output folder, of a source at this path relative to the input folder."""
        return relative

    @property
    def rejects_path(self) -> Path:
        """The file that lists the samples without an image, one per line."""
        return self.target.with_name(f"{self.target.name}.rejects.jsonl")

    def count_rejects(self) -> int:
        """Return the number of samples that the file of rejects lists."""
        return len(self.rejects_path.read_text().splitlines()) if self.rejects_path.exists() else 0

    def count_samples(self) -> int | None:
        """Return the number of samples, or None if the source is damaged or would have to be read to its end."""
        return None

    def is_done(self) -> bool:
        """Return True if the target is complete. A format that can hold part of its images always returns False."""
        return self.target.is_file()

    def count_images(self) -> int:
        """Return the number of images in the target. Called only if `is_done`."""
        raise AssertionError(f"{type(self).__name__}.is_done() is always False")

    def image_path(self, sample: Sample) -> Path:
        """Return the file that the sample's image is written to."""
        return self.target

    def has_image(self, sample: Sample) -> bool:
        """Return True if an earlier run wrote the sample's image."""
        return False

    @abstractmethod
    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        """Yield all samples in the source's order. Samples with invalid codes are included.

        Raises ValueError if the source is damaged, not a shard or made with another codebook, and OSError if it is unreadable.
        """

    @abstractmethod
    def open_writer(self) -> AbstractContextManager[WriteImage]:
        """Return a context manager that yields a function to write images with.

        Files are written atomically. A target file appears when the context exits, and only if it exits without an exception.
        """


def reraise_as_shard_error(items: Iterable[T], path: Path) -> Iterator[T]:
    """Yield items that a library reads from path; raise ShardError for any exception of the library."""
    iterator = iter(items)
    while True:
        with wrap_errors(ShardError, f"{path} is damaged"):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
