"""An interrupted .ci/run ends its test runs at once and prints what they have written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CI_RUN = Path(__file__).resolve().parents[1] / ".ci/run"
COMMAND = "echo output with MOVQ_EXT_CUDA=$MOVQ_EXT_CUDA; touch $STARTED/$MOVQ_EXT_CUDA; ${THEN:-sleep 60}"
CASES = {"compiled": (1, ["2.12.1"], {"1"}), "native": (1, [], {"0"}), "both": (2, [], {"0", "1"})}

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("git"), reason="needs Linux and git")


def write_script(path, body):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path):
    """A repository with .ci/run, whose test command takes a minute."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README.md").write_text(f"<!-- test command -->\n```\n{COMMAND}\n```\n")
    write_script(folder / ".ci/run", CI_RUN.read_text().partition("\n")[2])
    for name in ("lint", "docs"):
        write_script(folder / ".ci" / name, "true")
    (folder / ".ci/pins").write_text("setuptools==80.0\n")
    git = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "test"]):
        subprocess.run([*git, *arguments], check=True)
    return folder


def start(repository, cores, arguments, **environment):
    """Start .ci/run on a machine of so many cores with nvcc; return the process, and a folder with a file per started leg."""
    bin_folder, started = repository.parent / "bin", repository.parent / "started"
    started.mkdir()
    write_script(bin_folder / "nproc", f"echo {cores}")
    write_script(bin_folder / "nvcc", "true")
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "STARTED": str(started), **environment}
    # Background jobs of a shell ignore SIGINT, and pass that on to their children.
    process = subprocess.Popen([repository / ".ci/run", *arguments], env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    return process, started


@pytest.mark.parametrize("signal_number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("cores, arguments, legs", CASES.values(), ids=CASES)
def test_an_interrupt_ends_every_leg_and_prints_its_output(repository, signal_number, status, cores, arguments, legs):
    process, started = start(repository, cores, arguments)
    try:
        end = time.monotonic() + 30
        while {path.name for path in started.iterdir()} != legs:
            assert process.poll() is None and time.monotonic() < end, "the legs have not started"
            time.sleep(0.05)
        process.send_signal(signal_number)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == status
    for leg in legs:
        assert output.count(f"output with MOVQ_EXT_CUDA={leg}\n") == 1


@pytest.mark.parametrize("cores, arguments, legs", CASES.values(), ids=CASES)
def test_a_failed_leg_fails_the_run(repository, cores, arguments, legs):
    process, started = start(repository, cores, arguments, THEN="false")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert {path.name for path in started.iterdir()} == legs
    for leg in legs:
        assert output.count(f"output with MOVQ_EXT_CUDA={leg}\n") == 1
