"""NumPy shards: ``.npz`` files with an array of codes, or with one array per image."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ..io.codes import name_problem
from ..io.files import MAX_SHOWN_CHARACTERS, printable, require_file, wrap_errors
from .codebook import Codebook
from .image_folder import ImageFolderShard, PngNames
from .npy_stream import NpyStream, open_npy
from .shards import FieldNames, Sample, ShardError

RawSample = tuple[str, np.ndarray | ValueError, tuple[Any, Any]]  # name, codes or the error that prevented reading them, size
PER_IMAGE = ("name", "height", "width")  # the arrays, besides the codes, that are interpreted


class NpzShard(ImageFolderShard):
    """An ``.npz`` file, decoded to a folder of PNGs."""

    suffixes = (".npz",)

    def count_samples(self) -> int | None:
        try:
            with self._open() as archive:
                keys = _array_keys(archive)
                if (column := self._column(keys)) is None:
                    return len(keys)
                with open_npy(archive, column) as codes:
                    return _count_images(codes, _read_per_image(archive, keys, column)) or 1
        except (OSError, ValueError):  # samples() reports it
            return None

    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        with self._open() as archive:
            keys = _array_keys(archive)
            column = self._column(keys)
            named = column is None or "name" in keys
            names = PngNames(self.target)
            for name, codes, size in _grids(archive, keys) if column is None else _column(archive, keys, column):
                sample = Sample(name, payload=str(PurePosixPath(f"{name}.png")))
                try:
                    if (problem := name_problem(name)) is not None:
                        raise ValueError(problem)
                    if isinstance(codes, ValueError):
                        raise codes
                    grid = codebook.to_grid(codes, size)
                    if named:  # numbers are unique
                        names.add(sample.payload)
                    sample.codes, sample.size = grid
                except ValueError as error:
                    sample.problem = str(error)
                yield sample

    def _column(self, keys: list[str]) -> str | None:
        """Return the key of the array of all codes, or None if every array is one image's grid."""
        if self.names.column in keys:
            return self.names.column
        if self.names.column == FieldNames.column and keys:
            return keys[0] if len(keys) == 1 else None
        found = printable(str(keys), MAX_SHOWN_CHARACTERS)
        raise ShardError(f"{self.source} must have an array {self.names.column!r}, got {found}: choose another with --column")

    @contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        require_file(self.source)
        with wrap_errors(ShardError, f"{self.source} is damaged or not an .npz file"):
            archive = zipfile.ZipFile(self.source)
        with archive:
            yield archive


def _array_keys(archive: zipfile.ZipFile) -> list[str]:
    """Return the keys of the arrays."""
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ShardError("two arrays have the same name")
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


def _grids(archive: zipfile.ZipFile, keys: list[str]) -> Iterator[RawSample]:
    """Yield the samples of a file with one grid per image."""
    for key in keys:
        codes: np.ndarray | ValueError
        try:
            with open_npy(archive, key) as array:
                if len(array.shape) != 2:
                    hint = "name the array with the codes of all images with --column"
                    raise ValueError(f"expected a grid of rows x columns, got shape {array.shape}: {hint}")
                codes = array.read()
        except ValueError as error:
            codes = error
        yield key, codes, (None, None)


def _column(archive: zipfile.ZipFile, keys: list[str], column: str) -> Iterator[RawSample]:
    """Yield the samples of an array with the codes of all images, or of one."""
    per_image = _read_per_image(archive, keys, column)

    def value(key: str, i: int) -> Any:
        return per_image[key].item(i if per_image[key].ndim else 0) if key in per_image else None

    with open_npy(archive, column) as codes:
        count = _count_images(codes, per_image)
        for i, grid in enumerate([codes.read()] if count is None else codes.items()):
            name = value("name", i)
            if name is None:
                name = column if count is None else f"{i:08}"
            elif isinstance(name, bytes):
                name = name.decode(errors="replace")
            yield str(name), grid, (value("height", i), value("width", i))


def _read_per_image(archive: zipfile.ZipFile, keys: list[str], column: str) -> dict[str, np.ndarray]:
    """Return the arrays of names, heights and widths that the file has."""
    arrays = {}
    for key in PER_IMAGE:
        if key in keys and key != column:
            with open_npy(archive, key) as array:
                arrays[key] = array.read()
    return arrays


def _count_images(codes: NpyStream, per_image: dict[str, np.ndarray]) -> int | None:
    """Return the number of images along the codes' first axis, or None if the codes are one image."""
    if len(codes.shape) != 3 and not any(array.ndim for array in per_image.values()):
        return None
    for key, array in per_image.items():
        if (array.ndim or key == "name") and array.shape != codes.shape[:1]:
            raise ShardError(f"{key}: expected one value per image for codes of shape {codes.shape}, got shape {array.shape}")
    return codes.shape[0]
