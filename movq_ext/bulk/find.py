"""Find the shards in files and folders, and decide where their images go."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..io.files import require_file
from ..io.folders import describe_ignored, search_folder
from .code_files import CodeFileShard
from .image_folder import ImageFolderShard
from .npz import NpzShard
from .parquet import ParquetShard
from .shards import FieldNames, Shard
from .webdataset import WebDatasetShard

logger = logging.getLogger(__name__)

FORMATS: tuple[type[Shard], ...] = (ParquetShard, WebDatasetShard, NpzShard, CodeFileShard)


def format_of(path: Path) -> type[Shard]:
    """Return the format of a file's suffix. A file with an unknown suffix is taken for a code file."""
    return next((shard for shard in FORMATS if path.name.lower().endswith(shard.suffixes)), CodeFileShard)


def make_shard(source: Path, target: Path, names: FieldNames | None = None) -> Shard:
    """Create the shard of a source, in the format of its suffix."""
    return format_of(source)(source, target, names)


def _raise(error: OSError) -> None:
    raise error


def find_shards(
    inputs: Iterable[Path], out: Path, names: FieldNames | None = None, on_unreadable: Callable[[OSError], object] = _raise
) -> list[Shard]:
    """Return the shards among files and folders.

    Folders are searched as `search_folder` does; names that start with ``.`` or ``_`` are ignored. The output mirrors the
    folder. A code file or ``.npz`` that is given by its path is decoded straight to ``out``.

    Args:
        inputs: files and folders.
        out: output folder.
        names: names of the codes in the shards and of the images in the output.
        on_unreadable: called with the error of each folder that cannot be read and each link that cannot be followed. By default,
            and if the input folder has no shards, the error is raised.

    Returns:
        The shards, in the order of inputs and sorted within a folder.

    Raises:
        FileNotFoundError: a path does not exist.
        OSError: a folder cannot be read, or a path is neither a file nor a folder.
        ValueError: a folder has no shards, a link leads from an input folder into the output, two outputs or an input and an
            output coincide, or one output is inside another.
    """
    shards: dict[Path, Shard] = {}
    for path in inputs:
        for source, target in _search_folder(path, out, on_unreadable) if path.is_dir() else [_locate_file(path, out)]:
            if target in shards:
                both = f"{shards[target].source} and {source}"
                raise ValueError(f"{both} would both be written to {target}: pass their folder, or decode each to its own output")
            shards[target] = make_shard(source.absolute(), target.absolute(), names)  # Ray's workers have another working folder
    _require_sources_kept(shards, out)
    _require_separate_folders(shards)
    return list(shards.values())


def _locate_file(path: Path, out: Path) -> tuple[Path, Path]:
    """Return (source, target) of a file that was given by its path."""
    require_file(path)
    shard_format = format_of(path)
    return path, out if issubclass(shard_format, ImageFolderShard) else out / shard_format.target_of(Path(path.name))


def _search_folder(folder: Path, out: Path, on_unreadable: Callable[[OSError], object]) -> Iterator[tuple[Path, Path]]:
    """Yield (source, target) of every shard in a folder."""
    real_out, real_folder = _real_path(out), _real_path(folder)
    if real_out.is_relative_to(real_folder):
        raise ValueError(f"output {out} is inside input {folder}: the next run would read the images as codes")
    suffixes = [suffix for shard_format in FORMATS for suffix in shard_format.suffixes]
    search = search_folder(folder, suffixes, hidden=(".", "_"))
    for error in search.unreadable:
        if not search.files:
            raise error
        on_unreadable(error)
    if not search.files:
        raise ValueError(f"{folder} has no shards ({', '.join(suffixes)})")
    if set(search.ignored) - {"hidden"}:
        logger.warning("%s: %s", folder, describe_ignored(search.ignored))
    for file in search.files:
        real_file = _real_path(file)
        if real_file.is_relative_to(real_out) and not real_file.is_relative_to(real_folder):
            raise ValueError(f"{file} is a link into output {out}: the next run would read the images as codes")
        yield file, out / format_of(file).target_of(file.relative_to(folder))


def _real_path(path: Path) -> Path:
    """Follow links. Unlike Path.resolve, leave a circle of links to the error that reading the file raises."""
    return Path(os.path.realpath(path))


def _require_sources_kept(shards: dict[Path, Shard], out: Path) -> None:
    """Raise ValueError if a shard's images would overwrite a source."""
    sources = {_real_path(shard.source): shard.source for shard in shards.values()}
    for target, shard in shards.items():
        if (overwritten := sources.get(_real_path(target))) is not None:
            whose = "its own images" if overwritten == shard.source else f"the images of {shard.source}"
            raise ValueError(f"{overwritten} would be overwritten by {whose}: choose an output other than {out}")


def _require_separate_folders(shards: dict[Path, Shard]) -> None:
    """Raise ValueError if a shard's folder of images is inside another's: two images could have the same path."""
    folders = {target: shard.source for target, shard in shards.items() if isinstance(shard, ImageFolderShard)}
    for target, source in folders.items():
        if (outer := next((parent for parent in target.parents if parent in folders), None)) is not None:
            problem = f"{source} would be written to {target}, among the images of {folders[outer]}"
            raise ValueError(f"{problem}: decode each to its own output")
