"""Damaged and forged files: fuzz.py reads them in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def fuzz(cases):
    """Run cases of every reader in a fresh process, so that its peak memory is that of the cases. Return the report."""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}  # conftest.py sets PYTHONSAFEPATH
    command = [sys.executable, "-m", "attacks.fuzz", "--cases", str(cases)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60 + cases)
    assert run.returncode == 0, run.stderr[-3000:] + run.stdout
    return json.loads(run.stdout)


def test_fuzz():
    outcomes = fuzz(cases=75)["outcomes"]
    for reader, error in [
        ("weights", "CheckpointError"),
        ("codes", "CodeFileError"),
        ("images", "ImageError"),
        ("shards", "ShardError"),
    ]:
        assert {outcome.split()[1] for outcome in outcomes[reader]} >= {"read", error}, reader


@pytest.mark.long
def test_fuzz_long():
    fuzz(cases=10_000)
