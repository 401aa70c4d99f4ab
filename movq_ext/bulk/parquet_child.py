"""Read a Parquet file under a memory limit and write its record batches to stdout. `parquet_reader` runs this as a script."""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import IO, Any

ROW_BYTES = 64  # that a row takes at least once it is a sample; a column of nulls takes no memory here


def main(path: str, batch_rows: int, max_bytes: int) -> None:
    """Write the file's schema and batches as an Arrow stream. Raises MemoryError if they take more than max_bytes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the parent, which still writes finished images
        signal.signal(number, signal.SIG_IGN)
    output = LimitedOutput(os.fdopen(os.dup(1), "wb"), max_bytes)
    os.dup2(2, 1)  # what libraries print must not get into the stream

    import pyarrow as pa
    import pyarrow.parquet as pq

    limit_memory(max_bytes)
    with (
        open(path, "rb") as source,  # pyarrow opens no path that is not UTF-8
        pq.ParquetFile(source, pre_buffer=False) as file,
        output.file,
        pa.ipc.new_stream(output, file.schema_arrow) as stream,
    ):
        if claimed_bytes(file.metadata) > max_bytes:  # before the first image is decoded rather than amid the last
            raise MemoryError
        for batch in file.iter_batches(batch_rows, use_threads=False):
            output.count(ROW_BYTES * batch.num_rows)
            stream.write_batch(batch)


class LimitedOutput(io.RawIOBase):
    """A file that takes at most max_bytes; more raises MemoryError.

    `RecordBatch.nbytes` would count a dictionary once per batch. The stream has it once.
    """

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self.file, self._bytes_left = file, max_bytes

    def writable(self) -> bool:
        return True

    def count(self, size: int) -> None:
        """Subtract size from the bytes left. Raises MemoryError if there are fewer."""
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise MemoryError

    def write(self, data: Any) -> int:
        self.count(len(data))
        return self.file.write(data)


def claimed_bytes(metadata: Any) -> int:
    """Return how many bytes the rows take at least, if the footer is right."""
    contents: int = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return max(contents, ROW_BYTES * int(metadata.num_rows))


def limit_memory(more_bytes: int) -> None:
    """Make allocations fail once this process has allocated so many more bytes. Only Linux can."""
    if sys.platform != "linux":
        return
    limit, hard = allocated_bytes() + more_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def allocated_bytes() -> int:
    """Return how many bytes count against RLIMIT_DATA, or the peak resident size where the system does not say."""
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    except MemoryError:
        sys.exit(f"expected at most {sys.argv[3]} bytes after decompression, got more")
    except BrokenPipeError:  # the parent needs no more
        sys.exit(1)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
