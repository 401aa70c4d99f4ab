"""Shards with one output file, and the append-only log of finished images from which an interrupted run resumes."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import zlib
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from ..io.files import create_partial_file, find_partial_files, name_in_errors
from .shards import Sample, Shard

LABEL = "images"  # in the names of logs: .x.parquet.<random>.images.partial
RECORD = struct.Struct("<32sQI")  # key, size and CRC-32 of the PNG that follows


class SingleFileShard(Shard):
    """A shard whose images are written to one file. The file appears when it is complete; until then, images are in a log."""

    def is_done(self) -> bool:
        return self.target.is_file()

    def open_images(self, weights_digest: bytes) -> ImageLog:
        return ImageLog(self.target, weights_digest)


class ImageLog:
    """The finished images of a shard whose output is one file. Threads may share it.

    Every run appends to a log of its own, so runs need no lock, and reads the logs of earlier ones. An image is found by its
    codes, its size and the model's weights: after a change of the source or the model, old images are ignored.

    Args:
        target: the output file; logs are hidden files beside it.
        weights_digest: identifies the model.
    """

    def __init__(self, target: Path, weights_digest: bytes) -> None:
        self._target, self._weights_digest = target, weights_digest
        self._images: dict[bytes, tuple[int, int, int]] = {}  # (file descriptor, offset, size) by key
        self._own_log: int | None = None  # created with the first image
        self._own_size = 0
        self._lock = threading.Lock()
        self._files = ExitStack()

    def __enter__(self) -> ImageLog:
        for path in find_partial_files([self._target]):
            if path.name.endswith(f".{LABEL}.partial"):
                with suppress(FileNotFoundError):  # another run has just finished the shard
                    self._read_log(path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._files.close()

    def __contains__(self, sample: Sample) -> bool:
        return sample.codes is not None and self._key(sample) in self._images

    def add(self, sample: Sample, png: bytes) -> None:
        """Append a sample's image. Raises OSError if the disk is full; the log stays readable."""
        key = self._key(sample)
        with self._lock:
            if self._own_log is None:
                self._own_log = self._create_log()
            try:
                with name_in_errors(self._target):
                    for data in (RECORD.pack(key, len(png), zlib.crc32(png)), png):
                        _write_all(self._own_log, data)
            except OSError:
                os.ftruncate(self._own_log, self._own_size)
                raise
            self._images[key] = (self._own_log, self._own_size + RECORD.size, len(png))
            self._own_size += RECORD.size + len(png)

    def read(self, sample: Sample) -> bytes:
        """Return a sample's image."""
        log, offset, size = self._images[self._key(sample)]
        return os.pread(log, size, offset)

    def _key(self, sample: Sample) -> bytes:
        assert sample.codes is not None
        header = f"{self._weights_digest.hex()} {tuple(sample.codes.shape)} {sample.size}".encode()
        return hashlib.sha256(header + sample.codes.numpy().tobytes()).digest()

    def _create_log(self) -> int:
        """Create a log, locked until it is closed: another run that finishes the shard does not remove it."""
        self._target.parent.mkdir(parents=True, exist_ok=True)
        _, log = create_partial_file(self._target, LABEL)
        self._files.callback(os.close, log)
        return log

    def _read_log(self, path: Path) -> None:
        """Add an earlier run's images, up to the first incomplete one: the run may have been killed while it wrote."""
        log = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._files.callback(os.close, log)
        offset, end = 0, os.fstat(log).st_size
        while offset + RECORD.size <= end:
            key, size, checksum = RECORD.unpack(os.pread(log, RECORD.size, offset))
            offset += RECORD.size
            if size > end - offset or zlib.crc32(os.pread(log, size, offset)) != checksum:
                break
            self._images[key] = (log, offset, size)
            offset += size


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
