"""benchmarks/spatial_norm.py at tiny sizes on a CPU: its peers compute the published formula, and it writes its table."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import movq_ext

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("spatial_norm")
    yield module
    for name in ("spatial_norm", "timing"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_peers_compute_the_published_formula(benchmark_module, layout):
    torch.manual_seed(0)
    norm = movq_ext.SpatialNorm(64, 4, num_groups=32, eps=1e-6)
    f = torch.randn(1, 64, 8, 16).to(memory_format=layout).requires_grad_()
    zq = torch.randn(1, 4, 2, 4).requires_grad_()
    peers = benchmark_module.peers(norm, 64, compiled=False)
    assert set(peers) == set(benchmark_module.LAYERS)
    expected = benchmark_module.published(norm, f, zq)
    for name, layer in peers.items():
        if layer is not None:
            torch.testing.assert_close(
                layer(f, zq), expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_the_operator_alone_does_not_differentiate_the_convolutions(benchmark_module):
    norm = movq_ext.SpatialNorm(64, 4, num_groups=32, eps=1e-6)
    f, zq = torch.randn(1, 64, 8, 16, requires_grad=True), torch.randn(1, 4, 2, 4, requires_grad=True)
    operator = benchmark_module.OperatorAlone(norm)
    out = operator(f, zq)
    grads = torch.autograd.grad(out.sum(), (*operator.inputs(f), zq), allow_unused=True)
    assert [None if grad is None else grad.shape[1] for grad in grads] == [64, 64, 64, None]


def test_the_script_writes_a_row_for_each_case(tmp_path):
    command = [sys.executable, FOLDER / "spatial_norm.py", "--quick", "--device", "cpu", "--minutes", "0", "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}  # conftest sets PYTHONSAFEPATH, which hides a script's folder
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "spatial_norm.json").read_text())["rows"]
    assert len(rows) == 16
    assert {"op ms", "compile reformulated ms", "x compile reformulated"} <= rows[0].keys()
