"""Workers of Ray Data, on a real cluster of this machine."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from shard_files import (
    AWAY_FROM_SOURCE,
    MANY_ROWS,
    MANY_SHARDS,
    RAY_ENVIRONMENT,
    assert_every_image_once,
    file_names,
    modification_times,
    size_columns,
    start_decode,
    wait_for_first_shard,
    write_many_shards,
    write_parquet,
)

from movq_ext.bulk.batches import Settings
from movq_ext.bulk.ray_engine import WorkerPlan, plan_workers
from movq_ext.cli import main


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    return write_many_shards(tmp_path_factory.mktemp("many"))


def find_workers(process, kind):
    """Return the ids of the Ray workers of a class that descend from a process."""
    parents, titles = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat, open(f"/proc/{entry}/cmdline") as title:
                    parents[int(entry)], titles[int(entry)] = int(stat.read().rpartition(")")[2].split()[1]), title.read()
            except OSError:  # it has exited
                continue

    def is_descendant(pid):
        while pid in parents and pid != process.pid:
            pid = parents[pid]
        return pid == process.pid

    return [pid for pid, title in titles.items() if title.startswith("ray::") and kind in title and is_descendant(pid)]


@pytest.mark.parametrize("victim", ["Worker", "Attempts"])
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="finds workers in /proc")
def test_a_killed_worker_is_replaced(model_folder, many_shards, tmp_path, victim):
    """Every image is decoded exactly once, and the run succeeds."""
    out = tmp_path / "out"
    process = start_decode(model_folder, many_shards, out, "--engine", "ray")
    wait_for_first_shard(process, out)
    workers = find_workers(process, victim)
    assert workers, out.with_suffix(".log").read_text()
    before = modification_times(out)
    os.kill(workers[0], signal.SIGKILL)
    log = out.with_suffix(".log")
    assert process.wait(180) == 0, log.read_text()
    assert_every_image_once(out)
    # The next worker finds the images that the killed one had written already there.
    text = log.read_text()
    decoded, present = map(int, re.search(r"^decoded (\d+), already there (\d+), failed 0$", text, re.MULTILINE).groups())
    assert decoded + present == MANY_SHARDS * MANY_ROWS and present <= MANY_ROWS and "images/s, Ray" in text
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path.suffix == ".parquet")


DEADLY_SHARD = """
import os, sys
from pathlib import Path
from movq_ext.bulk import ray_engine
from movq_ext.bulk.batches import Settings
from movq_ext.bulk.find import find_shards

class DyingWorker(ray_engine.Worker):
    def decode(self, shard):
        if shard.source.name == "1.parquet":
            with open(DEATHS, "a") as file:
                file.write("x")
            os._exit(1)
        return super().decode(shard)

ray_engine.Worker = DyingWorker
shards = find_shards([Path(sys.argv[1])], Path(sys.argv[2]))
for report in ray_engine.run_with_ray(shards, Settings(Path(sys.argv[3]), "cpu", threads=1), lambda samples: None):
    print(Path(report.source).name, report.decoded, report.error)
"""


def test_a_shard_that_kills_its_workers(model_folder, tmp_path):
    """It fails after MAX_ATTEMPTS, and the other shards are decoded."""
    for i in range(3):
        write_parquet(tmp_path / f"in/{i}.parquet", **size_columns())
    deaths = tmp_path / "deaths"
    program = DEADLY_SHARD.replace("DEATHS", repr(str(deaths)))  # sys.argv is another one in the worker
    command = [sys.executable, "-P", "-c", program, tmp_path / "in", tmp_path / "out", model_folder]
    env = {**os.environ, **RAY_ENVIRONMENT}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, cwd=AWAY_FROM_SOURCE)
    assert run.returncode == 0, run.stderr
    found = [line.split()[:2] for line in run.stdout.splitlines() if "raylet" not in line]
    assert sorted(found) == [["0.parquet", "6"], ["1.parquet", "0"], ["2.parquet", "6"]], run.stdout
    assert "the workers that decoded it died 4 times" in run.stdout and deaths.read_text() == "xxxx"
    assert file_names(tmp_path / "out") == ["0.parquet", "2.parquet"]


def test_a_missing_model(many_shards, tmp_path, capsys):
    model = tmp_path / "missing"
    assert main(["decode", str(many_shards), "-o", str(tmp_path / "out"), "--model", str(model), "--engine", "ray"]) == 2
    assert "error: no such file or folder: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "nodes, device, threads, shards, plan",
    [
        ([{"CPU": 8.0}], None, None, 9, WorkerPlan(2, 4, False)),
        ([{"CPU": 2.0}], None, None, 9, WorkerPlan(1, 2, False)),
        ([{"CPU": 8.0}, {"CPU": 2.0}], None, 3, 9, WorkerPlan(2, 3, False)),  # none on the second, which has too few cores
        ([{"CPU": 8.0}], None, 1, 3, WorkerPlan(3, 1, False)),
        ([{}], None, None, 9, WorkerPlan(1, 1, False)),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], None, None, 9, WorkerPlan(2, 4, True)),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}], "cuda", None, 9, WorkerPlan(3, 3, True)),
        ([{"CPU": 1.0, "GPU": 4.0}], None, None, 9, WorkerPlan(4, 1, True)),
        ([{"CPU": 8.0, "GPU": 2.0}], "cpu", None, 9, WorkerPlan(2, 4, False)),
    ],
)
def test_plan_workers(nodes, device, threads, shards, plan):
    assert plan_workers(nodes, Settings(Path("model"), device, threads=threads), shards) == plan


def test_a_gpu_that_the_cluster_does_not_have():
    with pytest.raises(ValueError, match="expected a device of the Ray cluster, got 'cuda:0' on a cluster without GPUs"):
        plan_workers([{"CPU": 8.0}], Settings(Path("model"), "cuda:0"), 1)
