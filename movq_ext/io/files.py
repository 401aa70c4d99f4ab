"""Writing files so that nobody ever sees half of one, and reading files of which nobody knows where they come from."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_JSON = 1 << 20  # bytes of a config: those of published models have a thousand
MOST_REASON = 300  # characters of another library's error
MOST_NAME = 200  # bytes of a name, of the 255 that disks take: a partial file has more in its own


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write to, beside path, which takes path's place at once when the block ends without an error."""
    path = Path(path)
    partial = path.with_name(f".{_short(path.name)}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it, which cannot be asked without changing it for all threads
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())  # else a crash of the machine could leave the name without its contents
        partial.chmod(mode)  # some writers make files that only their owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(paths: Iterable[Path]) -> None:
    """Remove what ``replacing`` left beside these files in processes that were killed. No other process may be writing them."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(_short(path.name))
    for folder, known in names.items():
        for partial in folder.glob(".*.partial"):
            if partial.name[1:].rsplit(".", 3)[0] in known:
                partial.unlink(missing_ok=True)


def _short(name: str) -> str:
    """name, or a fingerprint of one that has more than MOST_NAME bytes."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= MOST_NAME else hashlib.sha256(encoded).hexdigest()


def require_file(path: str | Path) -> None:
    """Raises FileNotFoundError if there is no such file, OSError if it may not be read, or is a folder, pipe or device."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():
        raise OSError(f"{path} is no file but a folder, pipe or device")
    with open(path, "rb"):
        pass


@contextmanager
def refusing(error_class: type[Exception], message: str) -> Iterator[None]:
    """Around what reads a file that may be bad: an ``error_class`` passes, all others become one, ``message: reason``.

    Libraries have many words for a bad file: RecursionError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile...
    """
    try:
        yield
    except error_class:
        raise
    except Exception as error:
        raise error_class(f"{message}: {printable(f'{type(error).__name__}: {error}', MOST_REASON)}") from error


def read_json(path: str | Path) -> Any:
    """What a JSON file of at most MOST_JSON bytes holds. Raises what parse_json does."""
    with open(path, "rb") as file:
        return parse_json(file.read(MOST_JSON + 1).decode())


def parse_json(text: str, most: int = MOST_JSON) -> Any:
    """What ``text`` says.

    Raises ValueError for more than ``most`` characters, a name that comes twice or no JSON, RecursionError for deep nesting.
    """
    if len(text) > most:  # every character may become an object of 50 bytes and more
        raise ValueError(f"more than {most} characters of JSON")
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name comes twice in one JSON object")
    return result


def printable(text: str, most: int | None = None) -> str:
    """text without what could act on a terminal or cannot be encoded, cut to about ``most`` characters."""
    cut = text if most is None or len(text) <= most else f"{text[:most]}..."
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in cut)
