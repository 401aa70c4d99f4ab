import os

import pytest
import torch
from models import KANDINSKY

from movq_ext import MOVQDecoder
from movq_ext.bulk import memory
from movq_ext.bulk.batches import BatchDecoder, Settings

MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_available_memory(model_folder, monkeypatch):
    """The threads' share of the machine's memory, and a GPU's free memory."""
    monkeypatch.setattr(memory, "CONTAINER_LIMIT_FILES", ())
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    device = torch.device("cpu")
    found = [memory.available_memory(device, threads) for threads in (1, 4, 8)]
    assert found == [MACHINE_BYTES // 4, MACHINE_BYTES, MACHINE_BYTES]
    assert 0 < BatchDecoder(Settings(model_folder, "cpu", threads=1)).max_memory < MACHINE_BYTES // 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert memory.available_memory(torch.device("cuda"), 1) == 1000


@pytest.mark.parametrize(
    "text, size", [("1073741824\n", 1 << 30), ("max\n", None), ("9223372036854771712\n", None), (None, None)]
)
def test_limit_of_a_container(tmp_path, monkeypatch, text, size):
    if text is not None:
        (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(memory, "CONTAINER_LIMIT_FILES", (tmp_path / "memory.max",))
    assert memory.machine_memory() == (size or MACHINE_BYTES)


def test_peak_values_per_pixel():
    """By hand: 128 + 256 channels of the last level's first block at full resolution; the levels above it have fewer."""
    assert memory.peak_values_per_pixel(MOVQDecoder(**KANDINSKY)) == 2 * (256 + 128)
