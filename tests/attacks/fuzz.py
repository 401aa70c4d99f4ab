"""Feed damaged and hostile files to the readers. A case passes if its file is read correctly or refused with a documented error,
in bounded time and memory, and without running code from the file.

    cd tests
    python -m attacks.fuzz                                         # 1000 cases per reader: seeds 0 to 999
    python -m attacks.fuzz codes images --cases 10000              # of some readers
    python -m attacks.fuzz codes --first 1234 --cases 1            # repeat one
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from PIL import Image

from attacks.codes import CodeFileCases
from attacks.images import ImageCases
from attacks.shards import ShardCases
from attacks.weights import WeightCases
from movq_ext.bulk.parquet_reader import CHILD

READERS = {"weights": WeightCases, "codes": CodeFileCases, "images": ImageCases, "shards": ShardCases}

MAX_SECONDS = 10  # per case
MAX_MEMORY = 256 << 20  # bytes that all cases together may add to the peak of the process
MAX_PIXELS = 1 << 20  # of an image; Pillow refuses twice as many


class Hang(BaseException):
    pass


class Watch:
    """Interrupt a case that takes too long, and fail one that does something only code from a file would do."""

    events = None  # of the case in progress, seen by the audit hook

    def __init__(self, trace):
        self.trace = trace

    def __enter__(self):
        Watch.events = []
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)

    def __exit__(self, kind, error, traceback):
        signal.setitimer(signal.ITIMER_REAL, 0)
        events, Watch.events = Watch.events, None
        assert not events, f"did {events}"
        assert not os.path.exists(self.trace), "ran code"

    @staticmethod
    def audit(event, arguments):
        if Watch.events is None:
            return
        writes = (
            event == "open"
            and isinstance(arguments[1], str)
            and set(arguments[1]) & set("wax+")
            and "/case/" in str(arguments[0])
        )
        starts = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.remove")
        reads_parquet = event == "subprocess.Popen" and str(CHILD) in arguments[1]
        if writes or (event in starts and not reads_parquet):
            Watch.events.append(event)


def raise_hang(*_):
    raise Hang(f"took more than {MAX_SECONDS} s")


def run(cases, seed):
    """Run a case and return its kind and outcome. Raises AssertionError if it fails."""
    folder = cases.folder / "case"
    folder.mkdir()
    try:
        kind, read, allowed = cases.create(seed, folder)
        with Watch(cases.trace):
            try:
                read()
                outcome = "read"
            except allowed as error:
                assert str(error).strip(), "an error without a message"
                assert len(str(error)) < 4000, "an error of more than 4000 characters"
                outcome = type(error).__name__
        return kind, outcome
    finally:
        shutil.rmtree(folder)


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_cases(folder):
    """Return the cases of every reader, by name."""
    cases = {name: create(folder / name) for name, create in READERS.items()}
    files = {f"{name}/{file}": data for name, case in cases.items() for file, data in case.intact.items()}
    for case in cases.values():
        case.others = files
    return cases


def warm_up(cases):
    """Read intact files: what every reader allocates once does not count."""
    for case in cases.values():
        for name in case.intact:
            read, allowed = case.reading(case.folder / "intact" / name)
            with contextlib.suppress(allowed):  # config.json is only read along with weights
                read()


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("readers", nargs="*", metavar="reader", help=f"one or more of {', '.join(READERS)}; by default all")
    options.add_argument("--cases", type=int, default=1000, help="cases per reader")
    options.add_argument("--first", type=int, default=0, help="seed of the first case")
    args = options.parse_args()
    if unknown := {*args.readers} - {*READERS}:
        options.error(f"expected readers among {', '.join(READERS)}, got {', '.join(unknown)}")
    sys.addaudithook(Watch.audit)
    signal.signal(signal.SIGALRM, raise_hang)
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    torch.set_num_threads(1)
    failures, outcomes = 0, {name: collections.Counter() for name in args.readers or READERS}
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(Path(folder))
        warm_up(cases)
        before = top = peak_memory()
        for name, seed in itertools.product(outcomes, range(args.first, args.first + args.cases)):
            print(f"\r{name} {seed}", end="", file=sys.stderr, flush=True)  # stays visible after a crash
            try:
                outcomes[name][" ".join(run(cases[name], seed))] += 1
                grown, top = peak_memory() - top, max(top, peak_memory())
                message = f"took {grown >> 20} MiB more, {top - before >> 20} in all"
                assert grown < MAX_MEMORY // 2 and top - before < MAX_MEMORY, message
            except (Exception, Hang) as error:
                failures += 1
                chain = " from ".join(f"{type(e).__name__}: {str(e)[:300]}" for e in (error, error.__context__) if e)
                print(f"\r{name} {seed}: {chain}", file=sys.stderr)
    report = {"cases": args.cases, "failures": failures, "peak_mib": top - before >> 20, "outcomes": outcomes}
    print(json.dumps(report, indent=1, sort_keys=True))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
