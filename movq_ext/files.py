"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write to, beside path, which takes path's place at once when the block ends without an error."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())  # else a crash of the machine could leave the name without its contents
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # some writers make files that only their owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
