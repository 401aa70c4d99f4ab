"""Test the installed package: the source folder lacks movq_ext._C and the build record."""

import json
import os
import sys
import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

SOURCE = Path(__file__).resolve().parents[1]


def editable():
    """Return True if `pip install -e` installed this folder."""
    urls = (json.loads(found.read_text("direct_url.json") or "{}") for found in metadata.distributions(name="movq_ext"))
    return any(url.get("dir_info", {}).get("editable") and url["url"] == SOURCE.as_uri() for url in urls)


def hide_source():
    """Keep the source folder off sys.path: `python -m pytest` and the tests' `python -c` would put it first."""
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != SOURCE]
    os.environ["PYTHONSAFEPATH"] = "1"
    if (found := sys.modules.get("movq_ext")) and Path(found.__file__).is_relative_to(SOURCE):
        pytest.exit("movq_ext was imported from its source folder before the tests started", returncode=4)


# No time limits, as other work may share the machine. CI draws the same examples every time: its failures come from the change.
settings.register_profile("movq_ext", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("movq_ext")

torch.backends.cudnn.allow_tf32 = False  # TF32 has a 10-bit mantissa, too coarse for the float32 tolerances

if not editable():
    hide_source()

try:
    import movq_ext
except ModuleNotFoundError as error:
    if error.name != "movq_ext":
        raise
    pytest.exit("movq_ext is not installed in this environment; run: pip install '.[test]'", returncode=4)

if Path(movq_ext.__file__).resolve().is_relative_to(SOURCE / "movq_ext") and not editable():
    pytest.exit("the source folder shadows the installed movq_ext; remove it from PYTHONPATH", returncode=4)

from models import SMALL_MOVQ  # noqa: E402  (needs the checks above)
from pretend_gpu import Machine  # noqa: E402
from spies import record_calls  # noqa: E402

from movq_ext.bulk.batches import BatchDecoder, Settings  # noqa: E402
from movq_ext.model import working_memory  # noqa: E402
from movq_ext.ops import attention_backends, extension, self_test, thread_pool, winograd_upsampling  # noqa: E402


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    """Three small photographs; the last is smaller than a crop."""
    folder = tmp_path_factory.mktemp("photographs")
    ramp = np.linspace(0, 255, 40, dtype=np.uint8)
    for i, size in enumerate([(40, 40), (30, 20), (5, 6)]):
        Image.fromarray(np.stack([np.roll(np.resize(ramp, size), i + c) for c in range(3)], 2)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small MOVQ, saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    movq_ext.save_pretrained(movq_ext.MOVQ(**SMALL_MOVQ), folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder):
    return movq_ext.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def decoder(model_folder):
    """The BatchDecoder of a small MOVQ on a CPU."""
    return BatchDecoder(Settings(model_folder, "cpu"))


@pytest.fixture
def in_strips(monkeypatch):
    """Decode small images in strips too, which a CPU would decode as whole maps."""
    for limit in ("MAX_WHOLE_MAP_BYTES", "MAX_SHARED_MAP_BYTES"):
        monkeypatch.setattr(movq_ext.model.decoder, limit, 0)


@pytest.fixture
def machine(monkeypatch):
    """A GPU that this machine does not have."""
    monkeypatch.setattr(self_test, "_results", {})
    monkeypatch.delenv(attention_backends.VARIABLE, raising=False)
    monkeypatch.delenv(self_test.VARIABLE, raising=False)
    for warn in (extension.warn_once, attention_backends.warn_of_request_once):
        warn.cache_clear()
    return Machine(monkeypatch)


def pytest_collection_modifyitems(items):
    """Mark the tests that are skipped without a GPU, so that ``-m gpu`` selects them."""
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend == "gpu" or any("needs a GPU" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def restored_threads():
    """End a call of torch.set_num_threads with the test, also if the tested code made it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs(monkeypatch):
    """Return the number of threads of every run, in the order in which they ended."""

    def count(_, run, workers, runs):
        return workers + isinstance(threading.current_thread(), thread_pool.Worker)

    return record_calls(monkeypatch, thread_pool, "_run", count)


@pytest.fixture
def few_channels(monkeypatch):
    """Narrow layers and small maps take nine products for four pixels, too."""
    monkeypatch.setattr(winograd_upsampling, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd_upsampling, "MIN_PIXELS", 1)


@pytest.fixture
def small_maps_in_threads(monkeypatch):
    """Let threads share maps of any size."""
    monkeypatch.setattr(working_memory, "MIN_THREADED_VALUES", 1)
