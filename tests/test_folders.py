from collections import Counter

import pytest
from image_folders import deny_reading

from movq_ext.io.folders import describe_ignored, search_folder


def create(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def relative(search, folder):
    return [file.relative_to(folder).as_posix() for file in search.files]


def test_files_are_found_by_suffix_and_sorted(tmp_path):
    create(tmp_path, "b.PNG", "a.png", "deep/er/c.png", "notes.txt", "more/notes.TXT", "odd", ".hidden.png", ".cache/d.png")
    search = search_folder(tmp_path, {".png"})
    assert relative(search, tmp_path) == ["a.png", "b.PNG", "deep/er/c.png"]
    assert search.ignored == {".txt": 2, "hidden": 2, "no suffix": 1} and search.unreadable == []


def test_links_are_followed_and_each_folder_is_searched_once(tmp_path):
    """A folder that is inside the searched one is found under its own path, not a link's."""
    create(tmp_path, "in/real/a.png", "elsewhere/deep/b.png")
    for link in ("a_link", "z_link"):
        (tmp_path / "in" / link).symlink_to("real")
    (tmp_path / "in/circle").symlink_to("../in")
    (tmp_path / "in/outside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/file.png").symlink_to(tmp_path / "elsewhere/deep/b.png")
    search = search_folder(tmp_path / "in", {".png"})
    assert relative(search, tmp_path / "in") == ["file.png", "outside/deep/b.png", "real/a.png"]
    assert search.ignored == {"links to folders already searched": 4} and search.unreadable == []


@pytest.mark.parametrize("target", ["nowhere", "loop"])
def test_broken_links(tmp_path, target):
    """One with a wanted suffix is a file that fails when read; another may have led to a folder of files."""
    create(tmp_path, "a.png")
    for link in ("loop", "mount", "gone.png"):
        (tmp_path / link).symlink_to(tmp_path / target)
    search = search_folder(tmp_path, {".png"})
    assert relative(search, tmp_path) == ["a.png", "gone.png"]
    assert [str(error) for error in search.unreadable] == [f"cannot follow link: {tmp_path}/{link}" for link in ("loop", "mount")]


def test_an_unreadable_folder_does_not_hide_the_others(tmp_path, monkeypatch):
    create(tmp_path, "a/a.png", "closed/b.png", "z/c.png")
    deny_reading(monkeypatch, "closed")
    search = search_folder(tmp_path, {".png"})
    assert relative(search, tmp_path) == ["a/a.png", "z/c.png"]
    assert [error.filename for error in search.unreadable] == [str(tmp_path / "closed")]


def test_the_line_of_ignored_files():
    assert describe_ignored(Counter({".txt": 2, "hidden": 1})) == "ignored 3: .txt 2, hidden 1"
    many = describe_ignored(Counter({f".{i}": 100 - i for i in range(50)}))
    assert many.startswith("ignored 3775: .0 100, .1 99, ") and many.endswith(".9 91, ...")
    assert describe_ignored(Counter({".\x1b\udcff" + "x" * 300: 1})) == rf"ignored 1: .\x1b\udcff{'x' * 37}... 1"
