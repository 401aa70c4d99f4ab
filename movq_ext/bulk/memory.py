"""Memory: how much a decode needs, how much is available, and how to tell that it ran out."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch

from ..model.decoder import MOVQDecoder
from ..model.layers import ResnetBlock, Stage

CONTAINER_LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # cgroup v2, v1
CPU_OUT_OF_MEMORY = "can't allocate memory"  # torch raises a plain RuntimeError with this text


def available_memory(device: torch.device, threads: int) -> int:
    """Return the bytes available to decodes: a GPU's free memory, or the threads' share of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(min(1.0, threads / (os.cpu_count() or 1)) * machine_memory())


def machine_memory() -> int:
    """Return the machine's memory in bytes, or the container's limit if that is lower."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize]
    for limit in CONTAINER_LIMIT_FILES:
        with suppress(OSError, ValueError):  # the file does not exist, or says "max"
            sizes.append(int(limit.read_text()))
    return min(sizes)


def peak_values_per_pixel(decoder: MOVQDecoder) -> int:
    """Return the peak number of feature values held per pixel of the image.

    The peak is in one residual block, which holds its input, the normalised input, the convolution's output and the sum. A block
    of level ``l`` runs at ``1 / 4**l`` of the image's pixels; its share is rounded up.
    """
    stages = enumerate(cast(Stage, stage) for stage in decoder.up)
    blocks = ((level, cast(ResnetBlock, block)) for level, stage in stages for block in stage.block)
    return max(-(-2 * (block.in_channels + block.out_channels) >> 2 * level) for level, block in blocks)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True if a GPU or the CPU could not allocate memory."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY in str(error)
