"""Read a Parquet file under a memory limit and write its record batches to stdout. `parquet_reader` runs this as a script."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq

ROW_BYTES = 64  # that a row takes at least once it is a sample; a column of nulls takes no memory here


def main(path: str, batch_rows: int, max_bytes: int) -> None:
    """Write the file's schema and batches as an Arrow stream. Raises MemoryError if they take more than max_bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which still writes finished images
    limit_memory(max_bytes)
    total = 0
    with (
        open(path, "rb") as source,  # pyarrow opens no path that is not UTF-8
        pq.ParquetFile(source, pre_buffer=False) as file,
        pa.ipc.new_stream(sys.stdout.buffer, file.schema_arrow) as stream,
    ):
        if claimed_bytes(file.metadata) > max_bytes:  # before the first image is decoded rather than amid the last
            raise MemoryError
        for batch in file.iter_batches(batch_rows, use_threads=False):
            total += batch.nbytes + ROW_BYTES * batch.num_rows
            if total > max_bytes:
                raise MemoryError
            stream.write_batch(batch)


def claimed_bytes(metadata: pq.FileMetaData) -> int:
    """Return how many bytes the rows take at least, if the footer is right."""
    contents: int = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return max(contents, ROW_BYTES * int(metadata.num_rows))


def limit_memory(more_bytes: int) -> None:
    """Make allocations fail once this process has allocated so many more bytes. Only Linux can."""
    with suppress(OSError, ImportError, ValueError):
        import resource

        with open("/proc/self/status") as status:
            allocated = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (allocated + more_bytes, resource.RLIM_INFINITY))


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    except MemoryError:
        sys.exit(f"expected at most {sys.argv[3]} bytes after decompression, got more")
    except BrokenPipeError:  # the parent needs no more
        sys.exit(1)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
