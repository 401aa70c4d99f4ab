"""Residual blocks and last layers of diffusers' models strip by strip, on a CPU without gradients.

A strip of rows is normalised, convolved (by Winograd's method where that is faster) and added to the residual while it is in the
cache, as in `movq_ext.model.strips`. Only whole maps before and after convolutions are written to memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.feature_maps import FeatureMap, MapStore, MemoryStorage
from ..model.fusion import is_plain_conv1x1, is_plain_conv3x3
from ..model.map_rows import StoredRows
from ..model.norms import SpatialNorm
from ..model.strip_norms import NormalisedRows
from ..model.strip_rows import PointwiseRows, RowSource
from ..model.strips import Strips
from ..model.working_memory import CPU_MEMORY, INPUT_VALUES, WorkingMemory, cpu_memory
from ..ops.moments import Moments
from ..ops.native import is_inference
from ..ops.winograd import winograd_is_faster
from .accelerated import is_plain_instance


def can_run_in_strips(x: Tensor, zq: Tensor | None, *layers: nn.Module) -> bool:
    """True if all tensors are on a CPU and of one dtype, and no gradient is recorded for any."""
    tensors = [x, *(() if zq is None else (zq,)), *(parameter for layer in layers for parameter in layer.parameters())]
    return is_inference(*tensors) and all(t.device.type == "cpu" and t.dtype == x.dtype for t in tensors)


def block_runs_in_strips(block: Any, x: Tensor, zq: Tensor | None) -> bool:
    """True if `run_block` can compute a block whose norms are plain, and is faster than its layers."""
    return can_run_in_strips(x, zq, block) and is_faster_in_strips(block, *x.shape[2:]) and x.shape[1] == block.conv1.in_channels


def is_faster_in_strips(block: Any, height: int, width: int) -> bool:
    """True if the block's convolutions are plain and Winograd's method computes one of them faster for maps of this size."""
    convs, shortcut, dropout = (block.conv1, block.conv2), block.conv_shortcut, block.dropout
    if not all(map(is_plain_conv3x3, convs)) or not (shortcut is None or is_plain_conv1x1(shortcut)):
        return False
    if not is_plain_instance(dropout, nn.Dropout) or (dropout.training and dropout.p > 0) or block.output_scale_factor != 1:
        return False
    return any(winograd_is_faster(conv.weight, [(height, width)], CPU_MEMORY.winograd) for conv in convs)


def run_block(block: Any, x: Tensor, zq: Tensor | None) -> Tensor:
    """Return ``shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`` in the layout of x. zq conditions spatial norms."""
    memory = cpu_memory(x.dtype)
    return memory.run(lambda: _run_block(block, x, zq, memory))


def _run_block(block: Any, x: Tensor, zq: Tensor | None, memory: WorkingMemory) -> Tensor:
    layout = layout_of(x)
    x = x.contiguous(memory_format=torch.channels_last)
    batch, _, height, width = x.shape
    out = x.new_empty(batch, height, width, block.conv2.out_channels).permute(0, 3, 1, 2)
    strips = Strips(MapStore(x.dtype, x.device), None, memory)
    for i in range(batch):
        image, latent = measured_map(x[i : i + 1], strips), None if zq is None else zq[i : i + 1]
        h = strips.convolve(normalised(block.norm1, image, latent, strips), block.conv1)
        shortcut: RowSource = StoredRows(image)
        if block.conv_shortcut is not None:
            shortcut = PointwiseRows(block.conv_shortcut, image)
        strips.convolve(normalised(block.norm2, h, latent, strips), block.conv2, OutputMap(out[i : i + 1]), shortcut)
        strips.store.release(h)
    return out.contiguous(memory_format=layout)


def run_output(norm: Any, conv: nn.Conv2d, x: Tensor, zq: Tensor | None) -> Tensor:
    """Return ``conv(silu(norm(x, zq)))`` in NCHW."""
    memory = cpu_memory(x.dtype)
    return memory.run(lambda: _run_output(norm, conv, x, zq, memory))


def _run_output(norm: Any, conv: nn.Conv2d, x: Tensor, zq: Tensor | None, memory: WorkingMemory) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    images = []
    for i in range(x.shape[0]):
        strips = Strips(MapStore(x.dtype, x.device), None if zq is None else zq[i : i + 1], memory)
        images.append(strips.output(shared_norm(norm), conv, measured_map(x[i : i + 1], strips)))
    return torch.cat(images)


def layout_of(x: Tensor) -> torch.memory_format:
    """Return channels_last for maps in that layout only."""
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format


def measured_map(x: Tensor, strips: Strips) -> FeatureMap:
    """Return the map of one image in channels_last, without a copy."""
    stored = StoredMap(x)

    def measure(first: int, last: int) -> Moments:
        moments = Moments()
        moments.add(stored.read(first, last))
        return moments

    stored.complete(strips.run(measure, stored, INPUT_VALUES * stored.channels))
    return stored


class StoredMap(FeatureMap):
    """A map whose values are a tensor's, ``(1, C, H, W)`` in channels_last."""

    def __init__(self, x: Tensor) -> None:
        _, channels, height, width = x.shape
        super().__init__(channels, height, width, MemoryStorage(x.permute(0, 2, 3, 1).view(-1)))


class OutputMap(StoredMap):
    """A map that no norm of this block reads."""

    def commit_strip(self, first: int, rows: Tensor) -> Moments:
        self.commit_unmeasured(first, rows)
        return Moments()

    def complete(self, moments: Sequence[Moments]) -> None:
        pass


def normalised(norm: Any, x: FeatureMap, zq: Tensor | None, strips: Strips) -> NormalisedRows:
    return NormalisedRows(shared_norm(norm), x, zq, "silu", strips.buffer)


def shared_norm(norm: Any) -> nn.Module:
    """Return diffusers' group norm, or its spatial norm as ours."""
    return norm if isinstance(norm, nn.GroupNorm) else SharedSpatialNorm(norm)


class SharedSpatialNorm(SpatialNorm):
    """Our SpatialNorm with the layers of diffusers'."""

    def __init__(self, norm: Any) -> None:
        nn.Module.__init__(self)
        self.norm_layer, self.conv_y, self.conv_b, self.add_conv = norm.norm_layer, norm.conv_y, norm.conv_b, False
