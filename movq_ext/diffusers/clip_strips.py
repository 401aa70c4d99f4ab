"""CogVideoX's decoder strip by strip: a batch of frames in little memory, with the norms' statistics of all its rows.

A strip is some rows of every frame. As for images (`movq_ext.model.strips`), a convolution's strip has one more row of input
above and below, and a norm uses the moments that were gathered while its map was written, so strips leave no seams.

Row by row, a map stores the pixels of all frames side by side. So it is the feature map of an image that is T * W pixels wide,
and its storage, its moments and its norms are those of images. On a CPU each thread computes strips of its own, as for images.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.feature_maps import FeatureMap, MapStore, upcast
from ..model.strip_norms import split_at_cells
from ..model.strip_spans import HALO
from ..model.working_memory import WorkingMemory, convolution_values
from ..ops.clips import resize_frames
from ..ops.cpu_upsampling import prepare_upsample_conv
from ..ops.moments import Moments
from ..ops.native import scale_by_cells
from ..ops.thread_pool import run_in_threads
from .clip_convolution import PADDING, CausalConvolution
from .cogvideox import enlarge_frames, upsampled_frames

Result = TypeVar("Result")


def blocks(decoder: Any) -> list[Any]:
    return [decoder.mid_block, *decoder.up_blocks]


def block_upsamplers(block: Any) -> list[Any]:
    return list(getattr(block, "upsamplers", None) or ())


def upsamplers(decoder: Any) -> list[Any]:
    return [upsampler for block in blocks(decoder) for upsampler in block_upsamplers(block)]


def upsampled_count(upsampler: Any, frames: int) -> int:
    """Return how many frames the upsampler makes from this many."""
    return upsampled_frames(upsampler, torch.empty(1, 1, frames, 1, 1)).shape[2]


def output_frames(decoder: Any, frames: int) -> int:
    """Return how many frames the decoder makes from a batch of this many latent frames."""
    for upsampler in upsamplers(decoder):
        frames = upsampled_count(upsampler, frames)
    return frames


def upsampling_values(channels: int, frames: int, out_frames: int) -> int:
    """Return the number of values in all tensors of an upsampling, per pixel of a strip.

    They are the strip and its copy, the enlarged frames, and these again while they are convolved or the result.
    """
    enlarged, result = 4, -(-4 * out_frames // frames)
    return channels * (2 + enlarged + max(enlarged, result))


class ClipMap:
    """A clip ``(1, C, T, H, W)`` whose rows are stored one after another, each with the pixels of all frames."""

    def __init__(self, rows: FeatureMap, frames: int) -> None:
        self.rows, self.frames = rows, frames  # rows: (1, C, H, T * W)

    @property
    def width(self) -> int:
        return self.rows.width // self.frames

    def as_clip(self, rows: Tensor) -> Tensor:
        """Return rows ``(1, C, rows, T * W)`` as ``(1, C, T, rows, W)``, without a copy."""
        clip: Tensor = rows.unflatten(3, (self.frames, self.width)).transpose(2, 3)
        return clip

    def read(self, first: int, last: int) -> Tensor:
        """Return rows first to last - 1, ``(1, C, T, rows, W)``. Do not modify them."""
        return self.as_clip(self.rows.read(first, last))

    def write_unmeasured(self, first: int, strip: Tensor) -> None:
        """Copy a strip ``(1, C, T, rows, W)`` to the rows from ``first`` on, without moments: no norm reads this map."""
        rows = self.rows.reserve(first, first + strip.shape[3])
        self.as_clip(rows).copy_(strip)
        self.rows.commit_unmeasured(first, rows)


class ClipBuffer(threading.local):
    """Memory for one strip in each thread. Each strip overwrites the previous one."""

    def __init__(self, store: MapStore) -> None:
        self._store, self._values = store, store.empty(0)

    def frames(self, frames: int, rows: int, width: int, channels: int) -> Tensor:
        """Return uninitialised memory ``(1, C, T, rows, W)`` in channels_last_3d."""
        size = frames * rows * width * channels
        if self._values.numel() < size:
            self._values = self._store.empty(size)
        return self._values[:size].view(1, frames, rows, width, channels).permute(0, 4, 1, 2, 3)


class ClipStrips:
    """Runs the layers of a decoder on one clip, a batch of frames after another.

    Args:
        store: allocates the maps, and the frames that convolutions carry over to the next batch.
        memory: for the strips that threads compute at once.
    """

    def __init__(self, store: MapStore, memory: WorkingMemory) -> None:
        self.store, self.memory = store, memory
        self._frames_before: dict[Any, ClipMap] = {}  # by convolution: the last frames of its input in the batch before
        self.zq, self.is_last = store.empty(0), False  # of the current batch

    def decode(self, decoder: Any, z: Tensor, out: Tensor, is_last: bool) -> None:
        """Write the decoder's frames of the next batch of latent frames.

        Args:
            z: ``(1, z_channels, t, h, w)``.
            out: ``(1, out_channels, T, H, W)``, of any dtype.
            is_last: no batch follows, so convolutions leave no frames for it.
        """
        self.zq, self.is_last = z, is_last
        x = self._new_map(z.shape[1], *z.shape[2:])
        x.write_unmeasured(0, z)
        h = self.convolve(decoder.conv_in, x, StoredClip(x))
        self.store.release(x.rows)
        for block in blocks(decoder):
            for resnet in block.resnets:
                h = self._resnet_block(resnet, h)
            for upsampler in block_upsamplers(block):
                h = self._upsample(upsampler, h)
        self._write_output(decoder, h, out)
        self.store.release(h.rows)

    def _new_map(self, channels: int, frames: int, height: int, width: int) -> ClipMap:
        return ClipMap(self.store.allocate(channels, height, frames * width), frames)

    def _resnet_block(self, block: Any, x: ClipMap) -> ClipMap:
        h = self.convolve(block.conv1, x, NormalisedClip(block.norm1, x, self.zq))
        in_place = block.in_channels == block.out_channels
        if in_place:
            out = ClipMap(x.rows.reuse_storage(block.out_channels), x.frames)
        else:
            out = self._new_map(block.out_channels, x.frames, x.rows.height, x.width)

        def write_shortcut(first: int, last: int, rows: Tensor) -> None:
            stored = x.rows.read(first, last)
            if not in_place:
                rows.copy_(F.conv2d(stored, block.conv_shortcut.weight[:, :, 0], block.conv_shortcut.bias))
            elif stored.data_ptr() != rows.data_ptr():  # from a file
                rows.copy_(stored)

        self.convolve(block.conv2, h, NormalisedClip(block.norm2, h, self.zq), out, write_shortcut)
        self.store.release(h.rows)
        if not in_place:
            self.store.release(x.rows)
        return out

    def convolve(
        self,
        module: Any,
        x: ClipMap,
        source: StoredClip | NormalisedClip,
        out: ClipMap | None = None,
        write_residual: Callable[[int, int, Tensor], None] | None = None,
    ) -> ClipMap:
        """Return ``residual + module(source)``, written to out or to a new map. x: the map that the source is computed from."""
        out = out or self._new_map(module.conv.out_channels, x.frames, x.rows.height, x.width)

        def write_strip(first: int, last: int, frames: Tensor) -> Moments:
            rows = out.rows.reserve(first, last)
            if write_residual is None:
                out.as_clip(rows).copy_(frames)
            else:
                write_residual(first, last, rows)
                out.as_clip(rows).add_(frames)
            return out.rows.commit_strip(first, rows)

        out.rows.complete(self._convolve_strips(module, x, source, write_strip))
        return out

    def _write_output(self, decoder: Any, x: ClipMap, out: Tensor) -> None:
        """Write ``conv_out(silu(norm_out(x)))``."""

        def write_strip(first: int, last: int, frames: Tensor) -> None:
            out[:, :, :, first:last] = frames

        self._convolve_strips(decoder.conv_out, x, NormalisedClip(decoder.norm_out, x, self.zq), write_strip)

    def _convolve_strips(
        self, module: Any, x: ClipMap, source: StoredClip | NormalisedClip, write_strip: Callable[[int, int, Tensor], Result]
    ) -> list[Result]:
        """Return ``write_strip(first, last, rows)`` of each strip, and store the frames for the next batch.

        rows: rows first to last - 1 of ``module(source)``.
        """
        before = self._frames_before.pop(module, None)
        after = None if self.is_last else self._new_map(x.rows.channels, PADDING, x.rows.height, x.width)
        convolution = CausalConvolution(module.conv, x.frames, x.width, repeats_first_frame=before is None)
        values = convolution_values(x.rows.channels, module.conv.out_channels) * (PADDING + x.frames) // x.frames
        buffer = ClipBuffer(self.store)

        def convolve_strip(first: int, last: int) -> Result:
            padded = _padded_strip(x, source, before, buffer, first, last)
            if after is not None:
                after.write_unmeasured(first, padded[:, :, x.frames :, 1:-1])
            return write_strip(first, last, convolution(padded))

        results = self._run(convolve_strip, x, values)
        if before is not None:
            self.store.release(before.rows)
        if after is not None:
            self._frames_before[module] = after
        return results

    def _run(self, compute: Callable[[int, int], Result], x: ClipMap, values_per_pixel: int) -> list[Result]:
        """Return ``compute(first, last)`` of each strip of x, in order. Threads compute strips at the same time."""
        spans = self.memory.spans(x.rows, values_per_pixel)
        return run_in_threads(lambda span: compute(*span), spans, self.memory.strip_workers(x.rows, values_per_pixel))

    def _upsample(self, module: Any, x: ClipMap) -> ClipMap:
        frame_numbers = torch.arange(x.frames, dtype=torch.float32)[None, None, :, None, None]
        sources = upsampled_frames(module, frame_numbers).flatten().int().tolist()
        out = self._new_map(module.conv.out_channels, len(sources), 2 * x.rows.height, 2 * x.width)
        upsample: Callable[[Tensor], Tensor] = functools.partial(enlarge_frames, module.conv)
        if not module.conv.weight.is_cuda:  # on a GPU the kernels fold, and add the bias
            conv, pixels = module.conv, x.rows.height * x.rows.width
            upsample = prepare_upsample_conv(conv.weight, conv.bias, x.rows.dtype, pixels, self.memory.winograd)

        def write_strip(first: int, last: int) -> Moments:
            above, below = x.rows.halo(first, last)
            strip = x.read(first - above, last + below)[0].transpose(0, 1).contiguous(memory_format=torch.channels_last)
            large = upsample(strip)
            large = large[:, :, 2 * above : large.shape[2] - 2 * below]  # without the rows that saw padding, not neighbours
            rows = out.rows.reserve(2 * first, 2 * last)
            for frame, source in enumerate(sources):
                out.as_clip(rows)[0, :, frame] = large[source]
            return out.rows.commit_strip(2 * first, rows)

        values = upsampling_values(x.rows.channels, x.frames, out.frames)
        out.rows.complete(self._run(write_strip, x, values))
        self.store.release(x.rows)
        return out


def _padded_strip(
    x: ClipMap, source: StoredClip | NormalisedClip, before: ClipMap | None, buffer: ClipBuffer, first: int, last: int
) -> Tensor:
    """Return rows first - 1 to last of the frames before and of the source, zeros outside, in channels_last_3d."""
    above, below = x.rows.halo(first, last)
    padded = buffer.frames(PADDING + x.frames, last - first + HALO, x.width, x.rows.channels)
    inside = padded[:, :, :, 1 - above : padded.shape[3] - 1 + below]
    source.write_rows(first - above, last + below, inside[:, :, PADDING:])
    inside[:, :, :PADDING] = inside[:, :, PADDING, None] if before is None else before.read(first - above, last + below)
    if not above:
        padded[:, :, :, 0] = 0
    if not below:
        padded[:, :, :, -1] = 0
    return padded


class StoredClip:
    """Rows of a stored clip."""

    def __init__(self, x: ClipMap) -> None:
        self.x = x

    def write_rows(self, first: int, last: int, out: Tensor) -> None:
        """Write rows first to last - 1 to out, ``(1, C, T, rows, W)``."""
        out.copy_(self.x.read(first, last))


class NormalisedClip:
    """Rows of ``silu(norm(x, zq))``, a CogVideoXSpatialNorm3D with the statistics of all rows of x.

    Args:
        norm: its parameters are used, its forward is not.
        x: a completely written map, whose height and width are zq's times a power of two.
        zq: ``(1, zq_channels, t, h, w)``.
    """

    def __init__(self, norm: Any, x: ClipMap, zq: Tensor) -> None:
        self.norm, self.x, group_norm = norm, x, norm.norm_layer
        mean, rstd = x.rows.moments.group_statistics(group_norm.num_groups, group_norm.eps)
        scale = rstd if group_norm.weight is None else rstd * group_norm.weight
        shift = -mean * scale if group_norm.bias is None else group_norm.bias - mean * scale
        self.dtype = torch.promote_types(x.rows.dtype, torch.float32)
        self.scale, self.shift = (value.to(self.dtype)[None, :, None, None] for value in (scale, shift))
        splits = x.frames > 1 and x.frames % 2 == 1
        frames = resize_frames(zq, x.frames, zq.shape[3], split_first_frame=splits)
        self.zq = frames.transpose(2, 3).flatten(3, 4)  # (1, zq_channels, h, T * w)
        self.cell = x.rows.height // zq.shape[3]  # rows of x for each of zq's

    def write_rows(self, first: int, last: int, out: Tensor) -> None:
        """Write rows first to last - 1 to out, ``(1, C, T, rows, W)``."""
        values = self.x.as_clip(upcast(self.x.rows.read(first, last)))
        for part_first, part_last in split_at_cells(first, last, self.cell):
            cells = self.zq[:, :, part_first // self.cell : -(-part_last // self.cell)]
            y, b = (F.conv2d(cells, c.conv.weight[:, :, 0], c.conv.bias) for c in (self.norm.conv_y, self.norm.conv_b))
            y, b = upcast(y), upcast(b)
            scales, shifts = (t.chunk(self.x.frames, dim=3) for t in (y * self.scale, torch.addcmul(b, y, self.shift)))
            rows = slice(part_first - first, part_last - first)
            for frame, (scale, shift) in enumerate(zip(scales, shifts, strict=True)):
                result, target = values[:, :, frame, rows], out[:, :, frame, rows]
                if target.dtype == self.dtype:
                    F.silu(scale_by_cells(result, scale, shift, out=target), inplace=True)
                else:
                    target.copy_(F.silu(scale_by_cells(result, scale, shift), inplace=True))
