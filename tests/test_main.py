"""`python -m movq_ext` and the console script `movq-ext` in separate processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

MODULE = [sys.executable, "-P", "-m", "movq_ext"]
SCRIPT = [str(Path(sys.executable).with_name("movq-ext"))]
commands = pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["module", "script"])


@commands
def test_as_a_program(tmp_path, command):
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "photo.png")
    demo = [*command, "demo", tmp_path / "out", "--device", "cpu", "--photo", tmp_path / "photo.png"]
    run = subprocess.run(demo, capture_output=True, text=True)
    assert run.returncode == 0 and "PSNR" in run.stdout and run.stderr == ""


@commands
def test_both_print_the_same_name(command):
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.startswith("usage: movq-ext [-h] ")


@commands
def test_exit_status(command):
    run = subprocess.run([*command, "info", "--model", "missing"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "") and run.stderr == "error: no such file or folder: missing\n"
