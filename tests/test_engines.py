"""Ray Data and a run in one process agree on every input, and a local cluster of Ray is closed to other machines."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from shard_files import (
    AWAY_FROM_SOURCE,
    CODES,
    GRIDS,
    RAY_ENVIRONMENT,
    file_names,
    npy_bytes,
    size_columns,
    write_code_file,
    write_parquet,
    write_tar,
)

from movq_ext.cli import main


def write_every_format(model, folder):
    folder.mkdir(parents=True)
    write_parquet(folder / "a.parquet", **size_columns())
    write_tar(folder / "b.tar", [("0.npy", npy_bytes(GRIDS[0])), ("1.npy", npy_bytes(GRIDS[1]))])
    np.savez(folder / "c.npz", codes=np.stack([GRIDS[0], GRIDS[2]]))
    write_code_file(model, folder / "d.safetensors")


def write_hub_cache(model, folder):
    """Links to blobs without a suffix, as huggingface_hub lays out its cache; several to one blob."""
    folder.mkdir()
    write_every_format(model, folder / ".blobs")
    for i, blob in enumerate(sorted((folder / ".blobs").iterdir())):
        for copy in range(5 if blob.suffix == ".tar" else 1):
            (folder / f"{blob.stem}{copy}{blob.suffix}").symlink_to(f".blobs/{i}")
        blob.rename(blob.with_name(str(i)))


def write_linked_folder(model, folder):
    write_every_format(model, folder.with_name(f".{folder.name}"))
    folder.symlink_to(f".{folder.name}")


def write_unreadable(model, folder):
    folder.mkdir()
    (folder / "loop.parquet").symlink_to("loop.parquet")
    (folder / "dangling.tar").symlink_to("nothing")
    (folder / "closed.npz").touch(mode=0)


def write_damaged(model, folder):
    write_every_format(model, folder)
    for path in list(folder.iterdir()):
        path.write_bytes(path.read_bytes()[:-700])


def write_bad_samples(model, folder):
    write_parquet(folder / "a.parquet", pa.array([[1], [CODES], [-1]]))
    np.savez(folder / "b.npz", good=np.zeros((2, 2), int), bad=np.full((2, 2), CODES), **{"../out": np.zeros((1, 1), int)})


def write_unusual_names(model, folder):
    folder.mkdir()
    for name in ("a b", "a\nb", "\u00e9", "x.y", os.fsdecode(b"\xff")):
        with open(folder / f"{name}.npz", "wb") as file:
            np.savez(file, codes=np.zeros((1, 1, 1), int))


def write_empty(model, folder):
    write_parquet(folder / "a.parquet", pa.array([], pa.list_(pa.int64())))
    write_tar(folder / "b.tar", [])


INPUTS = {
    "every format": write_every_format,
    "nested/folders": write_every_format,
    "hub cache": write_hub_cache,
    "linked folder": write_linked_folder,
    "unreadable": write_unreadable,
    "damaged": write_damaged,
    "bad samples": write_bad_samples,
    "unusual names": write_unusual_names,
    "empty": write_empty,
    "taken": write_every_format,  # the outputs are folders
}

DECODE_TWICE = """
import contextlib, glob, io, json, os, sys
from movq_ext.bulk import ray_engine
from movq_ext.cli import main

def decode(source, out, model, engine):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()) as errors:
        options = ["--model", model, "--device", "cpu", "--threads", "1", "--engine", engine]
        return [main(["decode", source, "-o", f"{out}/{engine}", *options]), text.getvalue(), errors.getvalue()]

def listening():
    descendants, parents, inodes = set(), {}, set()
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as file:
            pid, _, rest = file.read().partition(" ")
            parents[int(pid)] = int(rest.rpartition(")")[2].split()[1])
    for pid in parents:
        ancestors = [pid]
        while ancestors[-1] in parents:
            ancestors.append(parents[ancestors[-1]])
        if os.getpid() in ancestors:
            descendants.add(pid)
    for pid in descendants:
        for link in glob.glob(f"/proc/{pid}/fd/*"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link))
    rows = [line.split() for kind in ("tcp", "tcp6") for line in list(open(f"/proc/net/{kind}"))[1:]]
    return len(descendants), [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]

ray = ray_engine._import_ray()
ray.shutdown = lambda: None  # start one cluster for both runs
results = {engine: [decode(*sys.argv[1:], engine) for _ in range(2)] for engine in ("process", "ray")}
print(json.dumps({**results, "listening": listening()}))
"""


@pytest.fixture(scope="module")
def decoded(model, model_folder, tmp_path_factory):
    """Decode all inputs with both engines, twice. Return the folder of the outputs and what the commands printed."""
    folder = tmp_path_factory.mktemp("engines")
    for name, write in INPUTS.items():
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write(model, folder / "in" / name)
    for engine in ("process", "ray"):
        for output in ("a.parquet", "b.tar"):
            (folder / engine / "taken" / output).mkdir(parents=True)
    command = [sys.executable, "-P", "-c", DECODE_TWICE, folder / "in", folder, model_folder]
    env = {**os.environ, **RAY_ENVIRONMENT}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, cwd=AWAY_FROM_SOURCE)
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout.splitlines()[-1])


def without_engine(text):
    """Replace what must differ between two runs: the output folder and the random names of partial files."""
    return re.sub(r"\.[0-9a-f]{16}\.", ".RANDOM.", re.sub("/engines0/(process|ray)/", "/engines0/ENGINE/", text))


def errors_of(text, name):
    """Return the errors of an input that a command printed. Shards finish in any order."""
    return sorted(line for line in re.findall(r"error: (.*)", without_engine(text)) if f"/in/{name}/" in line)


@pytest.mark.parametrize("name", INPUTS)
def test_both_engines_agree(decoded, name):
    folder, printed = decoded
    outputs = []
    for engine in ("process", "ray"):
        files = {file: folder / engine / name / file for file in file_names(folder / engine / name)}
        contents = {without_engine(file): path.read_bytes().decode("latin-1") for file, path in files.items()}
        outputs.append({file: without_engine(text) for file, text in contents.items()})
    assert outputs[0] == outputs[1]
    for first, second in zip(printed["process"], printed["ray"], strict=True):
        assert errors_of(first[2], name) == errors_of(second[2], name)


def test_both_engines_print_the_same_summary(decoded):
    _, printed = decoded
    for first, second in zip(printed["process"], printed["ray"], strict=True):
        assert first[0] == second[0] == 1
        assert first[1].splitlines()[:2] == second[1].splitlines()[:2]
    assert printed["ray"][0][1].splitlines()[2].endswith(", Ray")


def test_links_to_blobs_are_decoded(decoded):
    """By the name of the link: the blob has no suffix."""
    folder, printed = decoded
    assert errors_of(printed["ray"][0][2], "hub cache") == []
    outputs = {"a0.parquet", *(f"b{i}.tar" for i in range(5)), "c0", "d0"}
    assert {path.name for path in (folder / "ray/hub cache").iterdir()} == outputs


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="finds sockets in /proc")
def test_a_local_cluster_listens_on_the_loopback_interface(decoded):
    processes, addresses = decoded[1]["listening"]
    assert processes > 3 and len(addresses) > 3
    assert {address.rpartition(":")[0][-8:] for address in addresses} == {"0100007F"}  # 127.0.0.1, in little endian


def missing(folder):
    return [folder / "missing"]


def empty_folder(folder):
    (folder / "in").mkdir()
    return [folder / "in"]


def given_twice(folder):
    return [write_parquet(folder / "in/x.parquet")] * 2


def one_output_for_two(folder):
    for suffix in ("npz", "safetensors"):
        (folder / f"x.{suffix}").touch()
    return [folder]


@pytest.mark.parametrize("write", [missing, empty_folder, given_twice, one_output_for_two])
def test_both_engines_refuse(model_folder, tmp_path, capsys, write):
    (tmp_path / "files").mkdir()
    inputs, found = write(tmp_path / "files"), []
    for engine in ("process", "ray"):
        options = ["-o", tmp_path / "out", "--model", model_folder, "--device", "cpu", "--engine", engine]
        found.append((main(["decode", *map(str, [*inputs, *options])]), capsys.readouterr()))
    assert found[0] == found[1] and found[0][0] == 2 and found[0][1].err.startswith("error: ")
    assert not (tmp_path / "out").exists()
