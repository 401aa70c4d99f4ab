"""Decode shards in a way that survives interruption: a restarted run decodes only what is missing.

Every image is written as soon as it is decoded, and an interrupt waits for the images that are being encoded. An output file
appears when it is complete; until then, its images are in a hidden log beside it. Samples that cannot be decoded are listed in
``SHARD.rejects.jsonl``, one JSON object per line with ``source``, ``name`` and ``reason``. The list is written before the output
file appears.
"""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import SpooledTemporaryFile

from PIL import Image

from ..io.files import atomic_write, printable, remove_partial_files
from .batches import BatchDecoder, Settings
from .image_folder import ImageFolderShard
from .shards import FinishedImages, Sample, SampleError, Shard

OnProgress = Callable[[int], object]  # called with the number of samples just completed, from any thread but one at a time
CHUNK_BYTES = 192 << 20  # a chunk ends once its pixels and payloads reach this size
MAX_CHUNK_SAMPLES = 1024
MAX_REASONS = 10  # in a report
MAX_REJECTS_BYTES = 1 << 20  # in memory


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


class Rejects:
    """The samples of a shard that cannot be decoded, counted in its report. A list too long for memory is on disk."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lines = SpooledTemporaryFile(MAX_REJECTS_BYTES, mode="w+", encoding="utf-8")

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()

    def add(self, name: str | None, reason: str) -> None:
        """Add a sample, or the whole shard if it has no name."""
        reason = printable(reason)
        self._lines.write(f"{json.dumps({'source': self._report.source, 'name': name, 'reason': reason})}\n")
        self._report.rejected += name is not None
        if name is not None and len(self._report.reasons) < MAX_REASONS:
            self._report.reasons.append(f"{name}: {reason}")

    def write(self, path: Path) -> None:
        """Write the file of rejects, or delete an earlier run's if there are none."""
        if not self._lines.tell():
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines.seek(0)
        with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
            shutil.copyfileobj(self._lines, file)


def decode_shard(shard: Shard, decoder: BatchDecoder, on_progress: OnProgress = lambda samples: None) -> Report:
    """Decode the samples whose images are missing. Errors of the shard, the disk or memory are reported, all others raised."""
    report, start = Report(str(shard.source)), time.monotonic()
    try:
        if shard.is_done():  # a worker finished it and died before it could report
            _count_existing(shard, report)
            remove_partial_files([shard.target])
            on_progress(report.present + report.rejected)
            return report
        _decode_missing(shard, decoder, report, on_progress)
    except (OSError, ValueError, MemoryError) as error:
        if not isinstance(shard, ImageFolderShard):
            report.decoded = 0  # the images are in the log, for the next run
        report.rejected, report.reasons = 0, []
        if shard.is_done():  # another run finished it and removed our partial file as stale
            _count_existing(shard, report)
            remove_partial_files([shard.target])
            return report
        message = str(error) or type(error).__name__  # a MemoryError has no message
        reason = printable(message if report.source in message else f"{report.source}: {message}")
        report.error = reason
        with suppress(OSError), Rejects(report) as rejects:
            rejects.add(None, reason)
            rejects.write(shard.rejects_path)
    report.seconds = time.monotonic() - start
    return report


def run_in_process(shards: Iterable[Shard], settings: Settings, on_progress: OnProgress) -> Iterator[Report]:
    """Decode shards one after the other, on one device."""
    decoder = BatchDecoder(settings)
    for shard in shards:
        yield decode_shard(shard, decoder, on_progress)


def _decode_missing(shard: Shard, decoder: BatchDecoder, report: Report, on_progress: OnProgress) -> None:
    """Write the missing images and the rejects, and count them in the report."""
    paths = {shard.rejects_path, shard.target}
    with (
        Rejects(report) as rejects,
        shard.open_images(decoder.weights_digest) as images,
        shard.open_writer(images) as copy_image,
    ):
        for chunk in _chunks(shard.samples(decoder.codebook)):
            missing = [sample for sample in chunk if sample.problem or sample not in images]
            paths |= {shard.image_path(sample) for sample in missing if not sample.problem}
            report.present += len(chunk) - len(missing)
            on_progress(len(chunk) - len(missing))
            _decode_chunk(missing, decoder, images, on_progress)
            for sample in missing:
                if sample.problem:
                    rejects.add(sample.name, sample.problem)
            report.decoded += sum(not sample.problem for sample in missing)
            for sample in chunk:
                if not sample.problem:
                    copy_image(sample)
        rejects.write(shard.rejects_path)  # before the images appear: a reader that sees them can see what is missing
    remove_partial_files(paths)


def _decode_chunk(samples: list[Sample], decoder: BatchDecoder, images: FinishedImages, on_progress: OnProgress) -> None:
    """Decode samples and add their images, or set their problem. Decoded images are added even if this is interrupted."""
    lock = threading.Lock()

    def add(sample: Sample, image: Image.Image | None) -> None:
        if image is not None:
            try:
                file = io.BytesIO()
                image.save(file, format="PNG")
                images.add(sample, file.getvalue())
            except SampleError as error:
                sample.problem = str(error)
            except MemoryError:
                sample.problem = f"ran out of memory for a PNG of {image.height} x {image.width} pixels (height x width)"
        with lock:
            on_progress(1)

    with ThreadPoolExecutor(decoder.threads) as pool:  # on exit, waits for the images that are being encoded
        added = [pool.submit(add, sample, image) for sample, image in decoder.decode_samples(samples)]
    for future in added:
        future.result()  # raises the error if an image could not be added


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
