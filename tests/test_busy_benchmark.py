"""benchmarks/busy.py, with made-up times: no peer runs."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from movq_ext.demo import SMALL_MODEL_PATH

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def busy(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("busy")
    monkeypatch.setattr(module, "save_random", lambda *_, **__: None)
    yield module
    for name in ("busy", "peer_process", "peers", "published_decoder", "timing"):
        sys.modules.pop(name, None)


def test_a_row_for_every_number_of_processes_and_decoder(busy, monkeypatch, tmp_path):
    running, open_peers = [0], set()

    class FakePeer:
        def __init__(self, name, weights, expected, seconds, threads, **case):
            self.name, self.found = name, {"ms": []}
            open_peers.add(name)

        def receive(self, deadline):
            if "compiled" in self.name:
                self.found["failed"] = "no compiler"

        def measure(self, deadline, warm_up):
            assert not warm_up  # no decoder reported a short call
            if "failed" not in self.found:
                self.found["ms"].append(100.0 if self.name == "ours" else 100.0 * (1 + running[0]))

        def close(self):
            open_peers.remove(self.name)

    class FakeProcesses:
        def __init__(self, count):
            self.count = count

        def __enter__(self):
            running[0] = self.count

        def __exit__(self, *error):
            running[0] = 0

    monkeypatch.setattr(busy, "PeerProcess", FakePeer)
    monkeypatch.setattr(busy, "BusyProcesses", FakeProcesses)
    monkeypatch.setattr(sys, "argv", ["busy.py", "--out", str(tmp_path), "--rounds", "2"])
    busy.main()
    rows = json.loads((tmp_path / "busy.json").read_text())["rows"]
    assert [(row["busy processes"], row["decoder"]) for row in rows] == [(n, peer) for n in busy.BUSY for peer in busy.PEERS]
    assert [row["slowdown"] for row in rows] == [1, 1, 1, "-", 1, 2, 2, "-", 1, 4, 4, "-"]
    assert rows[3]["ms"] == "no compiler" and rows[4]["rounds"] == 2
    assert "slowdown" in (tmp_path / "busy.md").read_text() and not open_peers


def test_the_shipped_model(busy, monkeypatch, tmp_path):
    """diffusers cannot read it."""
    started = []

    class FakePeer:
        def __init__(self, name, weights, expected, seconds, threads, **case):
            self.name, self.found = name, {"ms": [], "failed": "not started"}
            started.append((name, weights, case["dtype"]))

        def receive(self, deadline):
            pass

        def measure(self, deadline, warm_up):
            pass

        def close(self):
            pass

    monkeypatch.setattr(busy, "PeerProcess", FakePeer)
    monkeypatch.setattr(sys, "argv", ["busy.py", "--out", str(tmp_path), "--shipped", "--dtype", "bfloat16", "--busy", "0"])
    busy.main()
    assert started == [(name, SMALL_MODEL_PATH, "bfloat16") for name in busy.SHIPPED_PEERS]
    head = json.loads((tmp_path / "busy.json").read_text())
    assert (head["model"], head["dtype"]) == ("shipped", "bfloat16")


def test_busy_processes_end_after_an_error(busy):
    processes = busy.BusyProcesses(2)
    with pytest.raises(KeyError), processes:
        assert [process.poll() for process in processes._processes] == [None, None]
        raise KeyError
    assert all(process.returncode for process in processes._processes)


def test_threads_in_operators(busy, monkeypatch, tmp_path):
    """The peer divides no work between threads of its own."""
    import peers

    from movq_ext.model import working_memory

    monkeypatch.setattr(working_memory, "num_workers", working_memory.num_workers)
    monkeypatch.setattr(peers, "load", lambda *_: (None, None))
    peers.peer("ours in-operators", tmp_path, None, None)
    assert working_memory.cpu_memory(torch.float32).workers == 1
