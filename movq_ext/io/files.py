"""Atomic writes and safe reads of untrusted files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

MAX_JSON_CHARACTERS = 1 << 20  # of a config; published ones have about a thousand
MAX_REASON_CHARACTERS = 300  # of another library's message, in an error
MAX_SHOWN_CHARACTERS = 200  # of a value from a file, in an error
MAX_EXPANSION = 100  # of compressed files: integers and text shrink less, but DEFLATE can expand 1032-fold
MIN_EXPANDED_BYTES = 64 << 20  # allowed whatever the compressed size
MAX_NAME_BYTES = 200  # file systems allow 255, and a partial file's name is up to 50 longer than the final one
PARTIAL_NAME = re.compile(r"\.(.+)\.[0-9a-f]{16}\.[a-z]+\.partial", re.DOTALL)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside path; rename it to path if the block succeeds, delete it otherwise.

    Readers see the old file or the complete new one, also after a crash of the machine. A new file gets the permissions of the
    umask, an overwritten one keeps its own. A symbolic link is kept: the file that it points to is written.

    Raises OSError if path is a pipe or a device.
    """
    path = follow_link(Path(path))
    old_mode = path.stat().st_mode if path.exists() else None
    if old_mode is not None and not (stat.S_ISREG(old_mode) or stat.S_ISDIR(old_mode)):  # os.replace refuses a folder
        raise OSError(f"expected a regular file to overwrite, got a pipe or device: {path}")
    # Nobody may open the new contents of a private file, not even before they are written.
    partial, descriptor = create_partial_file(path, "output", 0o666 if old_mode is None else 0o600)
    try:
        mode = stat.S_IMODE(partial.stat().st_mode if old_mode is None else old_mode)  # reading the umask would change it
        partial.chmod(mode | stat.S_IRUSR | stat.S_IWUSR)
        with name_in_errors(path):
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())  # contents before the name: a crash must not leave an empty file under it
        partial.chmod(mode)  # some libraries create files readable by their owner only
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def name_in_errors(path: str | Path) -> Iterator[None]:
    """Add path to an OSError of the block that names no file. Errors of write() and fsync() name none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def create_partial_file(path: Path, label: str, mode: int = 0o666) -> tuple[Path, int]:
    """Create a hidden file beside path, ``.NAME.<random>.LABEL.partial``. Return it, and a descriptor open for appending.

    The umask applies to mode. The file is locked while the descriptor is open: `remove_partial_files` leaves it alone.
    """
    path = follow_link(path)
    while True:
        partial = path.with_name(f".{_partial_stem(path.name)}.{secrets.token_hex(8)}.{label}.partial")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, mode)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if partial.exists():
                return partial, descriptor
        except BaseException:
            partial.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)  # remove_partial_files was faster than the lock


def require_writable(folder: Path) -> None:
    """Raise OSError if files cannot be created in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}") from error


def find_partial_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the partial files beside these paths."""
    stems: dict[Path, set[str]] = {}
    for path in map(follow_link, paths):
        stems.setdefault(path.parent, set()).add(_partial_stem(path.name))
    for folder, known in stems.items():
        for partial in folder.glob(".*.partial"):
            if (match := PARTIAL_NAME.fullmatch(partial.name)) and match[1] in known:
                yield partial


def remove_partial_files(paths: Iterable[Path]) -> None:
    """Delete the partial files that dead processes left beside these paths: those that no process has locked.

    On a file system without locks, such as some network file systems, every partial file counts as dead: there, two processes
    must not write to the same paths at once.
    """
    for partial in find_partial_files(paths):
        with suppress(OSError):  # another process was faster, or another user's file, or no file at all
            descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if not _is_locked(descriptor):
                    partial.unlink()
            finally:
                os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Lock a file. Return True if another descriptor has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there are no locks
        return False
    return False


def follow_link(path: Path) -> Path:
    """Return the file that a symbolic link points to, or path itself if it is not a link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path  # Path.is_symlink raises for a name that is too long


def _partial_stem(name: str) -> str:
    """Return name, or its hash if it is longer than MAX_NAME_BYTES."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= MAX_NAME_BYTES else hashlib.sha256(encoded).hexdigest()


def path_to_text(path: str | PurePath) -> str:
    """Return a path as Unicode text. Bytes that are not UTF-8 stay surrogates.

    Under an ASCII locale, Python reads every byte of a non-ASCII name as a surrogate.
    """
    text = str(path)
    return text if _is_encodable(text, "utf-8") else os.fsencode(text).decode("utf-8", "surrogateescape")


def text_to_path(text: str) -> Path:
    """Return the path of a name in Unicode: the inverse of `path_to_text`.

    Raises ValueError for text that UTF-8 cannot encode.
    """
    fits = _is_encodable(text, sys.getfilesystemencoding())
    return Path(text if fits else os.fsdecode(text.encode("utf-8", "surrogateescape")))


def _is_encodable(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def require_file(path: str | Path) -> None:
    """Raise FileNotFoundError if path does not exist, and OSError if it is unreadable or not a regular file."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():
        raise OSError(f"expected a regular file, got a folder, pipe or device: {path}")
    with open(path, "rb"):
        pass


def content_hash(path: str | Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a file's bytes. Raises like require_file."""
    require_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def max_expanded_bytes(compressed_bytes: int) -> int:
    """Return how many bytes a compressed file of this size may expand to."""
    return max(MIN_EXPANDED_BYTES, MAX_EXPANSION * compressed_bytes)


@contextmanager
def wrap_errors(error_class: type[Exception], message: str) -> Iterator[None]:
    """Turn every exception of the block into an ``error_class`` with ``message`` and the reason.

    Libraries report a damaged file in many ways: RecursionError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile...
    """
    try:
        yield
    except error_class:
        raise
    except Exception as error:
        raise error_class(f"{message}: {printable(f'{type(error).__name__}: {error}', MAX_REASON_CHARACTERS)}") from error


def read_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises like parse_json, and OSError."""
    with open(path, encoding="utf-8") as file:
        return parse_json(file.read(MAX_JSON_CHARACTERS + 1))


def parse_json(text: str, max_characters: int = MAX_JSON_CHARACTERS) -> Any:
    """Parse untrusted JSON.

    Raises ValueError for invalid JSON, more than ``max_characters`` or a repeated key, and RecursionError for deep nesting.
    """
    if len(text) > max_characters:  # a character can become an object of more than 50 bytes
        raise ValueError(f"expected at most {max_characters} characters of JSON, got more")
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a JSON object has a repeated key")
    return result


def printable(text: str, max_characters: int | None = None) -> str:
    """Escape characters that control a terminal or cannot be encoded, and cut text after ``max_characters``."""
    cut = text if max_characters is None or len(text) <= max_characters else f"{text[:max_characters]}..."
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in cut)
