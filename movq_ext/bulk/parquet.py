"""Parquet shards: one row per image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from ..io.files import MAX_SHOWN_CHARACTERS, atomic_write, printable, wrap_errors
from .codebook import CODEBOOK_KEY, Codebook
from .image_log import SingleFileShard
from .parquet_reader import ParquetRows, count_rows, import_pyarrow, open_parquet
from .shards import CopyImage, FinishedImages, Sample, ShardError

KNOWN_COLUMNS = ("name", "height", "width")  # the columns, besides the codes, that are interpreted
ROW_GROUP_ROWS = 256  # at most
ROW_GROUP_BYTES = 32 << 20  # a row group is written once its rows reach this size


class ParquetShard(SingleFileShard):
    """A Parquet file of rows with codes, decoded to a Parquet file of rows with images."""

    suffixes = (".parquet",)

    def count_samples(self) -> int | None:
        try:
            return count_rows(self.source)
        except (OSError, ValueError):  # samples() reports it
            return None

    def count_images(self) -> int:
        _, pq = import_pyarrow()
        with open(self.target, "rb") as file:
            return int(pq.read_metadata(file).num_rows)

    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        with self._open() as (schema, batches):
            fingerprint = (schema.metadata or {}).get(CODEBOOK_KEY.encode())
            if fingerprint is not None:
                codebook.check_fingerprint(fingerprint.decode(errors="replace"), self.source)
            index = 0
            for batch in batches:
                codes = batch[self.names.column]
                others = batch.drop_columns([self.names.column])
                columns = {name: others[name] for name in KNOWN_COLUMNS if name in others.schema.names}
                for row in range(batch.num_rows):
                    payload = others.slice(row, 1)
                    sample = Sample(f"row {index}", payload=payload, payload_bytes=payload.nbytes)
                    _parse_row(codes, columns, row, sample, codebook)
                    yield sample
                    index += 1

    @contextmanager
    def open_writer(self, images: FinishedImages) -> Iterator[CopyImage]:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(self.target) as partial,
            open(partial, "wb") as file,  # pyarrow opens no path that is not UTF-8
            _ImageTable(file, self.names.image_column) as table,
        ):
            yield lambda sample: table.append(sample.payload, images.read(sample))
            if table.writer is None:
                table.open(self._payload_schema())

    def _payload_schema(self) -> Any:
        with self._open() as (schema, _):
            return schema.remove(schema.get_field_index(self.names.column))

    @contextmanager
    def _open(self) -> Iterator[ParquetRows]:
        with open_parquet(self.source) as rows:
            columns = rows.schema.names
            codes, image = self.names.column, self.names.image_column
            if codes not in columns or image in {*columns} - {codes} or len(set(columns)) != len(columns):
                expected = f"must have a column {codes!r}, no column {image!r} and no repeated column"
                found = printable(str(columns), MAX_SHOWN_CHARACTERS)
                raise ShardError(f"{self.source} {expected}, got {found}: choose other names with --column and --image-column")
            yield rows


class _ImageTable:
    """A Parquet file of payloads with an image each. Writes a row group whenever enough rows are in memory."""

    def __init__(self, file: IO[bytes], image_column: str) -> None:
        self.writer: Any = None  # opened with the first row's schema
        self._file, self._image_column = file, image_column
        self._payloads: list[Any] = []
        self._pngs: list[bytes] = []
        self._bytes = 0

    def __enter__(self) -> _ImageTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.writer is not None:
            if self._pngs and kind is None:
                self._write_row_group()
            self.writer.close()

    def open(self, schema: Any) -> None:
        """Create the file, with these columns besides the images."""
        pa, pq = import_pyarrow()
        self.writer = pq.ParquetWriter(self._file, schema.append(pa.field(self._image_column, pa.binary())))

    def append(self, payload: Any, png: bytes) -> None:
        """Append a row."""
        if self.writer is None:
            self.open(payload.schema)
        self._payloads.append(payload)
        self._pngs.append(png)
        self._bytes += len(png) + _row_bytes(payload)
        if len(self._pngs) >= ROW_GROUP_ROWS or self._bytes >= ROW_GROUP_BYTES:
            self._write_row_group()

    def _write_row_group(self) -> None:
        pa, _ = import_pyarrow()
        image_field = pa.field(self._image_column, pa.binary())
        images = pa.array(self._pngs, pa.binary())
        self.writer.write_table(pa.Table.from_batches(self._payloads).append_column(image_field, images))
        self._payloads, self._pngs, self._bytes = [], [], 0


def _row_bytes(payload: Any) -> int:
    """Return the size of a row without its columns' dictionaries, which all rows share."""
    return sum(getattr(column, "indices", column).nbytes for column in payload.columns)


def _parse_row(codes: Any, columns: dict[str, Any], row: int, sample: Sample, codebook: Codebook) -> None:
    """Fill in the sample's name, codes and size, or its problem."""
    try:
        with wrap_errors(ShardError, "the row cannot be read"):
            values = {name: _to_python(column[row], name) for name, column in columns.items()}
            if values.get("name") is not None:
                sample.name = str(values["name"])
            array = _to_array(codes[row])
        sample.codes, sample.size = codebook.to_grid(array, (values.get("height"), values.get("width")))
    except ValueError as error:
        sample.problem = str(error)


def _to_python(scalar: Any, name: str) -> Any:
    """Convert a name, height or width. Refuses lists and structs, which can have millions of items."""
    pa, _ = import_pyarrow()
    if pa.types.is_nested(scalar.type):
        raise ShardError(f"{name}: expected text or a number, got {printable(str(scalar.type), MAX_SHOWN_CHARACTERS)}")
    return scalar.as_py()


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
    nulls, shape = values.null_count, [len(values)]
    if hasattr(values.type, "value_type"):  # vectorised: there may be millions of rows
        widths = pa.compute.list_value_length(values).unique()
        values = values.flatten()
        nulls, shape = nulls + values.null_count, [*shape, *widths.to_pylist()]
    if nulls:
        raise ShardError("codes must not contain nulls")
    if len(shape) > 2:
        raise ShardError("codes must have rows of equal length")
    if not pa.types.is_primitive(values.type):
        raise ShardError(f"codes must be a list of integers, got {printable(str(scalar.type), MAX_SHOWN_CHARACTERS)}")
    return np.asarray(values).reshape(shape)
