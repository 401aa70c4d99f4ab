"""Decoding many codes: Ray's workers against one process, on this machine.

    python benchmarks/bulk_decode.py --out benchmarks/results/bulk_cpu

Random codes for the shipped model (256x256 pictures) in Parquet shards. "images/s" is of the work alone: pictures by the mean
of the workers' seconds; "of the command" counts Ray's and the model's start too. "ratio" is to the first line's. The engines
take turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from timing import environment, write

from movq_ext.bulk.batches import Settings
from movq_ext.bulk.find import find_shards
from movq_ext.bulk.ray_engine import run_with_ray
from movq_ext.bulk.run import run_in_process
from movq_ext.demo import SMALL_MODEL

CODES = 16384
GRID = (32, 32)


def make_shards(folder: Path, shards: int, pictures: int) -> None:
    codes = np.random.default_rng(0)
    folder.mkdir()
    for i in range(shards):
        rows = codes.integers(0, CODES, (pictures, GRID[0] * GRID[1])).tolist()
        pq.write_table(pa.table({"codes": rows}), folder / f"{i:04}.parquet")


def measure(source: Path, out: Path, threads: int, workers: int) -> tuple[float, float]:
    """Pictures a second: of the work, of the whole command. No workers: in this process."""
    shards, start = find_shards([source], out), time.perf_counter()
    settings = Settings(SMALL_MODEL, "cpu", threads=threads)
    reports = list((run_with_ray if workers else run_in_process)(shards, settings, lambda pictures: None))
    wall, pictures = time.perf_counter() - start, sum(report.decoded for report in reports)
    assert not any(report.error or report.rejected for report in reports)
    return pictures / (sum(report.seconds for report in reports) / max(1, workers)), pictures / wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--pictures", type=int, default=40, help="in a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bulk_cpu"), help="folder")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    engines = [("one process", cores, 0), ("Ray", cores, 1), ("Ray", 1, cores)]
    found: dict[Any, list[tuple[float, float]]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder) / "codes", options.shards, options.pictures)
        for turn in range(options.rounds):
            for i, (engine, threads, workers) in enumerate(engines):
                out = Path(folder) / f"{turn}-{i}"
                found[engine, threads, workers].append(measure(Path(folder) / "codes", out, threads, workers))
    rows = []
    for (engine, threads, workers), rates in found.items():
        work, command = (median(column) for column in zip(*rates, strict=True))
        first = rows[0]["images/s"] if rows else work
        rows.append({"engine": engine, "workers": workers or 1, "threads of each": threads, "images/s": work,
                     "ratio": work / first, "images/s of the command": command})  # fmt: skip
    title = f"Decoding {options.shards} shards of {options.pictures} pictures of 256x256"
    write(options.out, "bulk", title, environment(torch.device("cpu")), rows)


if __name__ == "__main__":
    main()
