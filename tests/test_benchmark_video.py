"""The video benchmark runs from end to end on a small model."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "video.py"


@torch.no_grad()
def test_the_share_of_the_norms_has_the_same_parts_on_both_sides(monkeypatch):
    """Convolutions of the latent belong to the norms: a clock that only they advance gives a share of 1."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    video = importlib.import_module("video")
    model, clock = video.build_model(True, "cpu", "float32"), [0.0]
    convolutions = [conv for name, conv in model.decoder.named_modules() if name.endswith(("conv_y.conv", "conv_b.conv"))]
    kind, forward = type(convolutions[0]), nn.Conv3d.forward

    def advance_clock(conv, x):
        clock[0] += any(conv is other for other in convolutions)
        return forward(conv, x)

    monkeypatch.setattr(kind, "forward", advance_clock)
    monkeypatch.setattr(video, "_now", lambda device: clock[0])
    z = video.latents(model, 5, 16, 16)
    for candidate in ("diffusers", "movq_ext"):
        assert video.measure(video.prepare(model, candidate, z), z.device, by_part=True)["norms"] == 1
        assert clock[0] >= len(convolutions) > 0
        clock[0] = 0.0
    for name in ("video", "timing"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_it_compares_the_candidates(tmp_path):
    options = ["--quick", "--device", "cpu", "--frames", "5", "--rounds", "1", "--candidates", "movq_ext"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}  # conftest sets PYTHONSAFEPATH, which hides a script's folder
    run = subprocess.run([sys.executable, SCRIPT, *options, "--out", tmp_path], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "video.json").read_text())["rows"]
    assert [row["candidate"] for row in rows] == ["diffusers", "movq_ext"]
    assert all(row["ms"] > 0 and row["MB"] >= 0 and 0 < row["norms"] < 1 and row["error"] < 1e-4 for row in rows)
    assert rows[0]["ratio"] == 1 and rows[0]["error"] == 0
    assert (tmp_path / "video.md").read_text().startswith("# Decodes of AutoencoderKLCogVideoX")
