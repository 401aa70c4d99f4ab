"""WebDataset shards: tar files in which adjacent files with a common key form a sample."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np

from ..io.codes import name_problem
from ..io.files import MAX_SHOWN_CHARACTERS, atomic_write, parse_json, printable, require_file, wrap_errors
from .codebook import CODEBOOK_KEY, Codebook
from .shards import Sample, Shard, ShardError, WriteImage, reraise_as_shard_error

MAX_SAMPLE_BYTES = 256 << 20
TAR_END_BYTES = 1024  # a tar file ends with at least this many zeros


class WebDatasetShard(Shard):
    """A tar file of samples with codes, decoded to a tar file of samples with images."""

    suffix = ".tar"

    def count_images(self) -> int:
        with tarfile.open(self.target) as tar:
            return sum(member.name.endswith(".png") for member in tar)

    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        require_file(self.source)
        with wrap_errors(ShardError, f"{self.source} is damaged or not an uncompressed tar file"):
            tar = tarfile.open(self.source, "r:")
        with tar:
            self._require_complete(tar)
            seen: set[str] = set()
            for key, members in groupby(reraise_as_shard_error(_read_files(tar), self.source), key=lambda member: member[0]):
                files = [(extension, contents) for _, extension, contents in members]
                sample = Sample(key, payload=dict(files), payload_bytes=sum(len(contents) for _, contents in files))
                try:
                    if key in seen:
                        raise ValueError("repeated sample name: the files of a sample must be adjacent")
                    if len(sample.payload) < len(files):
                        found = printable(str([extension for extension, _ in files]), MAX_SHOWN_CHARACTERS)
                        raise ValueError(f"the sample has two files of one type: {found}")
                    _parse(sample, codebook)
                except ValueError as error:
                    sample.problem = str(error)
                seen.add(key)
                yield sample

    @contextmanager
    def open_writer(self) -> Iterator[WriteImage]:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.target) as partial, tarfile.open(partial, "w") as tar:

            def write(sample: Sample, png: bytes) -> None:
                for extension, contents in {**sample.payload, "png": png}.items():
                    member = tarfile.TarInfo(f"{sample.name}.{extension}")
                    member.size = len(contents)
                    tar.addfile(member, io.BytesIO(contents))

            yield write

    def _require_complete(self, tar: tarfile.TarFile) -> None:
        """Raise ShardError unless only zeros, at least TAR_END_BYTES, follow the last member.

        tarfile takes any header that it cannot read for the end of the file.
        """
        with wrap_errors(ShardError, f"{self.source} is damaged"):
            offset = -1
            for member in tar:
                if member.offset <= offset:  # caused by a negative size, which loops forever in some versions of tarfile
                    raise ShardError(f"{self.source} is damaged: a member has a negative size")
                offset = member.offset
            size = zeros = 0
            with open(self.source, "rb") as file:
                file.seek(tar.offset)
                while block := file.read(1 << 20):
                    size, zeros = size + len(block), zeros + block.count(0)
        if size < TAR_END_BYTES or zeros < size:
            raise ShardError(f"{self.source} is damaged: no end-of-archive marker after {len(tar.getmembers())} members")


def _read_files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | str]]:
    """Yield (key, extension, contents) of every file, split as WebDataset does. Contents of type str say why there are none."""
    last_key, sample_bytes = "", 0
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if member.isdir() or not stem or not dot or (name.startswith("__") and name.endswith("__")):
            continue
        key = folder + slash + stem
        last_key, sample_bytes = key, member.size + (sample_bytes if key == last_key else 0)
        contents: bytes | str
        if not member.isfile():
            contents = f"{extension} must be a regular file, got a link or device"
        elif sample_bytes > MAX_SAMPLE_BYTES:
            contents = f"expected at most {MAX_SAMPLE_BYTES} bytes per sample, got more"
        else:
            file = tar.extractfile(member)
            assert file is not None  # the member is a regular file
            contents = file.read()
        yield key, extension, contents


def _parse(sample: Sample, codebook: Codebook) -> None:
    """Fill in the sample's codes and size, and remove the codes from its payload. Raises ValueError for a bad sample."""
    if (problem := name_problem(sample.name)) is not None:
        raise ValueError(problem)
    if problems := [contents for contents in sample.payload.values() if isinstance(contents, str)]:
        raise ValueError(problems[0])
    if "npy" not in sample.payload or "png" in sample.payload:
        found = printable(str(sorted(sample.payload)), MAX_SHOWN_CHARACTERS)
        raise ValueError(f"a sample must have a .npy and no .png, got {found}")
    with wrap_errors(ShardError, "the .npy cannot be read"):
        codes = np.load(io.BytesIO(sample.payload.pop("npy")), allow_pickle=False)
    size: tuple[Any, Any] = (None, None)
    if "json" in sample.payload:
        with wrap_errors(ShardError, "the .json cannot be read"):
            metadata = parse_json(sample.payload["json"].decode())
        if isinstance(metadata, dict):
            if CODEBOOK_KEY in metadata:
                codebook.check_fingerprint(metadata[CODEBOOK_KEY], sample.name)
            size = metadata.get("height"), metadata.get("width")
    sample.codes, sample.size = codebook.to_grid(codes, size)
