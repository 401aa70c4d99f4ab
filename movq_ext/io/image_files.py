"""Find image files and name them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .files import path_to_text
from .folders import FolderSearch, describe_ignored, search_folder
from .images import SUFFIXES


class ImageFile(NamedTuple):
    """An image file and its name, such as ``photos/deep/a.png``; `find_images` defines it."""

    path: Path
    name: str


@dataclass
class ImageFiles:
    """What `find_images` found.

    Args:
        files: the image files, in the order of the arguments and sorted within a folder.
        unreadable: the errors of folders that could not be read and of links that could not be followed.
        ignored: number of other files and folders by reason; see `describe_ignored`.
    """

    files: list[ImageFile] = field(default_factory=list)
    unreadable: list[OSError] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def find_images(paths: Iterable[str | Path]) -> ImageFiles:
    """Find the images among files and folders, and name each by the given folder's name and the path below it.

    The folder ``data/photos`` names an image ``photos/deep/a.png``. A file given directly is named by its parent folder and
    name: ``deep/a.png``. The first argument that contains a file names it. Folders are searched as `search_folder` does. A path
    to a file is taken whatever its suffix.

    Raises:
        FileNotFoundError: a path does not exist.
        OSError: a folder cannot be read and has no other images.
        ValueError: a folder has no images, or two files would have the same name.
    """
    found = ImageFiles()
    by_name: dict[str, Path] = {}
    seen: set[str] = set()  # absolute paths
    for path in map(Path, paths):
        folder = Path(os.path.abspath(path))  # "." has no name; resolve() would replace a link's name with its target's
        if path.is_dir():
            search = _search_for_images(path)
            found.unreadable += search.unreadable
            found.ignored += search.ignored
            files = [(file, folder.name / PurePosixPath(file.relative_to(path))) for file in search.files]
        elif path.exists():
            files = [(path, PurePosixPath(folder.parent.name, path.name))]
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
        for file, name in ((file, path_to_text(name)) for file, name in files):
            if (absolute := os.path.abspath(file)) in seen:
                continue
            seen.add(absolute)
            other = by_name.setdefault(name, file)
            if other is file:
                found.files.append(ImageFile(file, name))
            elif os.path.realpath(other) != os.path.realpath(file):
                problem = f"{other} and {file} would both be named {name}"
                raise ValueError(f"{problem}: pass a folder that contains both, or encode each to its own output")
    return found


def _search_for_images(folder: Path) -> FolderSearch:
    search = search_folder(folder, SUFFIXES)
    if search.files:
        return search
    if search.unreadable:
        raise search.unreadable[0]
    suffix = f" ({describe_ignored(search.ignored)})" if search.ignored else ""
    raise ValueError(f"found no images in {folder}{suffix}")
