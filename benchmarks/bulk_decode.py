"""Compare bulk decoding in one process with Ray's workers, on this machine.

    python benchmarks/bulk_decode.py --out benchmarks/results/bulk_cpu

Decodes Parquet shards of random codes with the shipped model, to 256x256 images. "images/s" leaves out the start of Ray and the
model: it divides the images by the workers' mean time. "images/s of the command" counts the whole command. "ratio" is relative
to the first row. The engines run in turns; each number is the median of the rounds.
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
from movq_ext.demo import SMALL_MODEL_PATH

CODES = 16384  # in the shipped model's codebook
GRID = (32, 32)  # 256x256 pixels


def make_shards(folder: Path, shards: int, images: int) -> None:
    """Write Parquet shards of random codes."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for i in range(shards):
        rows = generator.integers(0, CODES, (images, GRID[0] * GRID[1])).tolist()
        pq.write_table(pa.table({"codes": rows}), folder / f"{i:04}.parquet")


def measure(source: Path, out: Path, threads: int, workers: int) -> tuple[float, float]:
    """Return images per second without and with the start of the command. Zero workers decode in this process."""
    shards, start = find_shards([source], out), time.perf_counter()
    settings = Settings(SMALL_MODEL_PATH, "cpu", threads=threads)
    reports = list((run_with_ray if workers else run_in_process)(shards, settings, lambda images: None))
    wall, images = time.perf_counter() - start, sum(report.decoded for report in reports)
    assert not any(report.error or report.rejected for report in reports)
    return images / (sum(report.seconds for report in reports) / max(1, workers)), images / wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--images", type=int, default=40, help="per shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bulk_cpu"), help="folder")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    engines = [("one process", cores, 0), ("Ray", cores, 1), ("Ray", 1, cores)]
    found: dict[Any, list[tuple[float, float]]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder) / "codes", options.shards, options.images)
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
    title = f"Decoding {options.shards} shards of {options.images} images of 256x256"
    write(options.out, "bulk", title, environment(torch.device("cpu")), rows)


if __name__ == "__main__":
    main()
