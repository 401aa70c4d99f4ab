"""Read untrusted Parquet files.

A Parquet file of one kilobyte can make its reader allocate gigabytes: by a run of equal values, a compressed page or a header
that lies. pyarrow has no limit for any of them. So a child process reads the file under a memory limit, and passes batches of
rows on through a pipe. If the file crashes pyarrow, it only ends the child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from ..io.files import MAX_REASON_CHARACTERS, max_expanded_bytes, printable, require_file, wrap_errors
from .shards import ShardError

CHILD = Path(__file__).with_name("parquet_child.py")
# Arrow's own allocator reserves memory in advance, and glibc does for every thread: both would count against the limit.
CHILD_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
CRASHES = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}  # other signals come from outside
BATCH_ROWS = 256
MAX_COUNTED_FOOTER_BYTES = 128 << 10  # a footer can take several hundred times its size


class ParquetRows(NamedTuple):
    """The rows of a Parquet file: an Arrow schema and an iterator of record batches."""

    schema: Any
    batches: Iterator[Any]


@contextmanager
def open_parquet(path: Path) -> Iterator[ParquetRows]:
    """Yield the rows of a file.

    Reading takes at most `max_expanded_bytes` of the file's size, and so do all batches together. (On other systems than Linux,
    only the latter holds.)

    Raises:
        OSError: the file cannot be read.
        ShardError: the file is damaged or too large after decompression, or the child cannot run or was killed. The batches
            raise it too.
    """
    pa, _ = import_pyarrow()
    require_file(path)
    limit = max_expanded_bytes(path.stat().st_size)
    if not sys.executable:
        raise ShardError(f"reading Parquet needs a Python executable, got sys.executable = {sys.executable!r}")
    command = [sys.executable, "-S", "-P", str(CHILD), str(path), str(BATCH_ROWS), str(limit)]
    # -S skips .pth files and sitecustomize, which may print; our path already has the folders that they add.
    env = {**os.environ, **CHILD_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(str(folder) for folder in sys.path if folder)}
    with (
        TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=env) as child,
    ):
        try:
            with _explain_failure(path, child, errors):
                stream = pa.ipc.open_stream(child.stdout)
            yield ParquetRows(stream.schema, _batches(stream, path, child, errors))
        finally:
            child.kill()


def count_rows(path: Path) -> int | None:
    """Return the number of rows that a file's footer claims, or None if the footer is unusually long."""
    _, pq = import_pyarrow()
    require_file(path)
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        footer_bytes = int.from_bytes(file.read(4), "little")
        if footer_bytes > MAX_COUNTED_FOOTER_BYTES:
            return None
        with wrap_errors(ShardError, f"{path} is damaged or not a Parquet file"):
            return int(pq.read_metadata(file).num_rows)


def _batches(stream: Any, path: Path, child: subprocess.Popen[bytes], errors: IO[bytes]) -> Iterator[Any]:
    while True:
        with _explain_failure(path, child, errors):
            try:
                batch = stream.read_next_batch()
            except StopIteration:
                if child.wait():
                    raise EOFError from None
                return
        yield batch


@contextmanager
def _explain_failure(path: Path, child: subprocess.Popen[bytes], errors: IO[bytes]) -> Iterator[None]:
    """Turn an error in reading from the child into a ShardError with the reason that the child has given."""
    try:
        yield
    except Exception as error:
        child.stdout.close()  # type: ignore[union-attr]
        status = child.wait()
        errors.seek(0)
        last_line = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        if status < 0 and -status not in CRASHES:
            out_of_memory = "; out of memory?" if -status == signal.SIGKILL else ""
            reason = f": the process that read it was killed (signal {-status}){out_of_memory}"
        elif status < 0:
            reason = f" is damaged: reading it crashed pyarrow (signal {-status})"
        elif last_line.startswith("expected at most"):
            reason = f": {last_line}"
        else:
            reason = f" is damaged or not a Parquet file: {printable(last_line or str(error), MAX_REASON_CHARACTERS)}"
        raise ShardError(f"{path}{reason}") from error


def import_pyarrow() -> tuple[Any, Any]:
    """Import (pyarrow, pyarrow.parquet)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ShardError("Parquet files need pyarrow: pip install 'movq_ext[parquet]'") from error
    return pyarrow, pyarrow.parquet
