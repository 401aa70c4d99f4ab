"""Search folders for files, and count what was ignored."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from .files import printable

MAX_SHOWN_SUFFIXES = 10
MAX_SUFFIX_CHARACTERS = 40


@dataclass
class FolderSearch:
    """What a search found.

    Args:
        files: files with a wanted suffix, sorted. One may be a broken link or a pipe: reading it raises an error.
        unreadable: the errors of folders that could not be read and of links that could not be followed.
        ignored: number of other files and folders by reason, such as a suffix.
    """

    files: list[Path] = field(default_factory=list)
    unreadable: list[OSError] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def search_folder(folder: Path, suffixes: Collection[str], hidden: tuple[str, ...] = (".",)) -> FolderSearch:
    """Search a folder recursively for files with one of the suffixes (lower case).

    Links are followed, and each folder is searched once, by a path without links if it has one. Names that start with one of
    ``hidden`` are ignored.
    """
    found, wanted = FolderSearch(), tuple(suffixes)
    folders, links = [folder], list[Path]()
    searched: set[tuple[int, int]] = set()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        try:
            status = current.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in searched:  # also a link to a parent, which would lead round in circles
                found.ignored["links to folders already searched"] += 1
                continue
            searched.add(identity)
            with os.scandir(current) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable.append(error)
            continue
        for entry in children:
            path, is_link = Path(entry.path), entry.is_symlink()
            if entry.name.startswith(hidden):
                found.ignored["hidden"] += 1
            elif os.path.isdir(path) if is_link else entry.is_dir():
                (links if is_link else folders).append(path)
            elif entry.name.lower().endswith(wanted):
                found.files.append(path)
            elif is_link and not os.path.exists(path):  # perhaps to a folder of files
                found.unreadable.append(FileNotFoundError(f"cannot follow link: {path}"))
            else:
                found.ignored[path.suffix.lower() or "no suffix"] += 1
    found.files.sort()
    return found


def describe_ignored(ignored: Counter[str]) -> str:
    """Return a line such as ``ignored 3: .txt 2, hidden 1``."""
    most_common = ignored.most_common(MAX_SHOWN_SUFFIXES)
    shown = [f"{printable(reason, MAX_SUFFIX_CHARACTERS)} {count}" for reason, count in most_common]
    if len(ignored) > MAX_SHOWN_SUFFIXES:
        shown.append("...")
    return f"ignored {ignored.total()}: {', '.join(shown)}"
