"""The codebook that codes refer to, and the check that codes fit it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..io.codes import codebook_fingerprint
from ..io.files import MAX_SHOWN_CHARACTERS, printable
from ..io.images import DEFAULT_MAX_PIXELS
from ..model.autoencoder import MOVQ

CODEBOOK_KEY = "movq_ext.codebook"  # of the fingerprint in a shard's metadata
MAX_SIDE_PIXELS = 1 << 20


@dataclass(frozen=True)
class Codebook:
    """The properties of a model's codebook that files of codes depend on, and the size of image that they may have.

    Args:
        fingerprint: hash of the codebook's vectors.
        size: number of codes.
        cell: pixels per code along each side.
        max_pixels: of an image; a small file can claim a huge one.
    """

    fingerprint: str
    size: int
    cell: int
    max_pixels: int = DEFAULT_MAX_PIXELS

    @classmethod
    def from_model(cls, model: MOVQ, max_pixels: int = DEFAULT_MAX_PIXELS) -> Codebook:
        """Return the codebook of a model."""
        return cls(codebook_fingerprint(model), model.quantize.re_embed, model.downsampling, max_pixels)

    def check_fingerprint(self, fingerprint: Any, source: Path | str) -> None:
        """Raise ValueError if the codes in source, a file or sample, belong to another codebook."""
        if fingerprint != self.fingerprint:
            found = printable(str(fingerprint), MAX_SHOWN_CHARACTERS)
            raise ValueError(f"{source} was made with codebook {found}, but the model has {self.fingerprint}")

    def to_grid(self, codes: Any, size: tuple[Any, Any] = (None, None)) -> tuple[Tensor, tuple[int, int]]:
        """Check codes from a file.

        Args:
            codes: integer array ``(h, w)`` or ``(h * w,)``; anything else is an error.
            size: (height, width) of the image in pixels. If both are None, the image covers the whole grid, and 1-D codes form
                a square.

        Returns:
            Codes ``(h, w)`` int64, and the image's (height, width) in pixels.

        Raises:
            ValueError: codes are not integers, are not in the codebook or do not match the size, or the image has more than
                max_pixels.
        """
        if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu" or codes.ndim not in (1, 2) or not codes.size:
            found = f"{codes.dtype} of shape {codes.shape}" if isinstance(codes, np.ndarray) else "none"
            raise ValueError(f"codes must be integers of one or two dimensions, got {found}")
        height, width = self._size_of(codes) if size[0] is None and size[1] is None else _check_sides(size)
        if height * width > self.max_pixels:
            found = f"{height} x {width} (height x width): raise the limit with --max-pixels"
            raise ValueError(f"expected an image of at most {self.max_pixels} pixels, got {found}")
        rows, columns = -(-height // self.cell), -(-width // self.cell)
        if codes.shape not in ((rows, columns), (rows * columns,)):
            expected = f"expected {rows} x {columns} codes for an image of {height} x {width} pixels (height x width)"
            raise ValueError(f"{expected}, got shape {codes.shape}")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.size:
            raise ValueError(f"codes must be in [0, {self.size}), got values from {low} to {high}")
        try:
            return torch.from_numpy(codes.astype(np.int64)).view(rows, columns), (height, width)
        except MemoryError as error:
            raise ValueError(f"ran out of memory for {rows} x {columns} codes") from error

    def _size_of(self, codes: np.ndarray) -> tuple[int, int]:
        """Return (height, width) in pixels of the whole grid."""
        side = math.isqrt(codes.size)
        if codes.ndim == 1 and side * side != codes.size:
            raise ValueError(f"1-D codes without height and width must form a square, got {codes.size} codes")
        rows, columns = (side, side) if codes.ndim == 1 else codes.shape
        return rows * self.cell, columns * self.cell


def _check_sides(size: tuple[Any, Any]) -> tuple[int, int]:
    if not all(type(pixels) is int and 0 < pixels <= MAX_SIDE_PIXELS for pixels in size):
        found = printable(f"{size[0]!r} and {size[1]!r}", MAX_SHOWN_CHARACTERS)
        raise ValueError(f"height and width must be integers from 1 to {MAX_SIDE_PIXELS}, got {found}")
    return size
