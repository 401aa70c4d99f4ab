"""Shards through Ray Data: workers that keep the model decode them, on a cluster or on the cores and GPUs of one machine.

A worker that dies is started anew, and its shard is begun again. Paths must mean the same on all machines of a cluster.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..io.weights import from_pretrained
from .run import BatchDecoder, Report, Settings, Tell, decode_shard
from .shards import Shard, shard_of

logger = logging.getLogger(__name__)

TRIES = 4  # that a shard has before it is given up: one that kills its worker would else do so for ever
CORES = 4  # of a worker, if there are as many


class Attempts:
    """A Ray actor that outlives the workers and counts how often they began with a shard. If it dies it counts anew."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def begin(self, source: str) -> int:
        self.count[source] += 1
        return self.count[source]


class Worker:
    """What runs in every actor of Ray Data: it holds the model, and takes a shard at a time."""

    def __init__(self, settings: Settings, attempts: Any) -> None:
        self.decoder, self.attempts = BatchDecoder(settings), attempts

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        import ray

        source, target = str(batch["source"][0]), str(batch["target"][0])
        if ray.get(self.attempts.begin.remote(source)) > TRIES:
            report = Report(source, error=f"{source}: the workers that decoded it died {TRIES} times")
        else:
            report = self.decode(shard_of(Path(source), Path(target)))
        return {"report": [json.dumps(asdict(report))]}

    def decode(self, shard: Shard) -> Report:
        try:
            return decode_shard(shard, self.decoder)
        except Exception:
            # Not the shard's fault: the GPU may be of no use to this process any more. Ray starts another one.
            logger.exception("a worker failed while it decoded %s, and ends", shard.source)
            logging.shutdown()
            os._exit(1)


def run_with_ray(shards: Sequence[Shard], settings: Settings, tell: Tell) -> Iterator[Report]:
    """Decode shards on the Ray cluster that RAY_ADDRESS or ``ray start`` names, or one of this machine's own.

    There is a worker for every GPU or, without, for every ``settings.threads`` cores. ``tell`` hears of every shard's pictures.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ValueError("workers need Ray Data: pip install 'movq_ext[ray]'") from error

    from_pretrained(settings.model)  # what may be wrong with it is said here, and not by every worker
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level=logging.WARNING, include_dashboard=False)
    try:
        yield from _run(ray, shards, settings, tell)
    finally:
        if ours:
            ray.shutdown()


def _run(ray: Any, shards: Sequence[Shard], settings: Settings, tell: Tell) -> Iterator[Report]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 0 if settings.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    if settings.device is not None and settings.device != "cpu" and not gpus:
        raise ValueError(f"device must be one that Ray's cluster has, got {settings.device!r} and a cluster without GPUs")
    # A worker's cores are those of one machine.
    most = [int(node.get("CPU", 0) // max(1, node.get("GPU", 0))) for node in nodes if not gpus or node.get("GPU", 0)]
    cores = min(settings.threads or CORES, max(1, min(most) if gpus else max(most)))
    workers = min(len(shards), gpus or max(1, sum(cpus // cores for cpus in most)))
    logger.info("%d workers with %d cores%s", workers, cores, " and a GPU each" if gpus else "")

    ray.data.DataContext.get_current().enable_progress_bars = False  # whoever called has one
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
    # Workers have another working directory.
    settings = replace(settings, model=settings.model.resolve(), device="cuda" if gpus else "cpu", threads=cores)
    rows = [{"source": str(shard.source.resolve()), "target": str(shard.target.resolve())} for shard in shards]
    reports = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        fn_constructor_args=[settings, attempts],
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=cores,
        num_gpus=1 if gpus else None,
    )
    for row in reports.iter_rows():
        report = Report(**json.loads(row["report"]))
        tell(report.decoded + report.present + report.rejected)
        yield report
