"""Disturb a command at every call that changes a file, and check what it leaves behind.

For every such call, the command runs with SIGKILL at the call and with a full disk from the call on. Afterwards, every file has
its old contents or complete new ones. An error has a message that names a file. Running the command again gives exactly the files
of a run that nothing disturbed: no partial or lock file is left over.

    cd tests
    python -m attacks.inject                       # all commands
    python -m attacks.inject encode train --all    # at every write of a file, not only the first and last; more kinds of faults
"""

import argparse
import errno
import fnmatch
import gc
import itertools
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from attacks.cases import split_header
from attacks.commands import COMMANDS, write_inputs
from attacks.faults import FAIL, FULL, KILL, Fault, build, run_with_fault
from movq_ext import from_pretrained
from movq_ext.io.codes import CodeFile
from movq_ext.training.checkpoint import read_checkpoint


def snapshot(folder):
    """Return the contents of all files by relative path. Equal contents compare equal, whatever order their writer chose."""
    return {path.relative_to(folder).as_posix(): contents(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def contents(path):
    data = path.read_bytes()
    if path.name.startswith("."):
        return data
    if path.suffix == ".safetensors":
        return split_header(data)
    if path.suffix == ".pt":
        return flatten(torch.load(path, weights_only=True))
    return data


def flatten(value, name=""):
    """Return the leaves of nested dictionaries and lists by name; tensors as bytes."""
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in flatten(inner, f"{name}.{part}").items()}
    if isinstance(value, (list, tuple)):
        return flatten(dict(enumerate(value)), name)
    return {name: (str(value.dtype), value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value}


def check_complete(path):
    """Check that a file can be read."""
    if path.name == "training.pt":
        read_checkpoint(path, "cpu")
    elif path.name == "model.safetensors":
        from_pretrained(path)
    elif path.suffix == ".safetensors":
        CodeFile.load(path)


def check_synced(calls):
    """Check that the contents of files reach the disk before their names: a crash of the machine must not leave empty files."""
    relevant = [call for call in calls if call[0] != "chmod"]
    for before, (name, path) in itertools.pairwise(relevant):
        assert name != "rename" or before[0] == "sync", f"{path} gets its name before its contents are synced"


class Attack:
    """One command and the files of a run that nothing disturbs.

    Args:
        command: the command.
        folder: a folder for its runs.
        library: see faults.build.
    """

    def __init__(self, command, folder, library):
        self.command, self.folder, self.library = command, folder, library
        folder.mkdir()
        self.prepared, out = folder / "prepared", folder / "undisturbed"
        command.prepare(self.prepared)
        self.before = snapshot(self.prepared)
        self.calls = self.run(out, Fault()).calls
        check_synced(self.calls)
        self.after = snapshot(out)
        self.result = command.result(self.after, out)

    def run(self, out, fault):
        if not out.exists():
            shutil.copytree(self.prepared, out)
        run = run_with_fault(self.library, lambda: self.command.run(out), out, fault)
        if fault.kind == 0:
            assert run.status == self.command.status and "Traceback" not in run.output, f"status {run.status}: {run.output}"
            assert run.status or "error" not in run.output, run.output
            self.command.check_report(run.output)
        return run

    def faults(self, everything):
        """Return the faults to run the command with."""
        chosen = []
        for _, group in itertools.groupby(enumerate(self.calls, 1), lambda call: call[1]):
            group = list(group)  # consecutive writes to one file
            chosen += group if everything else [group[0], group[-1]][: len(group)]
        for at, (name, _) in chosen:
            yield Fault(KILL, at)
            yield Fault(FULL, at, half=True, error=errno.ENOSPC)
            if everything:
                yield Fault(FAIL, at, error=errno.EIO)
            if everything and name == "write":
                yield Fault(KILL, at, half=True)

    def check(self, fault):
        """Run the command with a fault, and then without. Raises AssertionError if something is wrong."""
        out = self.folder / f"{fault.kind}-{fault.at}-{fault.half}"
        run = self.run(out, fault)
        if fault.kind == KILL:
            assert run.status == -9, f"status {run.status}: {run.output}"
        elif run.status == self.command.status and self.is_complete(out):
            pass  # nothing that a user would miss
        else:
            errors = [line for line in run.output.splitlines() if "error: " in line]
            assert run.status in (1, 2) and errors and "Traceback" not in run.output, f"status {run.status}: {run.output}"
            assert any(str(self.folder) in line for line in errors), f"no error names a file: {errors}"
        self.check_intact(out)
        self.run(out, Fault())
        assert self.is_complete(out), f"after another run, {self.differences(out)}"
        shutil.rmtree(out)

    def check_intact(self, out):
        for path in self.before:
            assert (out / path).exists(), f"{path} is lost"
        for path in out.rglob("*"):
            name = path.relative_to(out).as_posix()
            if not path.is_file() or path.name.startswith("."):
                continue
            if any(fnmatch.fnmatch(name, pattern) for pattern in self.command.changing):
                check_complete(path)
            else:
                assert contents(path) in (self.before.get(name), self.after.get(name)), f"{name} is damaged"

    def is_complete(self, out):
        return self.command.result(snapshot(out), out) == self.result

    def differences(self, out):
        found = snapshot(out)
        differ = [name for name in found.keys() & self.after.keys() if found[name] != self.after[name]]
        return f"missing {self.after.keys() - found.keys()}, too many {found.keys() - self.after.keys()}, different {differ}"


def attack(command, folder, library, everything):
    """Attack a command, on all CPUs. Return (number of faults, failures)."""
    attack = Attack(command, folder, library)
    faults, running, failures = list(attack.faults(everything)), {}, []

    def wait():
        process, status = os.wait()
        fault, report = running.pop(process)
        if status:
            failures.append(f"{fault} {attack.calls[fault.at - 1]}: {report.read_text()}")

    for number, fault in enumerate(faults):
        if len(running) == len(os.sched_getaffinity(0)):
            wait()
        report = folder / f"report-{number}"
        process = os.fork()
        if process == 0:
            status = 1
            try:
                attack.check(fault)
                status = 0
            except BaseException as error:
                text = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
                report.write_text(text)
            finally:
                os._exit(status)
        running[process] = fault, report
    while running:
        wait()
    return len(faults), failures


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("commands", nargs="*", metavar="command", help=f"one or more of {', '.join(COMMANDS)}; by default all")
    options.add_argument("--all", action="store_true", help="every write, and more kinds of faults")
    args = options.parse_args()
    if unknown := {*args.commands} - {*COMMANDS}:
        options.error(f"expected commands among {', '.join(COMMANDS)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)  # forked processes have no other threads
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        library = build(folder)
        write_inputs(folder / "inputs")
        gc.freeze()  # a collection in a forked process would copy the pages of all objects
        for name in args.commands or COMMANDS:
            faults, failures = attack(COMMANDS[name](folder / "inputs"), folder / name, library, args.all)
            report[name] = {"faults": faults, "failures": failures}
            print(f"{name}: {faults} faults, {len(failures)} failures", file=sys.stderr)
    print(json.dumps(report, indent=1))
    return 1 if any(command["failures"] for command in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
