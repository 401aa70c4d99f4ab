"""Run a function in a forked process that dies, or fails, at one of its system calls that change files. See faults.cpp."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

CXX = os.environ.get("CXX", "g++")
SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") and shutil.which(CXX) is not None
NONE, KILL, FAIL, FULL = range(4)  # as in faults.cpp


class Fault(NamedTuple):
    """What happens at the n-th call. The first is number 1.

    Args:
        kind: KILL ends the process, FAIL makes the call fail, and FULL makes it and all later calls that take space fail.
        at: n.
        half: if the call is a write, its first half happens.
        error: the error number of the calls that fail.
    """

    kind: int = NONE
    at: int = 0
    half: bool = False
    error: int = 0

    def __str__(self):
        what = "SIGKILL" if self.kind == KILL else os.strerror(self.error)
        return f"{what}{' halfway' * self.half} at call {self.at}{' and later' * (self.kind == FULL)}"


class Run(NamedTuple):
    """What a function did.

    Args:
        status: the exit status that it returned, or the negative number of the signal that killed it.
        output: what it wrote to stdout and stderr.
        calls: (name, path relative to the folder) of every call that changed a file below the folder.
    """

    status: int
    output: str
    calls: list[tuple[str, str]]


def build(folder):
    """Compile faults.cpp. Return the library."""
    library = folder / "faults.so"
    source = Path(__file__).with_suffix(".cpp")
    subprocess.run([CXX, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-o", library, source], check=True)
    return library


def run_with_fault(library, function, folder, fault):
    """Call function() in a forked process with a fault below the folder. The folder need not exist; its parent must."""
    output, log = (folder.with_name(f"{folder.name}.{kind}") for kind in ("output", "calls"))
    process = os.fork()
    if process == 0:
        _run_and_exit(library, function, folder, fault, output, log)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    calls = [line.split(" ", 1) for line in log.read_text().splitlines()]
    return Run(status, output.read_text(), [(name, os.path.relpath(path, folder)) for name, path in calls])


def _run_and_exit(library, function, folder, fault, output, log):
    status = 99
    try:
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND
        file, calls = os.open(output, flags), os.open(log, flags)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ["LD_PRELOAD"] = str(library)  # for programs that it starts
        if problem := ctypes.CDLL(str(library)).arm(os.fsencode(folder), fault.kind, fault.at, fault.half, fault.error, calls):
            raise OSError(problem, f"cannot install a seccomp filter: {os.strerror(problem)}")
        status = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
