import pytest
from image_folders import deny_reading, write_image

from movq_ext.io.image_files import find_images


def names(*paths):
    return [file.name for file in find_images(paths).files]


def test_find_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/er/c.webp", "d.jfif", "e.pgm", "notes.txt", "odd"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    found = find_images([tmp_path / "in", tmp_path / "in/odd"])
    expected = ("a.jpg", "b.PNG", "d.jfif", "deep/er/c.webp", "e.pgm", "odd")
    assert [file.name for file in found.files] == [f"in/{name}" for name in expected]
    assert [file.path for file in found.files] == [tmp_path / file.name for file in found.files]
    assert found.ignored == {".txt": 1, "no suffix": 1}
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*missing"):
        find_images([tmp_path / "missing"])


def test_names_start_with_the_folders_name(tmp_path, monkeypatch):
    write_image(tmp_path / "a/photos/deep/x.png")
    (tmp_path / "latest").symlink_to(tmp_path / "a/photos")
    assert names(tmp_path / "a") == ["a/photos/deep/x.png"]
    assert names(tmp_path / "a/photos/deep/..") == ["photos/deep/x.png"]
    assert names(tmp_path / "a/photos/deep/x.png") == names(tmp_path / "a/photos/deep") == ["deep/x.png"]
    assert names(tmp_path / "latest") == ["latest/deep/x.png"]
    monkeypatch.chdir(tmp_path / "a/photos")
    assert names(".") == ["photos/deep/x.png"]
    monkeypatch.chdir("deep")
    assert names("x.png") == names("../deep/x.png") == names(".") == ["deep/x.png"]


def test_a_file_that_is_given_twice_is_found_once(tmp_path):
    write_image(tmp_path / "photos/x.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photos").symlink_to(tmp_path / "photos")
    folder = tmp_path / "photos"
    assert names(folder, folder, folder / "x.png", tmp_path / "other/photos") == ["photos/x.png"]


def test_a_folder_inside_another_argument_is_found_once(tmp_path, monkeypatch):
    """The first argument names its images."""
    write_image(tmp_path / "photos/deep/x.png")
    write_image(tmp_path / "photos/y.png")
    monkeypatch.chdir(tmp_path)
    assert names("photos", tmp_path / "photos/deep", "photos/deep/x.png") == ["photos/deep/x.png", "photos/y.png"]
    assert names("photos/deep", "photos") == ["deep/x.png", "photos/y.png"]


def test_two_files_with_the_same_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        write_image(tmp_path / folder / "images/x.png")
    with pytest.raises(ValueError, match=r"a/images/x.png and .*b/images/x.png would both be named images/x.png: pass a folder"):
        find_images([tmp_path / "a/images", tmp_path / "b/images"])
    assert names(tmp_path / "a", tmp_path / "b") == ["a/images/x.png", "b/images/x.png"]


def test_a_folder_without_images_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"found no images in .*/a$"):
        find_images([tmp_path / "a"])
    (tmp_path / "a/x.heic").touch()
    with pytest.raises(ValueError, match=r"found no images in .*/a \(ignored 1: .heic 1\)"):
        find_images([tmp_path / "a"])
    deny_reading(monkeypatch, "a")
    with pytest.raises(PermissionError, match=r"Permission denied: .*/a"):
        find_images([tmp_path / "a"])
    write_image(tmp_path / "b.png")
    found = find_images([tmp_path])
    assert [file.name for file in found.files] == [f"{tmp_path.name}/b.png"] and len(found.unreadable) == 1
