import os

import pytest
import torch
from models import KANDINSKY

from movq_ext import Encoder, MOVQDecoder
from movq_ext.bulk import memory
from movq_ext.bulk.batches import BatchDecoder, Settings

MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_available_memory(model_folder, monkeypatch):
    """The threads' share of the machine's memory, and a GPU's free memory."""
    monkeypatch.setattr(memory, "CONTROL_GROUP_LIMITS", ())
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    device = torch.device("cpu")
    found = [memory.available_memory(device, threads) for threads in (1, 4, 8)]
    assert found == [MACHINE_BYTES // 4, MACHINE_BYTES, MACHINE_BYTES]
    assert 0 < BatchDecoder(Settings(model_folder, "cpu", threads=1)).max_memory < MACHINE_BYTES // 4


def test_free_memory_of_a_gpu(monkeypatch):
    """Blocks in torch's cache are free: they are left over from the previous image."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    gpu = torch.device("cuda")
    assert memory.available_memory(gpu, 1) == memory.free_memory(gpu) == 1400


@pytest.mark.parametrize(
    "text, size", [("1073741824\n", 1 << 30), ("max\n", None), ("9223372036854771712\n", None), (None, None)]
)
def test_limit_of_a_container(tmp_path, monkeypatch, text, size):
    if text is not None:
        (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(memory, "CONTROL_GROUP_LIMITS", ((tmp_path, "memory.max"),))
    assert memory.machine_memory() == (size or MACHINE_BYTES)


@pytest.mark.parametrize("limited", ["", "jobs", "jobs/1"])
def test_limit_of_a_batch_job(tmp_path, monkeypatch, limited):
    """The lowest limit of this process's control group and the groups that contain it."""
    (tmp_path / "jobs/1").mkdir(parents=True)
    for group in ("", "jobs", "jobs/1"):
        (tmp_path / group / "memory.max").write_text(str(1 << 20) if group == limited else "max\n")
    (tmp_path / "cgroup").write_text("1:name=systemd:/elsewhere\n0::/jobs/1\n")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CONTROL_GROUP_LIMITS", ((tmp_path, "memory.max"),))
    assert memory.machine_memory() == 1 << 20


def test_free_memory(tmp_path, monkeypatch):
    """What the machine has left, or what the container's limit leaves to this process."""
    cpu, files = torch.device("cpu"), {name: tmp_path / name for name in ("PROCESS_STATUS", "MACHINE_STATUS")}
    for name, path in files.items():
        monkeypatch.setattr(memory, name, path)
    files["PROCESS_STATUS"].write_text("VmHWM:\t  900 kB\nVmRSS:\t  600 kB\n")
    files["MACHINE_STATUS"].write_text("MemFree:  1 kB\nMemAvailable:   500 kB\n")
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000 << 10)
    assert memory.free_memory(cpu) == 400 << 10
    monkeypatch.setattr(memory, "machine_memory", lambda: 2000 << 10)
    assert memory.free_memory(cpu) == 500 << 10
    monkeypatch.setattr(memory, "machine_memory", lambda: 100 << 10)
    assert memory.free_memory(cpu) == 0
    for path in files.values():  # other systems have no such files
        path.unlink()
    assert memory.free_memory(cpu) == 100 << 10


def test_peak_values_per_pixel():
    """By hand: 128 + 256 channels of the last level's first block at full resolution; the levels above it have fewer."""
    assert memory.peak_values_per_pixel(MOVQDecoder(**KANDINSKY)) == 2 * (256 + 128)
    assert memory.peak_values_per_pixel(Encoder(**KANDINSKY)) == 2 * (128 + 128)
    assert memory.peak_values_per_pixel(Encoder(**KANDINSKY | {"num_res_blocks": 0})) == 3 * 128
