"""One image over several processes: each computes a band of rows of every map, and the image is that of one process.

It is a decode in strips whose maps have rows in other processes. When a process has written the last of its rows of a map, it
exchanges the rows at the edges of its band with its neighbours and the moments with all, so that whoever reads the map finds what
a convolution or a norm needs. Only attention needs more: keys and values of all positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.decoder import MOVQDecoder
from ..model.feature_maps import FeatureMap, Kept, MapStore, Moments
from ..model.layers import AttnBlock
from ..model.strips import STRIP_BYTES, Rows, Strips, check_decoder, check_evaluation, computes_in_float32, in_float32

GPU_STRIP_BYTES = 1 << 30  # enough pixels to fill a GPU; not yet measured on one
SAMPLES = 64  # of a latent, to see whether processes have the same


@overload
def decode_sharded(
    decoder: MOVQDecoder, z: Tensor, zq: Tensor, group: dist.ProcessGroup | None = None, *, gather: Literal[True] = True
) -> Tensor: ...


@overload
def decode_sharded(
    decoder: MOVQDecoder, z: Tensor, zq: Tensor, group: dist.ProcessGroup | None = None, *, gather: Literal[False]
) -> tuple[Tensor, int]: ...


def decode_sharded(
    decoder: MOVQDecoder, z: Tensor, zq: Tensor, group: dist.ProcessGroup | None = None, *, gather: bool = True
) -> Tensor | tuple[Tensor, int]:
    """``decoder(z, zq)`` with each process of a group computing a band of rows, for images too large or too slow for one GPU.

    Every process of the group calls it with the same decoder, z and zq. Work and maps are divided by the rows of the latent, as
    evenly as they go. For each map a process sends one row to each neighbour and the mean and variance of each channel to all.
    For each attention layer all processes get the keys and values of all positions, ``2 * h * w * C`` elements: passing them
    around a ring would take less memory.

    Args:
        decoder: in evaluation mode, if it has dropout; whole in every process (FSDP's parameters are not).
        z, zq: as for ``decoder``, the same in every process; z has a row for each of them at the least.
        group: the default group if None. Its backend must take the latents' device, as gloo does CPUs and nccl GPUs.
        gather: give every process the whole image.

    Returns:
        What ``decoder(z, zq)`` returns, but for rounding. With ``gather=False`` this process's rows of it,
        ``(B, out_ch, rows, W)``, and the number of the first of them.

    Raises:
        ValueError: as the decoder's; z and zq differ between processes; there are more processes than rows of z; the process is
            not in the group; the decoder trains with dropout; a gradient would be recorded.
        TypeError: as `decode_tiled`'s; the decoder is no MOVQDecoder, or some of its parameters are sharded.
        RuntimeError: torch.distributed is not initialised. An error in one process only leaves the others waiting for it.
    """
    _check(decoder, z, zq)
    with torch.no_grad():
        band = Band(group, z.shape[2])
        band.check_same(z, zq)
        if band.processes > band.cells:
            sizes = f"{band.cells} rows for {band.processes} processes"
            raise ValueError(f"z must have a row for every process of the group, got {sizes}")
        if computes_in_float32(decoder, z):
            rows = _decode(*in_float32(decoder, z, zq), band).half()
        else:
            rows = _decode(decoder, z, zq, band)
        height = z.shape[2] * 2 ** (decoder.num_resolutions - 1)
        first, last = band.rows(height)
        if not gather:
            return rows.contiguous(), first
        whole = rows.new_empty(height, *(rows.shape[dim] for dim in (0, 1, 3)))
        whole[first:last] = rows.permute(2, 0, 1, 3)
        band.complete(whole)
        return whole.permute(1, 2, 0, 3).contiguous()


class Band:
    """The rows that each process of a group makes of a map, and what the processes tell each other.

    Args:
        group: the default group if None.
        cells: rows of the latent; maps have a multiple of them.
    """

    def __init__(self, group: dist.ProcessGroup | None, cells: int) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed must be initialised: call torch.distributed.init_process_group first")
        self.group, self.cells = group, cells
        self.process, self.processes = dist.get_rank(group), dist.get_world_size(group)
        if self.process < 0:
            raise ValueError("group must contain this process")

    def rows(self, height: int, process: int | None = None) -> tuple[int, int]:
        """The first row of a process's band (by default this one's) in a map of so many, and the row behind its last."""
        process = self.process if process is None else process
        first, last = (self.cells * p // self.processes for p in (process, process + 1))
        return first * (height // self.cells), last * (height // self.cells)

    def gather(self, x: Tensor) -> Tensor:
        """Every process's x, ``(processes, *x.shape)``."""
        out = [torch.empty_like(x) for _ in range(self.processes)]
        dist.all_gather(out, x, self.group)
        return torch.stack(out)

    def complete(self, whole: Tensor) -> None:
        """Bring together a contiguous tensor of which each process has its own rows, in dimension 0."""
        works = []
        for process in range(self.processes):  # all_gather takes bands of one size only
            first, last = self.rows(whole.shape[0], process)
            works.append(dist.broadcast(_bytes(whole[first:last]), group=self.group, group_src=process, async_op=True))
        for work in works:
            assert work is not None, "a process of the group"
            work.wait()

    def swap(self, neighbours: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Send each neighbour the first of its tensors and receive the second."""
        ops = []
        for process, tensors in neighbours.items():
            for way, tensor in zip((dist.isend, dist.irecv), tensors, strict=True):
                ops.append(dist.P2POp(way, _bytes(tensor), group=self.group, group_peer=process))
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()

    def check_same(self, z: Tensor, zq: Tensor) -> None:
        """z and zq must be the same in every process, but for rounding."""
        shapes = torch.tensor([*z.shape, *zq.shape], dtype=torch.float64, device=z.device)
        found = self.gather(torch.cat([shapes, _sample(z), _sample(zq)]))
        shapes, samples = found[:, : len(shapes)], found[:, len(shapes) :]
        differ = (shapes != shapes[0]).any(1) | ((samples - samples[0]).abs().mean(1) > 0.1 * samples[0].abs().mean())
        if differ.any():
            others = differ.nonzero().flatten().tolist()
            raise ValueError(f"z and zq must be the same in every process of the group, got others in {others} than in 0")


class BandMap(FeatureMap):
    """A map of which this process writes its band only, and reads one row more on either side once that is done."""

    def __init__(self, channels: int, height: int, width: int, kept: Kept, band: Band) -> None:
        super().__init__(channels, height, width, kept)
        self.moments: BandMoments = BandMoments(band)
        self._band = band
        self._first, self._last = band.rows(height)
        self._begin = _kept_rows(height, band)[0]

    def read(self, first: int, last: int) -> Tensor:
        return super().read(first - self._begin, last - self._begin)

    def place(self, first: int, last: int) -> Tensor:
        return super().place(first - self._begin, last - self._begin)

    def keep(self, first: int, rows: Tensor) -> None:
        super().keep(first - self._begin, rows)
        if first + rows.shape[2] == self._last:
            self._swap_edges()
            self.moments.merge()

    def successor(self, channels: int) -> BandMap:
        return BandMap(channels, self.height, self.width, self._kept, self._band)

    def _swap_edges(self) -> None:
        neighbours = {}
        for process, own, beyond in ((-1, self._first, self._first - 1), (1, self._last - 1, self._last)):
            if 0 <= beyond < self.height:
                neighbours[self._band.process + process] = self._kept_row(own), self._kept_row(beyond)
        self._band.swap(neighbours)

    def _kept_row(self, row: int) -> Tensor:
        return self._kept.read((row - self._begin) * self._row, self._row)


class BandMoments(Moments):
    """Moments of the rows that this process wrote and, once merged, of the whole map."""

    def __init__(self, band: Band) -> None:
        super().__init__()
        self._band = band

    def merge(self) -> None:
        assert self.mean is not None
        count = self.mean.new_full((1,), self.count)
        parts = self._band.gather(torch.cat([count, self.mean, self.m2]))
        counts, (means, m2s) = parts[:, :1], parts[:, 1:].chunk(2, dim=1)
        self.mean = (means * (counts / counts.sum())).sum(0)
        self.m2 = (m2s + counts * (means - self.mean).square()).sum(0)
        self.count = int(counts.sum())


class BandStore(MapStore):
    """Makes maps of which this process has its band and the rows at either side."""

    def __init__(self, like: Tensor, band: Band) -> None:
        super().__init__(like)
        self.band = band

    def new(self, channels: int, height: int, width: int) -> BandMap:
        begin, end = _kept_rows(height, self.band)
        return BandMap(channels, height, width, self._keep(channels * (end - begin) * width), self.band)


class BandStrips(Strips):
    """Runs layers on this process's band of the maps of one image."""

    def __init__(self, store: BandStore, zq: Tensor, working: int) -> None:
        super().__init__(store, zq, working)
        self.band = store.band

    def first(self, conv: nn.Conv2d, z: Tensor) -> FeatureMap:
        source = MapStore(z).new(*z.shape[1:])  # which every process has whole
        source.write(0, z)
        return self._convolve(source, self._copied(source), conv, self.store.new(conv.out_channels, *z.shape[2:]))

    def rows(self, x: FeatureMap) -> Tensor:
        """The band of x."""
        return x.read(*self.band.rows(x.height))

    def last(self, norm: nn.Module, conv: nn.Conv2d, x: FeatureMap) -> Tensor:
        """The band of conv(silu(norm(x)))."""
        first, last = self.band.rows(x.height)
        return super().last(norm, conv, x)[:, :, first:last]

    def _keys_and_values(self, block: AttnBlock, x: FeatureMap, normalise: Rows) -> tuple[Tensor, Tensor]:
        k, v = super()._keys_and_values(block, x, normalise)
        for whole in (k, v):
            self.band.complete(whole[0, 0])
        return k, v

    def _spans(self, x: FeatureMap, values: int) -> Iterator[tuple[int, int]]:
        band_first, band_last = self.band.rows(x.height)
        for first, last in super()._spans(x, values):
            if first < band_last and last > band_first:
                yield max(first, band_first), min(last, band_last)


def _decode(decoder: MOVQDecoder, z: Tensor, zq: Tensor, band: Band) -> Tensor:
    """This process's rows of the images, one image after the other."""
    working = STRIP_BYTES if z.device.type == "cpu" else GPU_STRIP_BYTES
    images = zip(z.split(1), zq.contiguous(memory_format=torch.channels_last).split(1), strict=True)
    return torch.cat([BandStrips(BandStore(z, band), zq, working).decode(decoder, z) for z, zq in images])


def _check(decoder: MOVQDecoder, z: Tensor, zq: Tensor) -> None:
    if not isinstance(decoder, MOVQDecoder):
        raise TypeError(f"decoder must be a MOVQDecoder, got {type(decoder).__name__}")
    if any(hasattr(p, "placements") for p in decoder.parameters()):  # a DTensor's
        raise TypeError("decoder's parameters must be whole in every process, got sharded ones (DTensor), as FSDP makes them")
    decoder.check_latents(z, zq)
    check_decoder(decoder)
    check_evaluation(decoder)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (z, zq, *decoder.parameters())):
        raise ValueError("decoder, z and zq must not require a gradient: none is recorded. Call it under torch.no_grad()")


def _kept_rows(height: int, band: Band) -> tuple[int, int]:
    """The band of a map and a row on either side, where there is one."""
    first, last = band.rows(height)
    return max(0, first - 1), min(height, last + 1)


def _bytes(x: Tensor) -> Tensor:
    """A contiguous tensor's values in a type that every backend carries."""
    return x.view(torch.uint8)


def _sample(x: Tensor) -> Tensor:
    """Values from all over x."""
    return x.reshape(-1)[torch.linspace(0, x.numel() - 1, SAMPLES, dtype=torch.float64, device=x.device).long()].double()
