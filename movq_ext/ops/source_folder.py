"""Warning for a Python started in a clone: it imports the source folder, without the extension, not the installed package."""

from __future__ import annotations

import json
import warnings
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def warn_if_installed_elsewhere(package: Path) -> None:
    """Warn if `package` is in a source folder and another copy is installed."""
    if not (package.parent / "setup.py").is_file():
        return
    if installed := find_installed_copy(package):
        warnings.warn(
            f"movq_ext was imported from its source folder, {package}, which hides the installed copy, {installed}. "
            "Start Python in another folder, or with PYTHONSAFEPATH=1, to use the installed copy",
            RuntimeWarning,
            stacklevel=2,
        )


def find_installed_copy(package: Path) -> Path | None:
    """Return the folder of the installed movq_ext, or None if there is none or `package` itself is installed, as editable."""
    for distribution in metadata.distributions(name="movq_ext"):
        folder = Path(str(distribution.locate_file(""))).resolve()
        if folder == package.parent:
            continue  # the egg-info that a build left in the source folder
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            folder = Path(url2pathname(urlsplit(origin["url"]).path))
        return None if folder == package.parent else folder / "movq_ext"
    return None
