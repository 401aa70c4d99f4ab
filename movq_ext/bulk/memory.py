"""Memory: how much an image needs, how much is available, and how to tell that it ran out."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import cast

import torch

from ..model.decoder import MOVQDecoder
from ..model.encoder import Encoder
from ..model.layers import ResnetBlock, Stage

CONTROL_GROUPS = Path("/proc/self/cgroup")
CONTROL_GROUP_LIMITS = (Path("/sys/fs/cgroup"), "memory.max"), (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes")  # v2, v1
PROCESS_STATUS = Path("/proc/self/status")
MACHINE_STATUS = Path("/proc/meminfo")
CPU_OUT_OF_MEMORY = "can't allocate memory"  # torch raises a plain RuntimeError with this text


def available_memory(device: torch.device, threads: int) -> int:
    """Return the bytes available to decodes: a GPU's free memory, or the threads' share of the machine's memory."""
    if device.type == "cuda":
        return _free_gpu_memory(device)
    return int(min(1.0, threads / (os.cpu_count() or 1)) * machine_memory())


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate: of a GPU, or of the machine within a container's limit."""
    if device.type == "cuda":
        return _free_gpu_memory(device)
    left = machine_memory() - (_read_kilobytes(PROCESS_STATUS, "VmRSS") or 0)
    free = _read_kilobytes(MACHINE_STATUS, "MemAvailable")
    return max(0, left if free is None else min(left, free))


def _free_gpu_memory(device: torch.device) -> int:
    """Return the bytes that the driver has left, and those that torch holds in its cache."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def machine_memory() -> int:
    """Return the machine's memory in bytes, or the limit of a container or a batch job if that is lower."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize]
    for limit in _limit_files():
        with suppress(OSError, ValueError):  # the file does not exist, or says "max"
            sizes.append(int(limit.read_text()))
    return min(sizes)


def _limit_files() -> list[Path]:
    """Return the files that may limit the memory of this process's control group, and of the groups that contain it."""
    groups = [PurePosixPath("/")]  # in a container that hides the groups around it, or shows them without their files
    with suppress(OSError, ValueError):
        for line in CONTROL_GROUPS.read_text().splitlines():
            group = PurePosixPath(line.split(":", 2)[2])
            groups += [group, *group.parents]
    return [root / str(group).lstrip("/") / name for root, name in CONTROL_GROUP_LIMITS for group in dict.fromkeys(groups)]


def _read_kilobytes(status: Path, name: str) -> int | None:
    """Return a value in bytes from a file of ``NAME: 1 kB`` lines, or None if the system does not have it."""
    with suppress(OSError):
        if match := re.search(rf"^{name}:\s*(\d+) kB$", status.read_text(), re.MULTILINE):
            return int(match[1]) << 10
    return None


def peak_values_per_pixel(network: MOVQDecoder | Encoder) -> int:
    """Return the peak number of feature values held per pixel of the image.

    The peak is in one residual block, which holds its input, the normalised input, the convolution's output and the sum. A block
    of level ``l`` runs at ``1 / 4**l`` of the image's pixels; its share is rounded up. An encoder without blocks in its levels
    has its peak in the first downsampling, which holds its input, the padded input and the output.
    """
    stages = enumerate(cast(Stage, stage) for stage in (network.up if isinstance(network, MOVQDecoder) else network.down))
    blocks = ((level, cast(ResnetBlock, block)) for level, stage in stages for block in stage.block)
    values = (-(-2 * (block.in_channels + block.out_channels) >> 2 * level) for level, block in blocks)
    return max(values, default=3 * network.conv_in.out_channels)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Return True if a GPU or the CPU could not allocate memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or CPU_OUT_OF_MEMORY in str(error)
