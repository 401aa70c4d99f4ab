"""The installed copy that a source folder hides. test_build.py starts Python in a source folder."""

import json
import sys

import pytest

from movq_ext.ops import source_folder
from movq_ext.ops.source_folder import find_installed_copy


def write_dist_info(folder, direct_url=None):
    (folder / "movq_ext-0.1.0.dist-info").mkdir(parents=True)
    (folder / "movq_ext-0.1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: movq_ext\nVersion: 0.1.0\n")
    if direct_url:
        (folder / "movq_ext-0.1.0.dist-info/direct_url.json").write_text(json.dumps(direct_url))


def test_the_installed_copy_is_found(tmp_path, monkeypatch):
    clone, packages, package = tmp_path / "a clone", tmp_path / "packages", tmp_path / "a clone/movq_ext"
    monkeypatch.setattr(sys, "path", [str(clone), str(packages)])
    assert find_installed_copy(package) is None
    write_dist_info(packages)
    assert find_installed_copy(package) == packages / "movq_ext"
    assert find_installed_copy(packages / "movq_ext") is None
    write_dist_info(clone)  # like the egg-info that a build leaves
    assert find_installed_copy(package) == packages / "movq_ext"


def test_an_editable_install_is_its_source_folder(tmp_path, monkeypatch):
    clone, packages, other = tmp_path / "a clone", tmp_path / "packages", tmp_path / "other"
    monkeypatch.setattr(sys, "path", [str(clone), str(packages)])
    write_dist_info(packages, {"url": clone.as_uri(), "dir_info": {"editable": True}})
    assert find_installed_copy(clone / "movq_ext") is None
    assert find_installed_copy(other / "movq_ext") == clone / "movq_ext"


def test_an_installed_package_does_not_look_for_others(tmp_path, monkeypatch):
    """Looking would slow down every import."""
    monkeypatch.setattr(source_folder, "find_installed_copy", lambda package: pytest.fail("looked for other copies"))
    source_folder.warn_if_installed_elsewhere(tmp_path / "movq_ext")
