"""Shards: files that hold the codes of many images.

- ``x.parquet``: rows with a column ``codes`` (a list of integers, or a list of rows) and, optionally, ``name``, ``height`` and
  ``width``. The output is ``x.parquet``: the same rows with a column ``image`` (PNG) instead of ``codes``.
- ``x.tar``, ``x.tar.gz`` or ``x.tgz``, a WebDataset: samples with ``key.npy`` (1-D or 2-D integers) and, optionally, ``key.json``
  with ``height`` and ``width``. The output is ``x.tar``, uncompressed: the same samples with ``key.png`` instead of ``key.npy``.
- ``x.npz``, of NumPy: an array ``codes``, or one array per image. The output is a folder ``x`` with one PNG per image.
- ``x.safetensors``: a file that ``encode`` wrote. The output is a folder ``x`` with one PNG per image.

Height and width are in pixels. The grid has one code per ``downsampling`` x ``downsampling`` pixels, rounded up. If a sample has
no height and width, its image covers the whole grid, and 1-D codes form a square. Parquet and WebDataset outputs keep the other
columns and files.

An ``.npz`` has one of these layouts:

- An array ``codes``, images x rows x columns. Arrays ``height``, ``width`` and ``name`` with one item per image are optional;
  without names, images are numbered from ``00000000``. With one of these arrays, codes may also be images x codes. A file's only
  array is taken for ``codes``.
- An array ``codes`` of one or two dimensions: a single image, ``codes.png``. Numbers ``height`` and ``width`` are optional.
- Several arrays, none of them ``codes``: each is one image's grid, rows x columns, and names it.

If a shard uses other names than ``codes`` and ``npy``, pass ``--column`` or ``--key``. If it already has an image under the
output's name, choose another with ``--image-column`` or ``--image-key``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

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
        problem: why the image cannot be decoded or written; empty if it can.
        payload: what the format writes along with the image, such as other columns.
        payload_bytes: approximate size of the payload.
    """

    name: str
    codes: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    problem: str = ""
    payload: Any = None
    payload_bytes: int = 0


CopyImage = Callable[[Sample], None]  # copies a sample's image to the output file


@dataclass(frozen=True)
class FieldNames:
    """Names of the codes in the shards and of the images in the output.

    Args:
        column: the codes in Parquet and ``.npz`` files: a column or an array.
        key: the codes in a WebDataset: the suffix of a file, without a leading dot.
        image_column: the images in a Parquet output.
        image_key: the images in a WebDataset output: a suffix that ends in ``png``.

    Raises:
        ValueError: a name is empty or not a suffix.
    """

    column: str = "codes"
    key: str = "npy"
    image_column: str = "image"
    image_key: str = "png"

    def __post_init__(self) -> None:
        for name in ("key", "image_key"):
            suffix = getattr(self, name)
            if not suffix or suffix[0] == "." or "/" in suffix:
                raise ValueError(f"{name}: expected a file's suffix without its leading dot, got {suffix!r}")
        if self.image_key.rpartition(".")[2] != "png":
            raise ValueError(f"image_key: expected a suffix that ends in png, got {self.image_key!r}")
        for name in ("column", "image_column"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a name, got ''")


class FinishedImages(Protocol):
    """The images of a shard that this or an earlier run has decoded."""

    def __contains__(self, sample: Sample) -> bool:
        """Return True if the sample's image is finished."""

    def add(self, sample: Sample, png: bytes) -> None:
        """Write a sample's image. Safe to call from several threads.

        Raises SampleError if this image cannot be written, and OSError if none can.
        """

    def read(self, sample: Sample) -> bytes:
        """Return a finished image."""


class Shard(ABC):
    """A file of codes, and the output that its images are written to. Each format is a subclass.

    Args:
        source: the file of codes.
        target: the output: a file or, for a format that writes one file per image, a folder.
        names: names of the codes in the source and of the images in the target.
    """

    suffixes: ClassVar[tuple[str, ...]]  # of source, in lower case

    def __init__(self, source: Path, target: Path, names: FieldNames | None = None) -> None:
        self.source, self.target, self.names = source, target, names or FieldNames()

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
        if not self.rejects_path.exists():
            return 0
        with open(self.rejects_path, encoding="utf-8") as file:
            return sum(1 for _ in file)

    def count_samples(self) -> int | None:
        """Return the number of samples, or None if the source is damaged or would have to be read to its end."""
        return None

    @abstractmethod
    def is_done(self) -> bool:
        """Return True if the target is complete. A format that can hold part of its images always returns False."""

    def count_images(self) -> int:
        """Return the number of images in the target. Called only if `is_done`."""
        raise AssertionError(f"{type(self).__name__}.is_done() is always False")

    def image_path(self, sample: Sample) -> Path:
        """Return the file that the sample's image is written to."""
        return self.target

    @abstractmethod
    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        """Yield all samples in the source's order. Samples with invalid codes are included.

        Raises ValueError if the source is damaged, not a shard or made with another codebook, and OSError if it is unreadable.
        """

    @abstractmethod
    def open_images(self, weights_digest: bytes) -> AbstractContextManager[FinishedImages]:
        """Return a context manager that yields the shard's finished images. The digest identifies the model."""

    @abstractmethod
    def open_writer(self, images: FinishedImages) -> AbstractContextManager[CopyImage]:
        """Return a context manager that yields a function to copy finished images to the target file, in the source's order.

        The target file appears when the context exits, and only if it exits without an exception.
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
