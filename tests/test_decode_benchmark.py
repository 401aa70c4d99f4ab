"""benchmarks/decode.py and its tables and figures, with made-up times: no peer runs."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MS = {"ours": 100.0, "published compiled nhwc": 150.0, "diffusers compiled nhwc": 160.0, "diffusers nhwc": 200.0}


@pytest.fixture
def decode(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("decode")
    monkeypatch.setattr(module, "save_random", lambda *_, **__: None)
    monkeypatch.setattr(module.Limits, "seconds", lambda self, case: 0.05)
    monkeypatch.setattr(module, "draw", lambda folder: "none")
    yield module
    for name in ("decode", "peer_process", "peers", "plots", "published_decoder", "tables", "timing", "work"):
        sys.modules.pop(name, None)


class FakePeer:
    """Answers at once. `fail_in` is the case, by its number, in which the benchmark is interrupted."""

    cases = None
    fail_in = None

    def __init__(self, name, weights, expected, seconds, threads, **case):
        self.name, self.found, self.case = name, {"ms": []}, (weights.name, threads, *case.values())
        self.factor = 10.0 if case["dtype"] == "float32" else 5.0

    def receive(self, deadline):
        if self.case not in self.cases:
            self.cases.append(self.case)
        if self.fail_in == len(self.cases):
            raise KeyboardInterrupt
        self.found |= {"MB": MS.get(self.name, 300.0), "kept MB": 0.0}

    def measure(self, deadline):
        self.found["ms"].append(self.factor * MS.get(self.name, 250.0))

    def close(self):
        pass


def run(decode, monkeypatch, folder, *arguments, fail_in=None):
    monkeypatch.setattr(decode, "PeerProcess", FakePeer)
    monkeypatch.setattr(FakePeer, "cases", [])
    monkeypatch.setattr(FakePeer, "fail_in", fail_in)
    monkeypatch.setattr(sys, "argv", ["decode.py", "--out", str(folder), *arguments])
    decode.main()


def test_the_plan_measures_every_case_in_its_order(decode, monkeypatch, tmp_path):
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--rounds", "2")
    report = json.loads((tmp_path / "decode.json").read_text())
    cases = list(dict.fromkeys(tuple(row[key] for key in decode.CASE) for row in report["rows"]))
    assert cases == [tuple(case) for case in decode.PLANS["cpu"]]
    assert {row["rounds"] for row in report["rows"]} == {2}
    shipped = {row["decoder"] for row in report["rows"] if row["model"] == "shipped"}
    assert shipped == {"ours", "published compiled nhwc", "published nhwc"}
    name = "kandinsky, cpu, 2 threads, decode, float32, 256x256, batch 1, ours against the best peer"
    assert report[name] == "1.50x the speed, 67% of the memory"


def test_an_interrupted_run_keeps_its_finished_cases(decode, monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(decode, monkeypatch, tmp_path, "--plan", "cpu", fail_in=3)
    report = json.loads((tmp_path / "decode.json").read_text())
    assert {(row["size"], row["dtype"]) for row in report["rows"]} == {(256, "float32"), (256, "bfloat16")}


def test_compile_only_writes_nothing(decode, monkeypatch, tmp_path):
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--compile-only")
    assert len(FakePeer.cases) == len(decode.PLANS["cpu"]) and not list(tmp_path.iterdir())


def test_a_peer_that_has_no_time_keeps_its_rounds(decode, tmp_path):
    results = {"ours": {"ms": [1.0, 3.0], "failed": "no time"}, "published": {"ms": [], "failed": "no time"}}
    ours, published = decode.rows_of(decode.cpu_case(), results, 1.0)
    assert (ours["ms"], ours["rounds"], published["ms"]) == (2.0, 2, "no time")


def test_tables_in_documents(decode, monkeypatch, tmp_path):
    tables = importlib.import_module("tables")
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--rounds", "1")
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- cases table -->\nold\n<!-- end of cases table -->\nafter\n")
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert tables.put_tables(document, rows) == ["cases"]
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 256x256, float32, 2 threads | 1000 | published code, `torch.compile`: 1500 | 1.50x | 1.50x |" in text
    assert "| 8 images of 128x128, float32, 2 threads | 1000 |" in text
    assert tables.put_tables(document, rows) == ["cases"] and document.read_text() == text
    assert "| diffusers, eager | 2000 | 200 | 2.00x | 2.00x |" in tables.decode_table(rows)
    document.write_text("<!-- cases table -->\n")
    with pytest.raises(SystemExit, match="has no <!-- end of cases table -->"):
        tables.put_tables(document, rows)


def test_figures(decode, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    plots = importlib.import_module("plots")
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--rounds", "1")
    assert plots.draw(tmp_path) == "comparison.png, cases.png"
    first = plots.first_cases(dict.fromkeys(decode.PLANS["cpu"]))
    assert list(first) == [decode.cpu_case(), decode.cpu_case("bfloat16")]
