"""The tests are of the installed package."""

import json
from importlib import metadata
from pathlib import Path

import pytest

import movq_ext


def pytest_sessionstart(session):
    source = Path(__file__).resolve().parents[1]
    if not Path(movq_ext.__file__).resolve().is_relative_to(source / "movq_ext"):
        return
    try:
        url = json.loads(metadata.distribution("movq_ext").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        pytest.exit("movq_ext is not installed; run: pip install '.[test]'", returncode=4)
    if not url.get("dir_info", {}).get("editable"):
        pytest.exit("the source folder hides the installed movq_ext; run `pytest`, not `python -m pytest`", returncode=4)
