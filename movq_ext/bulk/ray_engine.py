"""Decode shards with Ray Data, on a cluster or on the cores and GPUs of one machine.

Each worker loads the model once and decodes one shard at a time. Ray replaces a worker that dies and retries its shard. All
machines of a cluster must see the same files under the same paths.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..io.weights import from_pretrained
from .batches import BatchDecoder, Settings
from .find import make_shard
from .run import OnProgress, Report, decode_shard
from .shards import FieldNames, Shard

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 4  # at a shard: one that kills its worker would otherwise be retried forever
CORES_PER_WORKER = 4  # by default, if a machine has as many
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: as by default on these systems, Ray listens on 127.0.0.1


class Attempts:
    """A Ray actor that counts the attempts at each target. It outlives the workers; if it dies, the count restarts at zero."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def increment(self, target: str) -> int:
        """Count one more attempt at a target, and return how many there have been."""
        self.count[target] += 1
        return self.count[target]


class Worker:
    """A Ray Data actor that holds the model and decodes one shard per call."""

    def __init__(self, settings: Settings, attempts: Any) -> None:
        self.decoder, self.attempts = BatchDecoder(settings), attempts

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Decode the one shard of a batch with a column ``shard``. Return its report as JSON."""
        import ray

        source, target, names = json.loads(str(batch["shard"][0]))
        if ray.get(self.attempts.increment.remote(target)) > MAX_ATTEMPTS:
            report = Report(source, error=f"{source}: the workers that decoded it died {MAX_ATTEMPTS} times")
        else:
            report = self.decode(make_shard(Path(source), Path(target), FieldNames(**names)))
        return {"report": [json.dumps(asdict(report))]}

    def decode(self, shard: Shard) -> Report:
        """Decode a shard; end the process on an error that is not the shard's fault."""
        try:
            return decode_shard(shard, self.decoder)
        except Exception:
            # A CUDA error can leave the GPU unusable for the rest of this process. Ray starts another one.
            logger.exception("worker failed on %s and exits", shard.source)
            logging.shutdown()
            os._exit(1)


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers to start, and the cores and GPU of each."""

    workers: int
    cores: int
    with_gpu: bool


def run_with_ray(shards: Sequence[Shard], settings: Settings, on_progress: OnProgress) -> Iterator[Report]:
    """Decode shards on the Ray cluster of ``RAY_ADDRESS`` or ``ray start``, or else on a local one that ends with the run.

    Starts one worker per GPU or, without GPUs, one per ``settings.threads`` cores. Yields reports as shards finish.
    """
    ray = _import_ray()
    from_pretrained(settings.model)  # report a bad model here, once, rather than from every worker
    start_ray = not ray.is_initialized()
    if start_ray:
        ray.init(logging_level=logging.WARNING, include_dashboard=False)
    try:
        yield from _run_on_cluster(ray, shards, settings, on_progress)
    finally:
        if start_ray:
            ray.shutdown()


def _import_ray() -> Any:
    """Import Ray so that a cluster which it starts on this machine listens on the loopback interface alone.

    Ray reads the variable on import. It has no effect on a cluster that is already running.
    """
    chosen = os.environ.get(LOOPBACK_VARIABLE)
    os.environ.setdefault(LOOPBACK_VARIABLE, "0")
    try:
        import ray.data
    except ImportError as error:
        raise ValueError("the Ray engine needs Ray Data: pip install 'movq_ext[ray]'") from error
    finally:
        if chosen is None:
            del os.environ[LOOPBACK_VARIABLE]
    return ray


def plan_workers(nodes: Sequence[dict[str, float]], settings: Settings, shards: int) -> WorkerPlan:
    """Divide a cluster among workers.

    Args:
        nodes: the resources of each machine, as Ray names them: ``{"CPU": 8.0, "GPU": 1.0}``.
        settings: its device and threads limit the workers.
        shards: the largest useful number of workers.

    Raises:
        ValueError: the settings ask for a GPU that the cluster does not have.
    """
    gpus = 0 if settings.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    if settings.device is not None and settings.device != "cpu" and not gpus:
        raise ValueError(f"expected a device of the Ray cluster, got {settings.device!r} on a cluster without GPUs")
    wanted = settings.threads or CORES_PER_WORKER
    if gpus:  # the machine with the fewest cores per GPU sets the limit, as all workers are alike
        fewest = min(int(node.get("CPU", 0) // max(1, node["GPU"])) for node in nodes if node.get("GPU", 0))
        return WorkerPlan(min(shards, gpus), min(wanted, max(1, fewest)), with_gpu=True)
    node_cores = [int(node.get("CPU", 0)) for node in nodes]
    cores = min(wanted, max([1, *node_cores]))  # a worker runs on one machine
    return WorkerPlan(min(shards, max(1, sum(count // cores for count in node_cores))), cores, with_gpu=False)


def _run_on_cluster(ray: Any, shards: Sequence[Shard], settings: Settings, on_progress: OnProgress) -> Iterator[Report]:
    plan = plan_workers([node["Resources"] for node in ray.nodes() if node["Alive"]], settings, len(shards))
    logger.info("%d workers with %d cores%s", plan.workers, plan.cores, " and a GPU each" if plan.with_gpu else "")

    ray.data.DataContext.get_current().enable_progress_bars = False  # the caller shows its own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
    device = "cuda" if plan.with_gpu else "cpu"
    settings = replace(settings, model=settings.model.absolute(), device=device, threads=plan.cores)
    # Links are not resolved: a link's name has the suffix, its target may not. JSON escapes names that are not UTF-8.
    rows = [{"shard": json.dumps([str(shard.source), str(shard.target), asdict(shard.names)])} for shard in shards]
    reports = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        fn_constructor_args=[settings, attempts],
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=plan.workers, max_tasks_in_flight_per_actor=1),
        num_cpus=plan.cores,
        num_gpus=1 if plan.with_gpu else None,
    )
    for row in reports.iter_rows():
        report = Report(**json.loads(row["report"]))
        on_progress(report.decoded + report.present + report.rejected)
        yield report
