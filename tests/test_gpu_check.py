"""benchmarks/gpu_check.sh: each of its two calls on a GPU fits the ten minutes of a short lease."""

import re
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/gpu_check.sh"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
LIMIT_SECONDS = 600


def limits():
    """Return the time limit of each step by mode: rehearse, sanitize or check."""
    text = SCRIPT.read_text()
    parts = re.split(r"^(?:if|elif|else)\b.*$", text[text.index("if [ $mode = rehearse ]") :], flags=re.MULTILINE)[1:]
    assert len(parts) == 3, "expected one branch per mode"
    steps = [dict(re.findall(r'\bstep "?\$?(\w+)"? (\d+)', part)) for part in parts]
    return {mode: {name: int(seconds) for name, seconds in found.items()} for mode, found in zip(MODES, steps, strict=True)}


MODES = ("rehearse", "sanitize", "check")


def test_each_call_fits_its_lease():
    steps = limits()
    assert sum(steps["check"].values()) < LIMIT_SECONDS, steps["check"]
    build, each = steps["sanitize"]["build_sanitize"], steps["sanitize"]["tool"]
    assert f"for tool in {' '.join(SANITIZERS)}" in SCRIPT.read_text()
    assert each >= 90, "a sanitizer starts torch first, which alone takes 15 s or more"
    assert build + len(SANITIZERS) * each < LIMIT_SECONDS


def test_an_unknown_option_is_an_error(tmp_path):
    result = subprocess.run(["bash", SCRIPT, "--sanitise", tmp_path], capture_output=True, text=True)
    assert result.returncode == 2
    assert "expected --sanitize, --rehearse or a folder, got --sanitise" in result.stderr
