"""Commands that are killed, or whose disk is full, at every call that changes a file. inject.py runs them in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attacks.commands import COMMANDS
from attacks.faults import SUPPORTED

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="needs Linux and g++")


def inject(*arguments, seconds):
    """Return the number of faults by command. Fails if a command did not survive one of them."""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}  # conftest.py sets PYTHONSAFEPATH
    command = [sys.executable, "-m", "attacks.inject", *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
    if "cannot install a seccomp filter" in run.stderr:
        pytest.skip("the kernel or the container does not allow seccomp filters")
    report = json.loads(run.stdout[run.stdout.index("{\n") :]) if "{\n" in run.stdout else {}
    failures = [f"{name}: {failure}" for name, command in report.items() for failure in command["failures"]]
    assert run.returncode == 0 and not failures, "\n".join(failures) or run.stderr[-3000:]
    return {name: command["faults"] for name, command in report.items()}


@pytest.mark.parametrize("commands", [("encode", "encode-shards"), ("decode", "decode-tar", "decode-npz"), ("train",), ("save",)],
                         ids=["encode", "decode", "train", "save_pretrained"])  # fmt: skip
def test_faults(commands):
    faults = inject(*commands, seconds=600)
    assert faults.keys() == {*commands} and min(faults.values()) >= 30  # two at every call


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_faults_long(command):
    inject(command, "--all", seconds=3600)
