"""benchmarks/accuracy.py: a decoder that fails gets a row that says so, and the exit status of a failure of ours is 1."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("accuracy")
    yield module
    for name in ("accuracy", "peers", "published_decoder", "timing"):
        sys.modules.pop(name, None)


def rows_of(accuracy, ours, peer="published nhwc"):
    found = {"ours nhwc": ours, peer: [(1e-6, 1e-5), (1e-6, 1e-5)]}
    return {row["decoder"]: row for row in accuracy.compare_with_peers({"model": "a", "dtype": "float32"}, found)}


@pytest.mark.parametrize(
    "ours, verdict",
    [
        ([(1.04e-6, 1e-5), (1.04e-6, 1e-5)], "yes"),
        ([(1.06e-6, 1e-5), (1.06e-6, 1e-5)], "no"),
        ("failed: TypeError: a dtype", "no"),
        ("no time", "-"),
    ],
)
def test_verdict(accuracy, ours, verdict):
    rows = rows_of(accuracy, ours)
    assert rows["ours nhwc"][accuracy.VERDICT] == verdict
    assert rows["published nhwc"][accuracy.VERDICT] == "-"


@pytest.mark.parametrize("kind, status", [("ours", 1), ("published", 0), ("neither", 0)])
def test_exit_status_and_rows_of_a_decoder_that_fails(accuracy, monkeypatch, tmp_path, kind, status):
    """With made-up decoders. The report is written in each case."""

    def peer(name, *_):
        if name == f"{kind} nhwc":
            raise TypeError("Input type and bias type\nmust be the same")
        return None, lambda z: z + 1e-3

    monkeypatch.setattr(accuracy, "peer", peer)
    monkeypatch.setattr(accuracy, "reference", lambda folder, z, *_: z.double())
    monkeypatch.setattr(accuracy, "attention_errors", lambda *_: {})
    monkeypatch.setattr(accuracy, "save_random", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--device=cpu", "--quick", "--seeds=2", f"--out={tmp_path}"])
    assert accuracy.main() == status
    report = json.loads((tmp_path / "accuracy.json").read_text())
    failed = [row for row in report["rows"] if row["decoder"] == f"{kind} nhwc"]
    assert all(row["relative L2"] == "failed: TypeError: Input type and bias type" for row in failed)
    assert ("float32" in report["ours is worse or fails in"]) == (kind == "ours")
    assert ("float32" in report["peers that failed"]) == (kind == "published")
