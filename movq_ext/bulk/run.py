"""Decoding the codes of many pictures: shard by shard, in batches that fit the memory, by a run that may be stopped anywhere.

A shard's pictures are written at once when all are made (those of a CodeFile one by one), so whoever finds a file finds all of
it, and a run that is begun again goes on with the shards that have none. What cannot be decoded is in ``SHARD.rejects.jsonl``,
one JSON object a line with ``source``, ``name`` and ``reason``, which is there before the shard's pictures are.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from ..io.files import atomic_write, printable, remove_partial_files
from ..io.images import to_image
from ..io.weights import from_pretrained
from ..model.decoder import MOVQDecoder
from ..model.layers import ResnetBlock, Stage
from .shards import Codebook, PictureError, Sample, Shard

logger = logging.getLogger(__name__)

CHUNK_BYTES = 192 << 20  # of pictures, and what goes with them, that wait for the others of their chunk
MOST_SAMPLES = 1024  # in a chunk
SHOWN = 10  # reasons in a report
MEMORY_SHARE = 0.8  # of a GPU's free memory, or of the machine's, for decodes
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # cgroup v2, v1
CPU_RAN_OUT = "can't allocate memory"  # torch has no class for it
Tell = Callable[[int], object]  # hears that so many pictures are done


@dataclass(frozen=True)
class Settings:
    """How to decode, for whoever does it.

    Args:
        model: see from_pretrained.
        device, dtype: of the model; a GPU, where there is one, if the device is None.
        max_memory: bytes that a decode may take beyond weights and images. If None, most of what is free on a GPU, and most of
            the threads' share of the machine's on a CPU.
        threads: that compute on a CPU, and that encode PNGs; torch's own number if None.
    """

    model: Path
    device: str | None = None
    dtype: torch.dtype = torch.float32
    max_memory: int | None = None
    threads: int | None = None


@dataclass
class Report:
    """What became of a shard: how many pictures were decoded, were there already and were rejected, and the first reasons.

    ``error`` says why the shard as a whole could not be decoded; nothing of it was written then.
    """

    source: str
    decoded: int = 0
    present: int = 0
    rejected: int = 0
    reasons: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


class BatchDecoder:
    """Makes PNGs of samples, in batches of one size. On a CPU a batch is one picture: decodes there take them one by one."""

    def __init__(self, settings: Settings) -> None:
        self.device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.model = from_pretrained(settings.model, device=self.device, dtype=settings.dtype)
        self.codebook = Codebook.of(self.model)
        self._pixel_bytes = peak_values(self.model.decoder) * self.model.quant_conv.weight.element_size()
        self.threads = settings.threads or torch.get_num_threads()
        self.max_memory = settings.max_memory or int(MEMORY_SHARE * memory(self.device, self.threads))
        self._less: dict[tuple[int, int], int] = {}  # memory that pictures of so many cells have since they ran out of it

    def __call__(self, samples: Sequence[Sample], pool: ThreadPoolExecutor, tell: Tell) -> list[bytes | Exception]:
        """A PNG for each sample, or why there is none. ``tell`` hears of every one."""
        by_grid: dict[tuple[int, int], list[int]] = defaultdict(list)
        results: dict[int, Exception | Future[bytes]] = {}
        for i, sample in enumerate(samples):
            if sample.codes is None:
                results[i] = ValueError(sample.problem)
                tell(1)
            else:
                by_grid[sample.codes.shape[0], sample.codes.shape[1]].append(i)
        for grid, members in by_grid.items():
            while members:
                batch = members[: self.batch_size(grid)]
                ran_out = False
                try:
                    images = self.decode(torch.stack([codes for i in batch if (codes := samples[i].codes) is not None]))
                except RuntimeError as error:
                    if not isinstance(error, torch.OutOfMemoryError) and CPU_RAN_OUT not in str(error):
                        raise
                    ran_out = True  # what is in memory is free only when the error is gone
                except ValueError as error:  # too large for the memory even in strips
                    results.update((i, error) for i in batch)
                else:
                    for i, image in zip(batch, images, strict=True):
                        height, width = samples[i].size
                        try:
                            results[i] = pool.submit(_png, to_image(image[:, :height, :width]))
                        except ValueError as error:  # NaN
                            results[i] = error
                if ran_out:
                    self._take_less(grid, len(batch))
                    continue
                tell(len(batch))
                del members[: len(batch)]
        found = (results[i] for i in range(len(samples)))
        return [result.result() if isinstance(result, Future) else result for result in found]

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` of codes ``(B, h, w)``."""
        quantised = self.model.quantize.get_codebook_entry(codes.to(self.device), (*codes.shape, self.model.quantize.e_dim))
        grid = (codes.shape[1], codes.shape[2])
        fits = self.picture_bytes(grid) <= self.room(grid)
        return self.model.decode(quantised, max_memory=None if fits else self.room(grid))

    def _take_less(self, grid: tuple[int, int], pictures: int) -> None:
        """After so many pictures ran out of memory: half of them the next time, one in strips, in ever less memory."""
        self._less[grid] = min(self.room(grid), pictures * self.picture_bytes(grid)) // 2
        torch.cuda.empty_cache()
        logger.warning("out of memory with %d pictures of %d x %d codes at once: going on with less", pictures, *grid)

    def room(self, grid: tuple[int, int]) -> int:
        """The bytes that pictures of so many cells may take. Those of other sizes do not suffer for one that has too many."""
        return self._less.get(grid, self.max_memory)

    def batch_size(self, grid: tuple[int, int]) -> int:
        """How many pictures of so many cells to decode at once."""
        return 1 if self.device.type == "cpu" else max(1, self.room(grid) // self.picture_bytes(grid))

    def picture_bytes(self, grid: tuple[int, int]) -> int:
        """About the most that a decode holds of maps for one picture of so many cells."""
        return self._pixel_bytes * grid[0] * grid[1] * self.codebook.cell**2


def memory(device: torch.device, threads: int) -> int:
    """Bytes for decodes on a device: what a GPU has free; of the machine's, where others work too, the share of the threads."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(min(1.0, threads / (os.cpu_count() or 1)) * machine_memory())


def machine_memory() -> int:
    """Bytes of the machine, or of what a container may take of it."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize]
    for limit in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            sizes.append(int(limit.read_text()))
    return min(sizes)


def peak_values(decoder: MOVQDecoder) -> int:
    """The most values a pixel of the image that maps have at a time: a block's input, its norm, its convolution and the sum."""
    stages = enumerate(cast(Stage, stage) for stage in decoder.up)
    blocks = ((level, cast(ResnetBlock, block)) for level, stage in stages for block in stage.block)
    return max(-(-2 * (block.in_channels + block.out_channels) >> 2 * level) for level, block in blocks)


def decode_shard(shard: Shard, decoder: BatchDecoder, tell: Tell = lambda pictures: None) -> Report:
    """Decode what a shard has and its target lacks. What is the shard's or the disk's fault is reported, not raised."""
    report, start = Report(str(shard.source)), time.monotonic()
    rejects: list[dict[str, str | None]] = []
    paths = {shard.rejects}

    def reject(name: str | None, reason: str) -> None:
        rejects.append({"source": str(shard.source), "name": name, "reason": printable(reason)})

    try:
        if shard.is_done():  # by a worker that died before it could say so
            report.present, report.rejected = shard.pictures(), shard.rejected()
            tell(report.present + report.rejected)
            return report
        with ThreadPoolExecutor(decoder.threads) as pool, shard.writing() as write:
            for chunk in _chunks(shard.samples(decoder.codebook)):
                paths |= {shard.path_of(sample) for sample in chunk}
                missing = [sample for sample in chunk if not shard.has(sample)]
                report.present += len(chunk) - len(missing)
                tell(len(chunk) - len(missing))
                for sample, png in zip(missing, decoder(missing, pool, tell), strict=True):
                    try:
                        if isinstance(png, Exception):
                            raise PictureError(str(png)) from png
                        write(sample, png)
                        report.decoded += 1
                    except PictureError as error:
                        reject(sample.name, str(error))
            _write_rejects(shard, rejects)  # before the pictures take their name: who finds them knows what is missing
        report.rejected = len(rejects)
        report.reasons = [f"{one['name']}: {one['reason']}" for one in rejects[:SHOWN]]
        remove_partial_files(paths)
    except (OSError, ValueError) as error:
        report.decoded = 0
        if shard.is_done():  # by another run, which took what this one was writing for what the dead leave behind
            report.present, report.rejected = shard.pictures(), shard.rejected()
            return report
        reason = str(error) if report.source in str(error) else f"{report.source}: {error}"
        report.error = printable(reason)
        rejects = []
        reject(None, reason)
        with suppress(OSError):
            _write_rejects(shard, rejects)
    report.seconds = time.monotonic() - start
    return report


def run_in_process(shards: Iterable[Shard], settings: Settings, tell: Tell) -> Iterator[Report]:
    """Decode shards one after the other, on one device; ``tell`` hears of every picture."""
    decoder = BatchDecoder(settings)
    for shard in shards:
        yield decode_shard(shard, decoder, tell)


def _chunks(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples together that are decoded together, in CHUNK_BYTES and what the last one takes."""
    chunk: list[Sample] = []
    size = 0
    for sample in samples:
        chunk.append(sample)
        size += 3 * sample.size[0] * sample.size[1] + sample.rest_bytes
        if size >= CHUNK_BYTES or len(chunk) == MOST_SAMPLES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_rejects(shard: Shard, rejects: list[dict[str, str | None]]) -> None:
    if not rejects:
        shard.rejects.unlink(missing_ok=True)
        return
    shard.rejects.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(shard.rejects) as partial:
        partial.write_text("".join(f"{json.dumps(one)}\n" for one in rejects))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
