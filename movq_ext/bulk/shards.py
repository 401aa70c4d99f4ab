"""Shards: files with the codes of many pictures, and what their pictures are written to.

- ``x.parquet``: rows with a column ``codes`` (integers: a list, or a list of rows) and, if there are any, ``name``, ``height``
  and ``width``. The pictures are in ``x.parquet``: the same rows with a column ``image`` (PNG) in the place of ``codes``.
- ``x.tar``, a WebDataset: ``key.npy`` (integers of one or two dimensions) and, if there is any, ``key.json`` with ``height`` and
  ``width``. The pictures are in ``x.tar``: the same samples with ``key.png`` in the place of ``key.npy``.
- ``x.safetensors``: what CodeFile has. The pictures are PNG files in a folder.

Height and width are the picture's, in pixels; the grid of codes has a cell for each ``downsampling`` pixels, rounded up. Without
them the picture is as large as the grid, and codes in one line are those of a square. What else a row or sample has goes with its
picture.
"""

from __future__ import annotations

import io
import math
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..io.codes import CodeFile, codebook_id, name_problem
from ..io.files import atomic_write, parse_json, printable, require_file, wrap_errors
from ..model.autoencoder import MOVQ

CODEBOOK_KEY = b"movq_ext.codebook"  # in the metadata of a Parquet file: whose codes these are, if it says so
COLUMNS = ("name", "height", "width")  # those that say something to us, besides the codes
ROWS = 256  # read at a time
BUFFER_BYTES = 32 << 20  # of pictures, until they are written as one group of rows
MOST_SAMPLE = 256 << 20  # bytes of one sample of a WebDataset
TAR_END = 1024  # bytes, zeros
MOST_SIDE = 1 << 20  # pixels
MOST_PIXELS = 1 << 28  # of one picture: a small file can ask for far larger ones


class ShardError(ValueError):
    """The file is damaged, or no shard."""


class PictureError(ValueError):
    """One picture cannot be written: its name is too long, say."""


@dataclass(frozen=True)
class Codebook:
    """What codes mean: the codebook's fingerprint, how many codes it has, and a cell's pixels along one side."""

    fingerprint: str
    size: int
    cell: int

    @classmethod
    def of(cls, model: MOVQ) -> Codebook:
        return cls(codebook_id(model), model.quantize.re_embed, model.downsampling)

    def require(self, fingerprint: str, path: Path) -> None:
        """Raises ValueError for the codes of another codebook."""
        if fingerprint != self.fingerprint:
            raise ShardError(f"{path} was made with codebook {fingerprint}, the model has {self.fingerprint}")

    def grid(self, codes: Any, size: tuple[Any, Any] = (None, None)) -> tuple[Tensor, tuple[int, int]]:
        """Codes as ``(h, w)`` int64, and (height, width) of the picture. Raises ValueError where they are not those of one."""
        if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu" or codes.ndim not in (1, 2) or not codes.size:
            found = f"{codes.dtype} of shape {codes.shape}" if isinstance(codes, np.ndarray) else "none"
            raise ValueError(f"codes must be integers of one or two dimensions, got {found}")
        height, width = size
        if height is None and width is None:
            side = math.isqrt(codes.size)
            if codes.ndim == 1 and side * side != codes.size:
                raise ValueError(f"{codes.size} codes in one line are no square: height and width are needed")
            rows, columns = (side, side) if codes.ndim == 1 else codes.shape
            height, width = rows * self.cell, columns * self.cell
        elif not all(type(pixels) is int and 0 < pixels <= MOST_SIDE for pixels in size):
            found = printable(f"{height!r} and {width!r}", 100)
            raise ValueError(f"height and width must be whole numbers from 1 to {MOST_SIDE}, got {found}")
        if height * width > MOST_PIXELS:
            raise ValueError(f"a picture of {height} x {width} (height x width) has more than {MOST_PIXELS} pixels")
        rows, columns = -(-height // self.cell), -(-width // self.cell)
        if codes.shape not in ((rows, columns), (rows * columns,)):
            raise ValueError(f"a picture of {height} x {width} (height x width) has {rows} x {columns} codes, got {codes.shape}")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.size:
            raise ValueError(f"codes must be in [0, {self.size}), got values from {low} to {high}")
        return torch.from_numpy(codes.astype(np.int64)).view(rows, columns), (height, width)


@dataclass
class Sample:
    """One picture to decode.

    Args:
        name: within the shard, for messages; what it is called in files.
        codes: ``(h, w)`` int64, or None where it cannot be decoded.
        size: (height, width) of the picture in pixels.
        problem: why it cannot be decoded.
        rest: what else the shard has of it.
        rest_bytes: that it takes.
    """

    name: str
    codes: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    problem: str = ""
    rest: Any = None
    rest_bytes: int = 0


Write = Callable[[Sample, bytes], None]  # a sample's picture as PNG


class Shard(ABC):
    """One file of codes, and what its pictures are written to."""

    suffix: ClassVar[str]

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target

    @classmethod
    def target_of(cls, relative: Path) -> Path:
        """What the pictures of a shard of this name within the input are written to, within the output."""
        return relative

    @property
    def rejects(self) -> Path:
        """The file that says what could not be decoded."""
        return self.target.with_name(f"{self.target.name}.rejects.jsonl")

    def rejected(self) -> int:
        """How many samples that file has."""
        return len(self.rejects.read_text().splitlines()) if self.rejects.exists() else 0

    def is_done(self) -> bool:
        """Whether all its pictures are there, as far as can be told without reading it."""
        return self.target.is_file()

    def count(self) -> int | None:
        """How many samples it has; None where that takes reading all of it, or it cannot be read."""
        return None

    def pictures(self) -> int:
        """How many pictures it has where it is done."""
        raise AssertionError(f"{self.target} is never known to be done")

    def path_of(self, sample: Sample) -> Path:
        """The file that a sample's picture is written to."""
        return self.target

    def has(self, sample: Sample) -> bool:
        """Whether a sample's picture is there already."""
        return False

    @abstractmethod
    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        """The samples in their order, those that cannot be decoded too.

        Raises OSError if the file cannot be read, ShardError, a ValueError, if it is damaged, no shard or of another codebook.
        """

    @abstractmethod
    def writing(self) -> Any:
        """A context with a Write in it. Files take their names at once and whole, at its end and if nothing was raised."""


class ParquetShard(Shard):
    suffix = ".parquet"

    def count(self) -> int | None:
        try:
            with self._open() as file:
                return int(file.metadata.num_rows)
        except (OSError, ValueError):  # which samples() will say
            return None

    def pictures(self) -> int:
        return int(_pyarrow()[1].read_metadata(self.target).num_rows)

    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        with self._open() as file:
            metadata = file.schema_arrow.metadata or {}
            if CODEBOOK_KEY in metadata:
                codebook.require(metadata[CODEBOOK_KEY].decode(errors="replace"), self.source)
            count = 0
            for batch in _refused(file.iter_batches(ROWS), self.source):
                rest = batch.drop_columns(["codes"])
                rest_bytes = rest.nbytes // max(1, batch.num_rows)
                known = [name for name in COLUMNS if name in batch.schema.names]
                for row in range(batch.num_rows):
                    sample = Sample(f"row {count}", rest=rest.slice(row, 1), rest_bytes=rest_bytes)
                    try:
                        with wrap_errors(ShardError, "the row cannot be read"):
                            values = {name: batch[name][row].as_py() for name in known}
                            if values.get("name") is not None:
                                sample.name = str(values["name"])
                            codes = _array(batch["codes"][row])
                        sample.codes, sample.size = codebook.grid(codes, (values.get("height"), values.get("width")))
                    except ValueError as error:
                        sample.problem = str(error)
                    yield sample
                    count += 1

    @contextmanager
    def writing(self) -> Iterator[Write]:
        pa, pq = _pyarrow()
        with self._open() as file:
            schema = file.schema_arrow
        schema = schema.remove(schema.get_field_index("codes"))
        whole = schema.append(pa.field("image", pa.binary()))
        rows: list[tuple[Any, bytes]] = []

        def flush() -> None:
            table = pa.Table.from_batches([rest for rest, _ in rows], schema)
            writer.write_table(table.append_column(whole.field("image"), pa.array([png for _, png in rows], pa.binary())))
            rows.clear()

        def write(sample: Sample, png: bytes) -> None:
            rows.append((sample.rest, png))
            if len(rows) >= ROWS or sum(len(png) for _, png in rows) >= BUFFER_BYTES:
                flush()

        self.target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.target) as partial:
            with pq.ParquetWriter(partial, whole) as writer:
                yield write
                if rows:
                    flush()

    @contextmanager
    def _open(self) -> Iterator[Any]:
        _, pq = _pyarrow()
        require_file(self.source)
        with wrap_errors(ShardError, f"{self.source} is damaged or no Parquet file"):
            file = pq.ParquetFile(self.source)
        with file:
            columns = file.schema_arrow.names
            if "codes" not in columns or "image" in columns or len(set(columns)) != len(columns):
                found = printable(str(columns), 200)
                raise ShardError(f"{self.source} must have a column 'codes', none called 'image' and none twice, got {found}")
            yield file


class WebDatasetShard(Shard):
    suffix = ".tar"

    def pictures(self) -> int:
        with tarfile.open(self.target) as tar:
            return sum(member.name.endswith(".png") for member in tar)

    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        require_file(self.source)
        with wrap_errors(ShardError, f"{self.source} is damaged or no tar file (one that is compressed is not read)"):
            tar = tarfile.open(self.source, "r:")
        with tar:
            self._require_whole(tar)
            seen: set[str] = set()
            for key, members in groupby(_refused(_members(tar), self.source), key=lambda member: member[0]):
                files = [(extension, data) for _, extension, data in members]
                sample = Sample(key, rest=dict(files), rest_bytes=sum(len(data) for _, data in files))
                try:
                    if key in seen:
                        raise ValueError("a sample of this name came before: the files of one must follow each other")
                    if len(sample.rest) < len(files):
                        found = printable(str([extension for extension, _ in files]), 200)
                        raise ValueError(f"a file of the sample comes twice: {found}")
                    self._decipher(sample, codebook)
                except ValueError as error:
                    sample.problem = str(error)
                seen.add(key)
                yield sample

    def _require_whole(self, tar: tarfile.TarFile) -> None:
        """Zeros follow the last member, TAR_END or more, and nothing else: tarfile takes all that it cannot read for the end."""
        with wrap_errors(ShardError, f"{self.source} is damaged"):
            place = -1
            for member in tar:
                if member.offset <= place:  # a size below zero, which some versions of tarfile follow for ever
                    raise ShardError(f"{self.source} is damaged: a member lies before the one it follows")
                place = member.offset
            size = zeros = 0
            with open(self.source, "rb") as file:
                file.seek(tar.offset)
                while block := file.read(1 << 20):
                    size, zeros = size + len(block), zeros + block.count(0)
        if size < TAR_END or zeros < size:
            found = len(tar.getmembers())
            raise ShardError(f"{self.source} is damaged: it has not the end of a tar file after its {found} members")

    def _decipher(self, sample: Sample, codebook: Codebook) -> None:
        if (problem := name_problem(sample.name)) is not None:
            raise ValueError(problem)
        if problems := [data for data in sample.rest.values() if isinstance(data, str)]:
            raise ValueError(problems[0])
        if "npy" not in sample.rest or "png" in sample.rest:
            raise ValueError(f"a sample must have a .npy and no .png, got {printable(str(sorted(sample.rest)), 200)}")
        with wrap_errors(ShardError, "the .npy cannot be read"):
            codes = np.load(io.BytesIO(sample.rest.pop("npy")), allow_pickle=False)
        size: tuple[Any, Any] = (None, None)
        if "json" in sample.rest:
            with wrap_errors(ShardError, "the .json cannot be read"):
                found = parse_json(sample.rest["json"].decode())
            if isinstance(found, dict):
                size = found.get("height"), found.get("width")
        sample.codes, sample.size = codebook.grid(codes, size)

    @contextmanager
    def writing(self) -> Iterator[Write]:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.target) as partial, tarfile.open(partial, "w") as tar:

            def write(sample: Sample, png: bytes) -> None:
                for extension, data in {**sample.rest, "png": png}.items():
                    member = tarfile.TarInfo(f"{sample.name}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

            yield write


class CodeFileShard(Shard):
    suffix = ".safetensors"

    @classmethod
    def target_of(cls, relative: Path) -> Path:
        return relative.with_suffix("")

    @property
    def rejects(self) -> Path:
        return self.target / f"{self.source.name}.rejects.jsonl"

    def is_done(self) -> bool:
        return False

    def count(self) -> int | None:
        try:
            require_file(self.source)
            with wrap_errors(ValueError, str(self.source)), safe_open(self.source, framework="pt") as file:
                return len(file.keys())
        except (OSError, ValueError):
            return None

    def path_of(self, sample: Sample) -> Path:
        return self.target / str(sample.rest)

    def has(self, sample: Sample) -> bool:
        return os.path.exists(self.path_of(sample))  # which no name is too long for

    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        file = CodeFile.load(self.source)
        codebook.require(file.codebook, self.source)
        for name, png in file.png_names().items():
            sample = Sample(name, rest=png)
            try:
                sample.codes, sample.size = codebook.grid(file.codes[name].numpy(), file.sizes[name])
            except ValueError as error:
                sample.problem = str(error)
            yield sample

    @contextmanager
    def writing(self) -> Iterator[Write]:
        def write(sample: Sample, png: bytes) -> None:
            path = self.path_of(sample)
            with wrap_errors(PictureError, "it cannot be written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as partial:
                    partial.write_bytes(png)

        yield write


KINDS: dict[str, type[Shard]] = {kind.suffix: kind for kind in (ParquetShard, WebDatasetShard, CodeFileShard)}


def shard_of(source: Path, target: Path) -> Shard:
    """A file of codes by its suffix: one with another is taken for a CodeFile, which may have any."""
    return KINDS.get(source.suffix.lower(), CodeFileShard)(source, target)


def find_shards(inputs: Iterable[Path], out: Path) -> list[Shard]:
    """The shards among files and folders, which are searched to the bottom; the pictures go to the same places below ``out``.

    In folders what begins with a dot or _ is passed over, as are links to folders: they may lead round in a circle.

    The pictures of a CodeFile that is named itself lie in ``out``, those of one in a folder in a folder of its name.

    Raises FileNotFoundError for a path that does not exist, OSError for one that is no file, ValueError for a folder without
    shards, two shards whose pictures would go to one place or one folder within another, and an ``out`` within a folder that is
    searched.
    """
    found: dict[Path, Shard] = {}

    def add(source: Path, target: Path) -> None:
        if target.resolve() == source.resolve():
            raise ValueError(f"the pictures of {source} would take its place: give another output than {out}")
        if target in found:
            both = f"{found[target].source} and {source}"
            raise ValueError(f"{both} would both be written to {target}: give their folder, or another output for each")
        found[target] = shard_of(source, target)

    for path in inputs:
        if path.is_dir():
            if out.resolve().is_relative_to(path.resolve()):
                raise ValueError(f"the output {out} lies in the input {path}: another run would take the pictures for codes")
            files = sorted(file for file in _walk(path) if file.suffix.lower() in KINDS)
            if not files:
                raise ValueError(f"{path} holds no shards ({', '.join(KINDS)})")
            for file in files:
                relative = file.relative_to(path)
                add(file, out / KINDS[file.suffix.lower()].target_of(relative))
        else:
            require_file(path)
            add(path, out if isinstance(shard_of(path, out), CodeFileShard) else out / path.name)
    folders = {target: shard.source for target, shard in found.items() if isinstance(shard, CodeFileShard)}
    for target, source in folders.items():
        if (around := next((parent for parent in target.parents if parent in folders), None)) is not None:
            both = f"{source} would be written to {target}, among those of {folders[around]}"
            raise ValueError(f"the pictures of {both}, which may have the same names: decode each to an output of its own")
    return list(found.values())


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder. Raises OSError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        yield from (Path(place, name) for name in files if not name.startswith((".", "_")))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ShardError("Parquet files need pyarrow: pip install 'movq_ext[parquet]'") from error
    return pyarrow, pyarrow.parquet


def _array(scalar: Any) -> np.ndarray | None:
    """A Parquet list of integers, or of rows of them, or a tensor, as an array; None for null."""
    pa, _ = _pyarrow()
    if not scalar.is_valid:
        return None
    if hasattr(scalar, "to_numpy"):  # Arrow's tensor
        return np.asarray(scalar.to_numpy())
    values = getattr(getattr(scalar, "value", scalar), "values", None)  # value: of an extension's type, as Ray's tensors are
    if not isinstance(values, pa.Array):
        raise ShardError(f"codes must be a list of integers, got {printable(str(scalar.type), 100)}")
    nested = hasattr(values.type, "value_type")
    rows = [row.values for row in values] if nested else [values]
    if any(row is None or row.null_count for row in rows):
        raise ShardError("codes must have no nulls")
    if len({len(row) for row in rows}) > 1:
        raise ShardError("codes must be rows of one length")
    return np.array([np.asarray(row) for row in rows]) if nested else np.asarray(values)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | str]]:
    """Key, extension and contents of every file, as WebDataset has them; in the place of the contents, why there are none."""
    last, size = "", 0
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if member.isdir() or not stem or not dot or (name.startswith("__") and name.endswith("__")):
            continue
        key = folder + slash + stem
        last, size = key, member.size + (size if key == last else 0)
        contents: bytes | str
        if not member.isfile():
            contents = f"{extension} is no file but a link or device"
        elif size > MOST_SAMPLE:
            contents = f"the sample has more than {MOST_SAMPLE} bytes"
        else:
            file = tar.extractfile(member)
            assert file is not None  # it is a file
            contents = file.read()
        yield key, extension, contents


def _refused(items: Iterable[Any], path: Path) -> Iterator[Any]:
    """items; what a library raises on the way becomes a ShardError."""
    iterator = iter(items)
    while True:
        with wrap_errors(ShardError, f"{path} is damaged"):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
