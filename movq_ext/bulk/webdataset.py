"""WebDataset shards: tar files in which adjacent files with a common key form a sample."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from ..io.codes import name_problem
from ..io.files import (
    MAX_SHOWN_CHARACTERS,
    atomic_write,
    max_expanded_bytes,
    parse_json,
    printable,
    require_file,
    wrap_errors,
)
from .codebook import CODEBOOK_KEY, Codebook
from .image_log import SingleFileShard
from .shards import CopyImage, FieldNames, FinishedImages, Sample, ShardError, reraise_as_shard_error

MAX_SAMPLE_BYTES = 256 << 20
TAR_END_BYTES = 1024  # a tar file ends with at least this many zeros
GZIP_SUFFIXES = (".tar.gz", ".tgz")


class WebDatasetShard(SingleFileShard):
    """A tar file of samples with codes, decoded to an uncompressed tar file of samples with images."""

    suffixes = (".tar", *GZIP_SUFFIXES)

    @classmethod
    def target_of(cls, relative: Path) -> Path:
        suffix = next(suffix for suffix in cls.suffixes if relative.name.lower().endswith(suffix))
        return relative.with_name(f"{relative.name[: -len(suffix)]}.tar") if suffix in GZIP_SUFFIXES else relative

    def count_images(self) -> int:
        with tarfile.open(self.target) as tar:
            return sum(member.name.endswith(f".{self.names.image_key}") for member in tar)

    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        require_file(self.source)
        if self._is_gzip():
            self._require_small_expansion()
        with self._open_tar() as (tar, file):
            self._require_complete(tar, file)
        with self._open_tar() as (tar, _):
            seen: set[PurePosixPath] = set()
            for key, members in groupby(reraise_as_shard_error(_read_files(tar), self.source), key=lambda member: member[0]):
                files = [(extension, contents) for _, extension, contents in members]
                sample = Sample(key, payload=dict(files), payload_bytes=sum(len(contents) for _, contents in files))
                try:
                    if PurePosixPath(key) in seen:  # x/a and x/./a too: they are extracted to one file
                        raise ValueError("repeated sample name: the files of a sample must be adjacent")
                    if len(sample.payload) < len(files):
                        found = printable(str([extension for extension, _ in files]), MAX_SHOWN_CHARACTERS)
                        raise ValueError(f"the sample has two files of one type: {found}")
                    _parse(sample, codebook, self.names)
                except ValueError as error:
                    sample.problem = str(error)
                seen.add(PurePosixPath(key))
                yield sample

    @contextmanager
    def open_writer(self, images: FinishedImages) -> Iterator[CopyImage]:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.target) as partial, tarfile.open(partial, "w") as tar:

            def copy_image(sample: Sample) -> None:
                for extension, contents in {**sample.payload, self.names.image_key: images.read(sample)}.items():
                    member = tarfile.TarInfo(f"{sample.name}.{extension}")
                    member.size = len(contents)
                    tar.addfile(member, io.BytesIO(contents))

            yield copy_image

    def _is_gzip(self) -> bool:
        return self.source.name.lower().endswith(GZIP_SUFFIXES)

    @contextmanager
    def _open_tar(self) -> Iterator[tuple[tarfile.TarFile, IO[bytes]]]:
        """Yield the archive, and the file with its uncompressed bytes."""
        file: Any = _BoundedGzip(self.source) if self._is_gzip() else open(self.source, "rb")
        with file:
            kind = "a gzip-compressed" if self._is_gzip() else "an uncompressed"
            with wrap_errors(ShardError, f"{self.source} is damaged or not {kind} tar file"):
                tar = tarfile.open(fileobj=file, mode="r:")
            with tar:
                yield tar, file

    def _require_small_expansion(self) -> None:
        """Raise ShardError if the file is not a complete gzip file, or expands to more bytes than `max_expanded_bytes`."""
        size, limit = 0, max_expanded_bytes(self.source.stat().st_size)
        with wrap_errors(ShardError, f"{self.source} is damaged or not a gzip file"), gzip.open(self.source) as file:
            while block := file.read(1 << 20):
                size += len(block)
                if size > limit:
                    raise ShardError(f"{self.source}: expected at most {limit} bytes after decompression, got more")

    def _require_complete(self, tar: tarfile.TarFile, file: IO[bytes]) -> None:
        """Raise ShardError unless only zeros, at least TAR_END_BYTES, follow the last member.

        tarfile takes any header that it cannot read for the end of the file.
        """
        with wrap_errors(ShardError, f"{self.source} is damaged"):
            offset, count = -1, 0
            for member in _members(tar):
                if member.offset <= offset:  # caused by a negative size, which loops forever in some versions of tarfile
                    raise ShardError(f"{self.source} is damaged: a member has a negative size")
                offset, count = member.offset, count + 1
            size = zeros = 0
            file.seek(tar.offset)
            while block := file.read(1 << 20):
                size, zeros = size + len(block), zeros + block.count(0)
        if size < TAR_END_BYTES or zeros < size:
            raise ShardError(f"{self.source} is damaged: no end-of-archive marker after {count} members")


class _BoundedGzip(gzip.GzipFile):
    """A gzip file that refuses to read more than MAX_SAMPLE_BYTES at once: tarfile reads an extended header whole."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_SAMPLE_BYTES:
            raise ShardError(f"expected a header of at most {MAX_SAMPLE_BYTES} bytes, got {size}")
        return super().read(size)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members, without holding those read already."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        yield member


def _read_files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | str]]:
    """Yield (key, extension, contents) of every file, split as WebDataset does.

    If a file was not read, contents is a str with the reason.
    """
    last_key, sample_bytes = "", 0
    for member in _members(tar):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if member.isdir() or not stem or not dot or (name.startswith("__") and name.endswith("__")):
            continue
        key = folder + slash + stem
        last_key, sample_bytes = key, member.size + (sample_bytes if key == last_key else 0)
        contents: bytes | str
        if not member.isfile() or member.issparse():  # the holes of a sparse file expand to any size
            contents = f"{extension} must be a regular file, got a link, device or sparse file"
        elif sample_bytes > MAX_SAMPLE_BYTES:
            contents = f"expected at most {MAX_SAMPLE_BYTES} bytes per sample, got more"
        else:
            file = tar.extractfile(member)
            assert file is not None  # the member is a regular file
            contents = file.read()
        yield key, extension, contents


def _parse(sample: Sample, codebook: Codebook, names: FieldNames) -> None:
    """Fill in the sample's codes and size, and remove the codes from its payload. Raises ValueError for a bad sample."""
    if (problem := name_problem(sample.name)) is not None:
        raise ValueError(problem)
    if problems := [contents for contents in sample.payload.values() if isinstance(contents, str)]:
        raise ValueError(problems[0])
    if names.key not in sample.payload or names.image_key in {*sample.payload} - {names.key}:
        found = printable(str(sorted(sample.payload)), MAX_SHOWN_CHARACTERS)
        expected = f"a sample must have a .{names.key} and no .{names.image_key}"
        raise ValueError(f"{expected}, got {found}: choose other suffixes with --key and --image-key")
    with wrap_errors(ShardError, f"the .{names.key} cannot be read"):
        codes = np.load(io.BytesIO(sample.payload.pop(names.key)), allow_pickle=False)
    size: tuple[Any, Any] = (None, None)
    if "json" in sample.payload:
        with wrap_errors(ShardError, "the .json cannot be read"):
            metadata = parse_json(sample.payload["json"].decode())
        if isinstance(metadata, dict):
            if CODEBOOK_KEY in metadata:
                codebook.check_fingerprint(metadata[CODEBOOK_KEY], sample.name)
            size = metadata.get("height"), metadata.get("width")
    sample.codes, sample.size = codebook.to_grid(codes, size)
