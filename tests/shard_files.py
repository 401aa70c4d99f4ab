"""Write shards, decode them and read the results, for the tests of bulk decoding."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from models import SMALL_MOVQ
from PIL import Image

from movq_ext.cli import main
from movq_ext.io.codes import CodeFile, codebook_fingerprint, decode_image

CODES = SMALL_MOVQ["n_embed"]
CELL = 2  # pixels per code along each side
SIZES = [(8, 8), (7, 5), (8, 8), (1, 2), (16, 4), (7, 5)]  # (height, width) in pixels


def random_codes(size, seed=0):
    """Return a grid of codes for an image of size pixels."""
    shape = tuple(-(-side // CELL) for side in size)
    return np.random.default_rng(seed).integers(0, CODES, shape)


GRIDS = [random_codes(size, seed) for seed, size in enumerate(SIZES)]


def expected_pixels(model, i):
    """Return the image of GRIDS[i], decoded by itself."""
    return np.asarray(decode_image(model, torch.from_numpy(GRIDS[i]), SIZES[i]))


def png_pixels(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image)


def size_columns():
    return {"height": [size[0] for size in SIZES], "width": [size[1] for size in SIZES]}


def write_parquet(path, codes=None, **columns):
    """Write codes, by default GRIDS, and other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codes = pa.array([grid.tolist() for grid in GRIDS]) if codes is None else codes
    pq.write_table(pa.table({"codes": codes, **columns}), path, row_group_size=4)
    return path


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_tar(path, files):
    """Write (name, contents) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, contents in files:
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return path


def read_tar(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def write_code_file(model, path, extra=()):
    """Write GRIDS as 0.jpg, 1.jpg, ... and extra (name, codes, size) triples."""
    file = CodeFile(codebook_fingerprint(model))
    for i, size in enumerate(SIZES):
        file.add(f"{i}.jpg", torch.from_numpy(GRIDS[i]), size)
    for name, codes, size in extra:
        file.add(name, codes, size)
    file.save(path)
    return path


def read_rejects(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def file_names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def run_decode(model_folder, *arguments):
    """Run the decode command in this process; return its exit status."""
    return main(["decode", *map(str, arguments), "--model", str(model_folder), "--device", "cpu", "--engine", "process"])


# --- Runs in another process, which tests kill

RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}  # start a cluster even if one is running
# Ray's workers import from the current folder first, even with -P. It must not be the source folder.
AWAY_FROM_SOURCE = "/"
MANY_SHARDS, MANY_ROWS, MANY_SIDE = 5, 250, 24


def write_many_shards(folder):
    """Write MANY_SHARDS shards that take about a second each."""
    for i in range(MANY_SHARDS):
        codes = np.random.default_rng(i).integers(0, CODES, (MANY_ROWS, MANY_SIDE**2)).tolist()
        write_parquet(folder / f"{i}.parquet", pa.array(codes), name=[f"{i}-{row}" for row in range(MANY_ROWS)])
    return folder


def start_decode(model_folder, source, out, *more):
    """Start the decode command in another process. Its output goes to a log beside out."""
    command = [sys.executable, "-P", "-m", "movq_ext", "decode", source, "-o", out, "--model", model_folder, "--device", "cpu"]
    env = {**os.environ, **RAY_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [*command, "--threads", "1", *more],
            stdout=log,
            stderr=log,
            env=env,
            cwd=AWAY_FROM_SOURCE,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # children of a background job ignore SIGINT
        )


def wait_for_first_shard(process, out, seconds=120):
    """Wait until one shard is complete and another is being written."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if list(out.glob("*.parquet")) and list(out.glob(".*.partial")):
            return
        time.sleep(0.02)
    raise AssertionError(f"no shard was written: {out.with_suffix('.log').read_text()}")


def assert_every_image_once(out):
    assert file_names(out) == [f"{i}.parquet" for i in range(MANY_SHARDS)]
    found = [name for i in range(MANY_SHARDS) for name in pq.read_table(out / f"{i}.parquet")["name"].to_pylist()]
    assert found == [f"{i}-{row}" for i in range(MANY_SHARDS) for row in range(MANY_ROWS)]
