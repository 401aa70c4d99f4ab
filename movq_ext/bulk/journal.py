"""The journal of encode: the images that no finished file holds yet."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path

import numpy as np
from torch import Tensor

from ..io.codes import CodeFile
from ..io.files import name_in_errors, wrap_errors
from .codebook import Codebook

logger = logging.getLogger(__name__)


class Journal:
    """A file with a line of JSON per image, locked by this process. Opening it waits until no other process holds the lock.

    Args:
        path: the file; created if missing.
        out: the output that is locked; shown in messages.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self.path = path
        self._file = _open_locked(path, out)

    def recover(self, codebook: Codebook) -> CodeFile:
        """Return the images that a killed process left. Skips damaged lines, and deletes an incomplete last line.

        Raises ValueError if they were encoded with another codebook.
        """
        recovered, end, damaged = CodeFile(codebook.fingerprint), 0, 0
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                logger.warning("%s: deleted an incomplete last line; its image is encoded again", self.path)
                break
            end += len(line)
            try:
                with wrap_errors(ValueError, "damaged"):
                    entry = json.loads(line)
                    fingerprint = entry["codebook"]
            except ValueError:
                damaged += 1
                continue
            codebook.check_fingerprint(fingerprint, self.path)  # before to_grid, which fails on codes of another model
            try:
                with wrap_errors(ValueError, "damaged"):
                    codes, size = codebook.to_grid(np.array(entry["codes"]), tuple(entry["size"]))
                    recovered.add(entry["name"], codes, size, entry["source_hash"])
            except ValueError:
                damaged += 1
        if damaged:
            logger.warning("%s: skipped damaged lines: %d; their images are encoded again", self.path, damaged)
        with name_in_errors(self.path):
            self._file.truncate(end)
        return recovered

    def append(self, codebook: str, name: str, codes: Tensor, size: tuple[int, int], source_hash: str) -> None:
        """Append an image. It survives the death of this process from then on, but perhaps not a crash of the machine.

        Raises OSError if the disk is full.
        """
        entry = {"codebook": codebook, "name": name, "size": size, "source_hash": source_hash, "codes": codes.tolist()}
        try:
            self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}") from error

    def clear(self) -> None:
        """Delete all images: a finished file holds them."""
        with name_in_errors(self.path):
            self._file.truncate(0)

    def delete(self) -> None:
        """Delete the file and unlock it."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Unlock the file, and leave it to the next process."""
        with suppress(OSError):  # append has reported it
            self._file.close()


def _open_locked(path: Path, out: Path) -> BufferedRandom:
    """Open a file for reading and appending, and lock it."""
    while True:
        file = open(path, "a+b")
        try:
            _lock(file, path, out)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # its last owner deleted it before it unlocked it


def _lock(file: BufferedRandom, path: Path, out: Path) -> None:
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is writing to %s: waiting until it ends", out)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems have no locks
        logger.warning("cannot lock %s (%s): do not let two processes write to %s at once", path, error.strerror, out)
