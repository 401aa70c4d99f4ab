"""Decode clips in bounded memory, without approximation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..model.feature_maps import MapStore
from ..model.strip_checks import check_no_dropout
from ..model.strip_spans import HALO
from ..model.tiled import check_max_memory
from ..model.working_memory import WorkingMemory, convolution_values
from ..ops.thread_pool import num_workers
from .clip_checks import check_model
from .clip_convolution import PADDING
from .clip_strips import (
    ClipStrips,
    block_upsamplers,
    blocks,
    output_frames,
    upsampled_count,
    upsamplers,
    upsampling_values,
)

MAX_STRIP_BYTES = 256 << 20  # of the strips computed at once, on a CPU, where larger strips would only take memory


@torch.no_grad()
def decode_clip_tiled(vae: Any, z: Tensor, *, max_memory: int, folder: str | None = None) -> Tensor:
    """Return ``vae.decode(z).sample`` of diffusers' AutoencoderKLCogVideoX, decoded in bounded memory and without gradients.

    Every batch of frames (``vae.num_latent_frames_batch_size``) is decoded in strips of rows, with the group norms' statistics of
    all rows. diffusers' tiling normalises every tile alone and blends them, which leaves seams. Strips leave none.

    ``max_memory`` covers the strips that threads compute at once (at most half), the maps between layers, and the frames that
    convolutions carry over to the next batch. Maps beyond it go to temporary files. It does not cover:

    - weights, one layer's packed weights, latents and the clip;
    - for float16 on a CPU, which is computed in float32, float32 copies of the weights;
    - for float64 on a CPU, the workspace of PyTorch's convolutions.

    The clips of a batch are decoded one after another. No ``torch.no_grad()`` is needed. The model may be accelerated.
    ``vae.use_tiling``, ``vae.use_slicing`` and autocast are ignored.

    Args:
        vae: an AutoencoderKLCogVideoX, in evaluation mode if it has dropout.
        z: ``(B, latent_channels, t, h, w)``, of the model's dtype and device.
        max_memory: bytes of the device's memory.
        folder: where to create the temporary files; the system's default if None.

    Returns:
        The clip ``(B, out_channels, T, H, W)``, equal to ``vae.decode(z).sample`` up to rounding.

    Raises:
        TypeError: vae has another class, or replaced, hooked or patched layers (adapters, quantised weights); z's dtype differs;
            max_memory is not an int.
        ValueError: z has another shape or device; max_memory is too small for one row of the largest map; dropout is active.
        OSError: the temporary files do not fit on the disk.
    """
    check_model(vae)
    _check_latents(vae, z)
    check_no_dropout("vae", vae)
    batches = frame_batches(z.shape[2], vae.num_latent_frames_batch_size)
    frames = max(last - first for first, last in batches)
    # As for images, float32 is more accurate on a CPU and much faster than PyTorch's float16.
    dtype = torch.float32 if z.dtype == torch.float16 and z.device.type == "cpu" else z.dtype
    check_max_memory(max_memory, _min_memory(vae.decoder, frames, z.shape[4], dtype), "z", z)
    decoder = vae.decoder if dtype == z.dtype else copy.deepcopy(vae.decoder).to(dtype)
    memory = _divide(max_memory, z.device)
    total = sum(output_frames(vae.decoder, last - first) for first, last in batches)
    scale = 2 ** len(upsamplers(vae.decoder))
    out = z.new_empty(z.shape[0], vae.decoder.conv_out.conv.out_channels, total, scale * z.shape[3], scale * z.shape[4])
    for latents, clip in zip(z.split(1), out.split(1), strict=True):
        with MapStore(dtype, z.device, memory.maps, folder) as store, torch.autocast(z.device.type, enabled=False):
            _decode_clip(vae, decoder, latents, clip, ClipStrips(store, memory))
        del store  # and its memory, before the next
    return out


def _decode_clip(vae: Any, decoder: Any, z: Tensor, out: Tensor, strips: ClipStrips) -> None:
    """Write the clip of one latent ``(1, latent_channels, t, h, w)`` to out, ``(1, out_channels, T, H, W)``.

    decoder: vae's, in the dtype of the maps.
    """
    batches = [z[:, :, first:last] for first, last in frame_batches(z.shape[2], vae.num_latent_frames_batch_size)]
    if vae.post_quant_conv is not None:  # not in a worker: it may have hooks
        batches = [vae.post_quant_conv(batch) for batch in batches]

    def decode_batches() -> Tensor:
        start = 0
        for number, batch in enumerate(batches, start=1):
            count = output_frames(decoder, batch.shape[2])
            strips.decode(decoder, batch.to(strips.store.dtype), out[:, :, start : start + count], number == len(batches))
            start += count
        return out

    strips.memory.run(decode_batches)


def _divide(max_memory: int, device: torch.device) -> WorkingMemory:
    """Return how much of max_memory is for strips, at most half, and how much for maps."""
    if device.type != "cpu":
        return WorkingMemory(max_memory // 2, maps=max_memory - max_memory // 2)
    strip = min(max_memory // 2, MAX_STRIP_BYTES)
    return WorkingMemory(strip, maps=max_memory - strip, workers=num_workers())


def frame_batches(frames: int, size: int) -> list[tuple[int, int]]:
    """Return (first, last) of each batch of latent frames, first to last - 1: as in diffusers, the first takes the rest."""
    rest = frames % size if frames >= size else frames - size
    starts = [0, *range(size + rest, frames, size)]
    return list(zip(starts, [*starts[1:], frames], strict=True))


def _check_latents(vae: Any, z: Tensor) -> None:
    channels, weight = vae.config.latent_channels, vae.decoder.conv_in.conv.weight
    if z.dim() != 5 or z.shape[1] != channels or z.numel() == 0:
        raise ValueError(f"z must have shape (B, {channels}, frames, height, width), not empty, got {tuple(z.shape)}")
    if z.dtype != weight.dtype:
        raise TypeError(f"z must have the model's dtype {weight.dtype}, got {z.dtype}")
    if z.device != weight.device:
        raise ValueError(f"z must be on the model's device {weight.device}, got {z.device}")


def _min_memory(decoder: Any, frames: int, width: int, dtype: torch.dtype) -> int:
    """Return the smallest max_memory: half of it holds a strip of one row of the largest map.

    Args:
        decoder: of an AutoencoderKLCogVideoX.
        frames, width: of its latent.
        dtype: of the maps.
    """
    largest = 0  # values in all tensors of a strip of one row
    for block in blocks(decoder):
        for resnet in block.resnets:
            values = convolution_values(resnet.in_channels, resnet.out_channels)
            largest = max(largest, (1 + HALO) * (frames + PADDING) * width * values)
        for upsampler in block_upsamplers(block):
            out_frames = upsampled_count(upsampler, frames)
            values = upsampling_values(upsampler.conv.in_channels, frames, out_frames)
            largest = max(largest, (1 + HALO) * frames * width * values)
            frames, width = out_frames, 2 * width
    return 2 * largest * dtype.itemsize
