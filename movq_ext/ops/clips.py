"""Clips for the spatial norm: a clip of T frames is one feature map of T * H rows.

Group statistics span all frames, so the norm of a clip is the norm of that map. Only the modulation knows about time: each row of
the map takes a row of the latent, and `resize_frames` says which. The kernels of csrc/kernels/ find it themselves, from a
`ClipShape`. In the native path `modulation_map` repeats the latent's frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .options import NormOptions


class ClipShape(NamedTuple):
    """How the rows of f and of zq divide into frames; one frame each for images."""

    frames: int = 1
    latent_frames: int = 1
    split_first_frame: bool = False

    @classmethod
    def of(cls, f: Tensor, zq: Tensor | None, split_first_frame: bool) -> ClipShape:
        """Return the shape of a clip ``(B, C, T, H, W)`` and its latent, or of images."""
        if f.dim() == 4:
            return cls()
        return cls(f.shape[2], 1 if zq is None else zq.shape[2], split_first_frame)


def as_map(clip: Tensor) -> Tensor:
    """Return ``(B, C, T, H, W)`` as ``(B, C, T * H, W)``, without a copy if the clip is dense."""
    return clip.flatten(2, 3)


def as_clip(map_: Tensor, frames: int) -> Tensor:
    """Return ``(B, C, T * H, W)`` as ``(B, C, T, H, W)``, without a copy."""
    clip: Tensor = map_.unflatten(2, (frames, -1))
    return clip


def as_maps(
    f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, split_first_frame: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, ClipShape]:
    """Return a clip and the two clips of its latent as maps, and how their rows divide into frames."""
    clip = ClipShape.of(f, zq_y, split_first_frame)
    if zq_y is not None and zq_b is not None:
        zq_y, zq_b = as_map(zq_y), as_map(zq_b)
    return as_map(f), zq_y, zq_b, clip


IMAGE = ClipShape()


def modulation_map(zq: Tensor, f: Tensor, split_first_frame: bool) -> Tensor:
    """Return the latent's map ``(B, C, rows, w)`` that a nearest resize assigns correctly to the rows of ``as_map(f)``.

    Args:
        zq: ``(B, C, t, h, w)``.
        f: ``(B, C, T, H, W)``.
        split_first_frame: see `resize_frames`.
    """
    _, _, frames, height, _ = f.shape
    rows = zq.shape[3]
    # A frame's rows must not take cells of another frame: either the resize repeats each row of zq equally often, or zq gets f's
    # rows here. Its width stays, so it is still far from f's size.
    if native.is_tracing() or not native.is_power_of_two_ratio(rows, height):
        rows = height
    return as_map(resize_frames(zq, frames, rows, split_first_frame))


def native_spatial_norm(f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions, clip: ClipShape) -> Tensor:
    """native.spatial_norm of a map whose rows are those of a clip's frames, or of images."""
    if zq_y is not None and zq_b is not None and (clip.frames, clip.latent_frames) != (1, 1):
        f_clip = as_clip(f, clip.frames)
        zq_y, zq_b = (modulation_map(as_clip(zq, clip.latent_frames), f_clip, clip.split_first_frame) for zq in (zq_y, zq_b))
    return native.spatial_norm(f, zq_y, zq_b, options)


def scale_rows(clip: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``clip * scale + shift``, where each row of scale and shift covers a block of the clip's rows.

    Args:
        clip: ``(B, C, T, H, W)``.
        scale, shift: ``(B, C, rows, W)`` or ``(B, C, rows, 1)``; rows divides T * H. `modulation_map` returns such, but narrower.
        out: memory for the result, in inference: the clip itself, or memory that does not overlap it.
    """
    blocks = (*clip.shape[:2], scale.shape[2], -1, clip.shape[4])
    scale, shift = scale.unsqueeze(3), shift.unsqueeze(3)
    if out is None:
        return (clip.reshape(blocks) * scale + shift).reshape(clip.shape)
    torch.addcmul(shift, clip.reshape(blocks), scale, out=out.view(blocks))
    return out


def widen(zq: Tensor, width: int) -> Tensor:
    """Resize ``(B, C, rows, w)`` to a width by torch's nearest rule: `scale_rows` is fast on long rows."""
    return F.interpolate(zq, size=(zq.shape[2], width), mode="nearest")


def resize_frames(zq: Tensor, frames: int, rows: int, split_first_frame: bool) -> Tensor:
    """Resize zq ``(B, C, t, h, w)`` to ``(B, C, frames, rows, w)`` by torch's nearest rule.

    Keep in sync with source_frame() in csrc/kernels/spatial_norm.cuh, which implements the same rule.

    Args:
        zq: any clip of at least one frame.
        frames, rows: sizes of the result.
        split_first_frame: the first frame takes zq's first; the other ``frames - 1`` take zq's other ``t - 1`` by nearest, or its
            only one. This is the order of causal models, whose first frame stands for itself and each later one for several.
    """
    if split_first_frame and min(frames, zq.shape[2]) > 1:
        first, others = zq[:, :, :1], zq[:, :, 1:]
        return torch.cat([_resize(first, 1, rows), _resize(others, frames - 1, rows)], dim=2)
    return _resize(zq, frames, rows)


def source_frames(clip: ClipShape) -> Tensor:
    """Return the frame of the latent that each frame takes."""
    numbers = torch.arange(clip.latent_frames, dtype=torch.float32).view(1, 1, -1, 1, 1)
    return resize_frames(numbers, clip.frames, 1, clip.split_first_frame).flatten().long()


def _resize(zq: Tensor, frames: int, rows: int) -> Tensor:
    size = (frames, rows, zq.shape[4])
    return zq if zq.shape[2:] == size else F.interpolate(zq, size=size, mode="nearest")
