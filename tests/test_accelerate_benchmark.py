"""benchmarks/accelerate_diffusers.py from end to end on a small model, without compiling."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("accelerate_diffusers")
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    yield module
    for name in ("accelerate_diffusers", "timing"):
        sys.modules.pop(name, None)


def run(module, monkeypatch, folder, *arguments):
    arguments = ("--devices", "cpu", "--quick", "--models", "SD", "--rounds", "2", "--out", str(folder), *arguments)
    monkeypatch.setattr(sys, "argv", ["accelerate_diffusers.py", *arguments])
    module.main()


def test_every_case_is_written_as_soon_as_it_is_measured(benchmark_module, monkeypatch, tmp_path):
    measured = []

    def measure_peaks(name, case):
        measured.append(case[3])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {f"{candidate} MB": 1.0 for candidate in benchmark_module.CANDIDATES}

    monkeypatch.setattr(benchmark_module, "measure_peaks", measure_peaks)
    with pytest.raises(KeyboardInterrupt):
        run(benchmark_module, monkeypatch, tmp_path)
    (row,) = json.loads((tmp_path / "accelerate_diffusers.json").read_text())["rows"]
    assert measured == ["nchw", "nhwc"] and row["layout"] == "nchw"
    assert 0 < row["error"] < 1e-4
    for candidate, ratio in (("diffusers", "ratio"), ("compiled", "compiled ratio")):
        assert row[ratio] == pytest.approx(row[f"{candidate} ms"] / row["accelerated ms"], rel=0.8)


def test_candidates(benchmark_module):
    model = benchmark_module.build_model("SD", benchmark_module.QUICK)
    found = {}
    for candidate in benchmark_module.CANDIDATES:
        benchmark_module.prepare(model, candidate)
        package = type(model.decoder.mid_block.resnets[0]).__module__.split(".")[0]
        found[candidate] = package, model.decoder._compiled_call_impl is not None
    expected = {"diffusers": ("diffusers", False), "compiled": ("diffusers", True), "accelerated": ("movq_ext", False)}
    assert found == expected


def test_compile_only_writes_nothing(benchmark_module, monkeypatch, tmp_path):
    run(benchmark_module, monkeypatch, tmp_path, "--compile-only")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("accelerated_ms, warm_up", [(1400.0, True), (1500.0, False)])
def test_turns_start_with_an_untimed_decode_if_one_is_short(benchmark_module, monkeypatch, accelerated_ms, warm_up):
    """Those of all candidates: the others take 2 s."""
    calls, model = [], benchmark_module.build_model("SD", benchmark_module.QUICK)

    def milliseconds(run, *args, warm_up, **kwargs):
        is_accelerated = type(model.decoder).__module__.startswith("movq_ext")
        calls.append((is_accelerated, warm_up))
        return accelerated_ms if is_accelerated else 2000.0

    monkeypatch.setattr(benchmark_module, "milliseconds", milliseconds)
    with torch.no_grad():
        row = benchmark_module.measure(model, benchmark_module.latents(model, 32), rounds=2)
    accelerated = [name == "accelerated" for name in benchmark_module.CANDIDATES]
    assert calls == [(ours, False) for ours in accelerated] + 2 * [(ours, warm_up) for ours in accelerated]
    assert row["ratio"] == pytest.approx(2000 / accelerated_ms)
