"""Decode shards in a way that survives interruption: a restarted run decodes only what is missing.

All outputs are written atomically. A shard's images appear together when all are decoded; those of a code file appear one by
one. Samples that cannot be decoded are listed in ``SHARD.rejects.jsonl``, one JSON object per line with ``source``, ``name`` and
``reason``. The list is written before the images appear.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from ..io.files import atomic_write, printable, remove_partial_files
from .batches import BatchDecoder, OnProgress, Settings
from .shards import Sample, SampleError, Shard, WriteImage

CHUNK_BYTES = 192 << 20  # a chunk ends once its pixels and payloads reach this size
MAX_CHUNK_SAMPLES = 1024
MAX_REASONS = 10  # in a report


@dataclass
class Report:
    """The outcome of one shard.

    Args:
        source: the shard's file.
        decoded: number of images decoded.
        present: number of images that existed already.
        rejected: number of samples that could not be decoded.
        reasons: the first MAX_REASONS reasons why.
        error: why the shard as a whole failed; empty if it did not.
        seconds: time taken.
    """

    source: str
    decoded: int = 0
    present: int = 0
    rejected: int = 0
    reasons: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Reject:
    """A sample that could not be decoded, or a whole shard if it has no name."""

    source: str
    name: str | None
    reason: str


def decode_shard(shard: Shard, decoder: BatchDecoder, on_progress: OnProgress = lambda samples: None) -> Report:
    """Decode the samples whose images are missing. Errors of the shard or the disk are reported; all others are raised."""
    report, start = Report(str(shard.source)), time.monotonic()
    try:
        if shard.is_done():  # a worker finished it and died before it could report
            _count_existing(shard, report)
            on_progress(report.present + report.rejected)
            return report
        _decode_missing(shard, decoder, report, on_progress)
    except (OSError, ValueError) as error:
        report.decoded = 0
        if shard.is_done():  # another run finished it and removed our partial file as stale
            _count_existing(shard, report)
            return report
        reason = printable(str(error) if report.source in str(error) else f"{report.source}: {error}")
        report.error = reason
        with suppress(OSError):
            _write_rejects(shard, [Reject(report.source, None, reason)])
    report.seconds = time.monotonic() - start
    return report


def run_in_process(shards: Iterable[Shard], settings: Settings, on_progress: OnProgress) -> Iterator[Report]:
    """Decode shards one after the other, on one device."""
    decoder = BatchDecoder(settings)
    for shard in shards:
        yield decode_shard(shard, decoder, on_progress)


def _decode_missing(shard: Shard, decoder: BatchDecoder, report: Report, on_progress: OnProgress) -> None:
    """Write the missing images and the rejects, and count them in the report."""
    rejects: list[Reject] = []
    paths = {shard.rejects_path}
    with ThreadPoolExecutor(decoder.threads) as pool, shard.open_writer() as write:
        for chunk in _chunks(shard.samples(decoder.codebook)):
            paths |= {shard.image_path(sample) for sample in chunk}
            missing = [sample for sample in chunk if not shard.has_image(sample)]
            report.present += len(chunk) - len(missing)
            on_progress(len(chunk) - len(missing))
            for sample, png in zip(missing, decoder.decode_samples(missing, pool, on_progress), strict=True):
                problem = _try_write(write, sample, png)
                if problem is None:
                    report.decoded += 1
                else:
                    rejects.append(Reject(report.source, sample.name, printable(problem)))
        _write_rejects(shard, rejects)  # before the images appear: a reader that sees them can see what is missing
    report.rejected = len(rejects)
    report.reasons = [f"{reject.name}: {reject.reason}" for reject in rejects[:MAX_REASONS]]
    remove_partial_files(paths)


def _try_write(write: WriteImage, sample: Sample, png: bytes | SampleError) -> str | None:
    """Write an image. Return None, or the reason why it was not decoded or written."""
    if isinstance(png, SampleError):
        return str(png)
    try:
        write(sample, png)
    except SampleError as error:
        return str(error)
    return None


def _count_existing(shard: Shard, report: Report) -> None:
    report.present, report.rejected = shard.count_images(), shard.count_rejects()


def _chunks(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Group samples into lists that are decoded together and held in memory until all are."""
    chunk: list[Sample] = []
    size = 0
    for sample in samples:
        chunk.append(sample)
        size += 3 * sample.size[0] * sample.size[1] + sample.payload_bytes
        if size >= CHUNK_BYTES or len(chunk) == MAX_CHUNK_SAMPLES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_rejects(shard: Shard, rejects: list[Reject]) -> None:
    """Write the file of rejects, or delete an earlier run's if there are none."""
    path = shard.rejects_path
    if not rejects:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text("".join(f"{json.dumps(asdict(reject))}\n" for reject in rejects))
