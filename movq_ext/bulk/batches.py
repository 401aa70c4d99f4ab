"""Decode samples in batches that fit in memory."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from ..io.images import DEFAULT_MAX_PIXELS, to_image
from ..io.weights import from_pretrained
from .codebook import Codebook
from .memory import available_memory, is_out_of_memory, peak_values_per_pixel
from .shards import Sample, SampleError

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.8  # of the available memory, for decodes
Grid = tuple[int, int]  # (rows, columns) of codes


@dataclass(frozen=True)
class Settings:
    """How to decode.

    Args:
        model: see from_pretrained.
        device: of the model; None for a GPU if there is one, else the CPU.
        dtype: of the model.
        max_memory: bytes for a decode, besides weights and images. None for most of a GPU's free memory or, on a CPU, most of
            the threads' share of the machine's memory.
        max_pixels: of an image; larger ones are rejected.
        threads: for computing on a CPU and for encoding PNGs; None for torch's default.
    """

    model: Path
    device: str | None = None
    dtype: torch.dtype = torch.float32
    max_memory: int | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS
    threads: int | None = None


class BatchDecoder:
    """Decodes samples. A batch has grids of one size; on a CPU it is a single grid."""

    def __init__(self, settings: Settings) -> None:
        self.device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.model = from_pretrained(settings.model, device=self.device, dtype=settings.dtype)
        self.codebook = Codebook.from_model(self.model, settings.max_pixels)
        self.threads = settings.threads or torch.get_num_threads()
        self.max_memory = settings.max_memory or int(MEMORY_SHARE * available_memory(self.device, self.threads))
        self.reduced_budgets: dict[Grid, int] = {}  # after running out of memory, by grid size
        self._bytes_per_pixel = peak_values_per_pixel(self.model.decoder) * self.model.quant_conv.weight.element_size()

    @cached_property
    def weights_digest(self) -> bytes:
        """A hash of the weights in the model's dtype."""
        digest = hashlib.sha256()
        for weight in self.model.state_dict().values():
            digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.digest()

    def decode_samples(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Image.Image | None]]:
        """Yield each sample with its image as soon as its batch is decoded, or with None if it now has a problem.

        The order follows the batches.
        """
        samples_by_grid: dict[Grid, list[Sample]] = defaultdict(list)
        for sample in samples:
            if sample.codes is None:
                yield sample, None
            else:
                samples_by_grid[sample.codes.shape[0], sample.codes.shape[1]].append(sample)
        for grid, group in samples_by_grid.items():
            for sample, image in self._decode_grid(grid, group):
                yield sample, _crop(image, sample)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes ``(B, h, w)`` to images ``(B, 3, H, W)``, in strips if an image exceeds the budget."""
        quantised = self.model.quantize.get_codebook_entry(codes.to(self.device), (*codes.shape, self.model.quantize.e_dim))
        grid = (codes.shape[1], codes.shape[2])
        fits = self.image_bytes(grid) <= self.budget(grid)
        return self.model.decode(quantised, max_memory=None if fits else self.budget(grid))

    def budget(self, grid: Grid) -> int:
        """Return the bytes that a decode of this grid size may take. Other sizes keep theirs when one runs out of memory."""
        return self.reduced_budgets.get(grid, self.max_memory)

    def batch_size(self, grid: Grid) -> int:
        """Return how many grids of this size to decode at once."""
        return 1 if self.device.type == "cpu" else max(1, self.budget(grid) // self.image_bytes(grid))

    def image_bytes(self, grid: Grid) -> int:
        """Return the approximate peak of feature maps, in bytes, for one grid of this size."""
        return self._bytes_per_pixel * grid[0] * grid[1] * self.codebook.cell**2

    def _decode_grid(self, grid: Grid, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Tensor | SampleError]]:
        """Decode samples of one grid size in batches; retry a batch with a smaller budget when it runs out of memory."""
        waiting = list(samples)
        while waiting:
            batch = waiting[: self.batch_size(grid)]
            images = self._try_decode(torch.stack([cast(Tensor, sample.codes) for sample in batch]))
            if images is None:
                self._reduce_budget(grid, len(batch))
                continue
            yield from zip(batch, images, strict=True)
            del waiting[: len(batch)]

    def _try_decode(self, codes: Tensor) -> Iterable[Tensor | SampleError] | None:
        """Return the images, or one error per image that is too large even for strips. Return None if memory ran out.

        The exception is gone once this returns; while it lives, its traceback keeps the failed decode's tensors in memory.
        """
        try:
            return self.decode(codes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        except ValueError as error:
            return [SampleError(str(error))] * len(codes)

    def _reduce_budget(self, grid: Grid, images: int) -> None:
        """Halve the budget after this many images ran out of memory: half the batch, then one image, then smaller strips."""
        self.reduced_budgets[grid] = min(self.budget(grid), images * self.image_bytes(grid)) // 2
        torch.cuda.empty_cache()
        logger.warning("out of memory decoding %d images of %d x %d codes at once: retrying with half the budget", images, *grid)


def _crop(image: Tensor | SampleError, sample: Sample) -> Image.Image | None:
    """Crop an image to the sample's size. Return None and set the problem if it failed, is not finite or exceeds memory."""
    height, width = sample.size
    try:
        if isinstance(image, SampleError):
            raise image
        return to_image(image[:, :height, :width])
    except ValueError as error:
        sample.problem = str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sample.problem = f"ran out of memory for an image of {height} x {width} pixels (height x width)"
    return None
