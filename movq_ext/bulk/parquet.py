"""Parquet shards: one row per image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..io.files import MAX_SHOWN_CHARACTERS, atomic_write, printable, require_file, wrap_errors
from .codebook import CODEBOOK_KEY, Codebook
from .image_log import SingleFileShard
from .shards import CopyImage, FinishedImages, Sample, ShardError, reraise_as_shard_error

KNOWN_COLUMNS = ("name", "height", "width")  # the columns, besides the codes, that are interpreted
BATCH_ROWS = 256  # rows per read, and at most per row group written
ROW_GROUP_BYTES = 32 << 20  # a row group is written once its images reach this size


class ParquetShard(SingleFileShard):
    """A Parquet file of rows with codes, decoded to a Parquet file of rows with images."""

    suffixes = (".parquet",)

    def count_samples(self) -> int | None:
        try:
            with self._open() as file:
                return int(file.metadata.num_rows)
        except (OSError, ValueError):  # samples() reports it
            return None

    def count_images(self) -> int:
        return int(import_pyarrow()[1].read_metadata(self.target).num_rows)

    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        with self._open() as file:
            fingerprint = (file.schema_arrow.metadata or {}).get(CODEBOOK_KEY.encode())
            if fingerprint is not None:
                codebook.check_fingerprint(fingerprint.decode(errors="replace"), self.source)
            index = 0
            for batch in reraise_as_shard_error(file.iter_batches(BATCH_ROWS), self.source):
                codes = batch[self.names.column]
                others = batch.drop_columns([self.names.column])
                columns = {name: others[name] for name in KNOWN_COLUMNS if name in others.schema.names}
                row_bytes = others.nbytes // max(1, batch.num_rows)
                for row in range(batch.num_rows):
                    sample = Sample(f"row {index}", payload=others.slice(row, 1), payload_bytes=row_bytes)
                    _parse_row(codes, columns, row, sample, codebook)
                    yield sample
                    index += 1

    @contextmanager
    def open_writer(self, images: FinishedImages) -> Iterator[CopyImage]:
        pa, pq = import_pyarrow()
        with self._open() as file:
            schema = file.schema_arrow
        schema = schema.remove(schema.get_field_index(self.names.column))
        image_field = pa.field(self.names.image_column, pa.binary())
        others: list[Any] = []  # the other columns of the buffered images
        pngs: list[bytes] = []

        def flush() -> None:
            table = pa.Table.from_batches(others, schema)
            writer.write_table(table.append_column(image_field, pa.array(pngs, pa.binary())))
            others.clear()
            pngs.clear()

        def copy_image(sample: Sample) -> None:
            others.append(sample.payload)
            pngs.append(images.read(sample))
            if len(pngs) >= BATCH_ROWS or sum(map(len, pngs)) >= ROW_GROUP_BYTES:
                flush()

        self.target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.target) as partial, pq.ParquetWriter(partial, schema.append(image_field)) as writer:
            yield copy_image
            if pngs:
                flush()

    @contextmanager
    def _open(self) -> Iterator[Any]:
        _, pq = import_pyarrow()
        require_file(self.source)
        with wrap_errors(ShardError, f"{self.source} is damaged or not a Parquet file"):
            file = pq.ParquetFile(self.source)
        with file:
            columns = file.schema_arrow.names
            codes, image = self.names.column, self.names.image_column
            if codes not in columns or image in {*columns} - {codes} or len(set(columns)) != len(columns):
                expected = f"must have a column {codes!r}, no column {image!r} and no repeated column"
                found = printable(str(columns), MAX_SHOWN_CHARACTERS)
                raise ShardError(f"{self.source} {expected}, got {found}: choose other names with --column and --image-column")
            yield file


def _parse_row(codes: Any, columns: dict[str, Any], row: int, sample: Sample, codebook: Codebook) -> None:
    """Fill in the sample's name, codes and size, or its problem."""
    try:
        with wrap_errors(ShardError, "the row cannot be read"):
            values = {name: column[row].as_py() for name, column in columns.items()}
            if values.get("name") is not None:
                sample.name = str(values["name"])
            array = _to_array(codes[row])
        sample.codes, sample.size = codebook.to_grid(array, (values.get("height"), values.get("width")))
    except ValueError as error:
        sample.problem = str(error)


def _to_array(scalar: Any) -> np.ndarray | None:
    """Convert a Parquet list of integers, list of rows or tensor to an array, and null to None."""
    pa, _ = import_pyarrow()
    if not scalar.is_valid:
        return None
    if hasattr(scalar, "to_numpy"):  # an Arrow tensor
        return np.asarray(scalar.to_numpy())
    values = getattr(getattr(scalar, "value", scalar), "values", None)  # extension types, such as Ray's tensor, have .value
    if not isinstance(values, pa.Array):
        raise ShardError(f"codes must be a list of integers, got {printable(str(scalar.type), MAX_SHOWN_CHARACTERS)}")
    nested = hasattr(values.type, "value_type")
    rows = [row.values for row in values] if nested else [values]
    if any(row is None or row.null_count for row in rows):
        raise ShardError("codes must not contain nulls")
    if len({len(row) for row in rows}) > 1:
        raise ShardError("codes must have rows of equal length")
    return np.array([np.asarray(row) for row in rows]) if nested else np.asarray(values)


def import_pyarrow() -> tuple[Any, Any]:
    """Import (pyarrow, pyarrow.parquet)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ShardError("Parquet files need pyarrow: pip install 'movq_ext[parquet]'") from error
    return pyarrow, pyarrow.parquet
