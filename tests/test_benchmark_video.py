"""The video benchmark runs from end to end on a small model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "video.py"


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
