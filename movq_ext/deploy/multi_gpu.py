"""Decode one image on several processes: each computes a band of rows of every map.

This is a decode in strips whose maps have rows in other processes. After a process has written its last row of a map, it
exchanges the rows at the edges of its band with its neighbours, for convolutions, and its moments with all processes, for norms.
Attention also gathers the keys and values of all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.decoder import MOVQDecoder
from ..model.feature_maps import FeatureMap, MapStore, Storage
from ..model.strip_checks import LayeredDecoder, check_decoder_layers, check_no_dropout
from ..model.strip_norms import NormalisedRows
from ..model.strip_spans import Span
from ..model.strips import Strips, computes_in_float32, to_float32
from ..model.working_memory import WorkingMemory, cpu_memory
from ..ops.moments import Moments
from ..ops.native import compute_dtype

GPU_MEMORY = WorkingMemory(strip=1 << 30)  # enough pixels to fill a GPU; not yet measured on one
SAMPLED_VALUES = 64  # of each latent, to compare it between processes


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
    """Return ``decoder(z, zq)``, decoded by all processes of a group: for images too large or too slow for one GPU.

    Every process of the group calls this function with the same decoder, z and zq, and with gradients off::

        torch.distributed.init_process_group("nccl")
        with torch.inference_mode():
            image = movq_ext.decode_sharded(decoder, z, zq)

    The rows of the latent, and with them work and maps, are divided as evenly as possible. For each map, a process sends one row
    to each neighbour and the mean and variance of each channel to all. For each attention layer, every process receives the keys
    and values of all positions: ``2 * h * w * C`` elements, or half as many in 16-bit types, where one tensor holds both. If one
    process fails, the others wait until the group's timeout.

    Args:
        decoder: whole in every process, not sharded by FSDP; in evaluation mode if it has dropout.
        z, zq: as for ``decoder``, the same in every process. z needs at least one row per process.
        group: the default group if None. Its backend must support the latents' device: gloo for CPUs, nccl for GPUs.
        gather: return the whole image in every process.

    Returns:
        The image, equal to ``decoder(z, zq)`` up to rounding. With ``gather=False``, this process's rows of it,
        ``(B, out_ch, rows, W)``, and the index of the first row.

    Raises:
        ValueError: as the decoder; z and zq differ between processes; z has fewer rows than there are processes; the process is
            not in the group; dropout is active; a gradient would be recorded.
        TypeError: as `decode_tiled`; decoder is not a MOVQDecoder, or its parameters are sharded.
        RuntimeError: torch.distributed is not initialised.
    """
    _check_arguments(decoder, z, zq)
    with torch.no_grad():
        band = Band(group, z.shape[2])
        band.check_same(z, zq)
        if band.world_size > band.latent_rows:
            sizes = f"{band.latent_rows} rows for {band.world_size} processes"
            raise ValueError(f"z must have at least one row per process, got {sizes}")
        if computes_in_float32(decoder, z):
            with torch.autocast("cpu", enabled=False):
                rows = _decode_band(*to_float32(decoder, z, zq), band).half()
        else:
            rows = _decode_band(decoder, z, zq, band)
        height = z.shape[2] << (decoder.num_resolutions - 1)
        first, last = band.rows(height)
        if not gather:
            return rows.contiguous(), first
        whole = rows.new_empty(height, *(rows.shape[dim] for dim in (0, 1, 3)))  # rows first: a band is contiguous
        whole[first:last] = rows.permute(2, 0, 1, 3)
        band.all_gather_bands(whole)
        return whole.permute(1, 2, 0, 3).contiguous()


class Band:
    """The rows of each map that a process computes, and the communication between the processes.

    Args:
        group: the default group if None.
        latent_rows: rows of the latent; every map has a multiple of them.
    """

    def __init__(self, group: dist.ProcessGroup | None, latent_rows: int) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed must be initialised: call torch.distributed.init_process_group first")
        self.group, self.latent_rows = group, latent_rows
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must contain this process")

    def rows(self, height: int, rank: int | None = None) -> tuple[int, int]:
        """Return (first, last): the band of a process, this one by default, is rows first to last - 1 of a map."""
        rank = self.rank if rank is None else rank
        scale = height // self.latent_rows
        first, last = (self.latent_rows * r // self.world_size * scale for r in (rank, rank + 1))
        return first, last

    def haloed_rows(self, height: int) -> tuple[int, int]:
        """Return (first, last) of this process's band with one more row on either side, where the map has one."""
        first, last = self.rows(height)
        return max(0, first - 1), min(height, last + 1)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the x of every process, ``(processes, *x.shape)``."""
        out = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(out, x, self.group)
        return torch.stack(out)

    def all_gather_bands(self, whole: Tensor) -> None:
        """Fill in a contiguous tensor of bands, in dimension 0: each process sends its own band and receives the others."""
        works = []
        for rank in range(self.world_size):  # all_gather takes only bands of equal size
            first, last = self.rows(whole.shape[0], rank)
            works.append(dist.broadcast(_as_bytes(whole[first:last]), group=self.group, group_src=rank, async_op=True))
        for work in works:
            assert work is not None, "broadcast returns None outside the group"
            work.wait()

    def exchange(self, neighbours: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Send the first tensor to each neighbour and receive the second from it."""
        ops = []
        for rank, (sent, received) in neighbours.items():
            for operation, tensor in ((dist.isend, sent), (dist.irecv, received)):
                ops.append(dist.P2POp(operation, _as_bytes(tensor), group=self.group, group_peer=rank))
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()

    def check_same(self, z: Tensor, zq: Tensor) -> None:
        """Raise ValueError if z or zq differ between processes, in shape or clearly in a sample of their values."""
        shape = torch.tensor([*z.shape, *zq.shape], dtype=torch.float64, device=z.device)
        gathered = self.all_gather(torch.cat([shape, _sample(z), _sample(zq)]))
        shapes, samples = gathered[:, : len(shape)], gathered[:, len(shape) :]
        differ = (shapes != shapes[0]).any(1) | ((samples - samples[0]).abs().mean(1) > 0.1 * samples[0].abs().mean())
        if differ.any():
            ranks = differ.nonzero().flatten().tolist()
            raise ValueError(f"z and zq must be the same in all processes of the group, got different ones in ranks {ranks}")


class BandMap(FeatureMap):
    """A map that stores this process's band and one row more on either side, which the neighbours compute.

    Args:
        storage: of the rows ``band.haloed_rows(height)``.
    """

    def __init__(self, channels: int, height: int, width: int, storage: Storage, band: Band) -> None:
        super().__init__(channels, height, width, storage)
        self.moments: BandMoments = BandMoments(band)
        self._band = band
        self._first, self._last = band.rows(height)
        self._first_stored = band.haloed_rows(height)[0]

    def read(self, first: int, last: int) -> Tensor:
        return super().read(first - self._first_stored, last - self._first_stored)

    def reserve(self, first: int, last: int) -> Tensor:
        return super().reserve(first - self._first_stored, last - self._first_stored)

    def commit_unmeasured(self, first: int, rows: Tensor) -> None:
        super().commit_unmeasured(first - self._first_stored, rows)

    def complete(self, moments: Sequence[Moments]) -> None:
        """Merge the moments of the band's strips, and exchange its edges and moments with the other processes."""
        super().complete(moments)
        self._exchange_edges()
        self.moments.all_reduce()

    def _with_storage(self, channels: int) -> BandMap:
        return BandMap(channels, self.height, self.width, self.storage, self._band)

    def _exchange_edges(self) -> None:
        above, below = self.halo(self._first, self._last)
        neighbours = {}
        if above:
            neighbours[self._band.rank - 1] = self._stored_row(self._first), self._stored_row(self._first - 1)
        if below:
            neighbours[self._band.rank + 1] = self._stored_row(self._last - 1), self._stored_row(self._last)
        self._band.exchange(neighbours)

    def _stored_row(self, row: int) -> Tensor:
        return self.read(row, row + 1).permute(0, 2, 3, 1).view(-1)


class BandMoments(Moments):
    """Moments of the rows that this process wrote and, after `all_reduce`, of the whole map."""

    def __init__(self, band: Band) -> None:
        super().__init__()
        self._band = band

    def all_reduce(self) -> None:
        """Merge the moments of all processes."""
        assert self.mean is not None, "no rows were written"
        count = self.mean.new_full((1,), self.count)
        gathered = self._band.all_gather(torch.cat([count, self.mean, self.m2]))
        counts, (means, m2s) = gathered[:, :1], gathered[:, 1:].chunk(2, dim=1)
        self.mean = (means * (counts / counts.sum())).sum(0)
        self.m2 = (m2s + counts * (means - self.mean).square()).sum(0)
        self.count = int(counts.sum())


class BandStore(MapStore):
    """Allocates maps that store this process's band and the row on either side."""

    def __init__(self, dtype: torch.dtype, device: torch.device, band: Band) -> None:
        super().__init__(dtype, device)
        self.band = band

    def allocate(self, channels: int, height: int, width: int) -> BandMap:
        first, last = self.band.haloed_rows(height)
        return BandMap(channels, height, width, self.allocate_storage(channels * (last - first) * width), self.band)


class BandStrips(Strips):
    """Runs the layers of a decoder on this process's band of each map."""

    def __init__(self, store: BandStore, zq: Tensor, memory: WorkingMemory) -> None:
        super().__init__(store, zq, memory)
        self.band = store.band

    def store_input(self, values: Tensor) -> FeatureMap:
        """Return the network's input as a whole map, since every process has all of it."""
        channels, height, width = values.shape[1:]
        x = FeatureMap(channels, height, width, self.store.allocate_storage(values[0].numel()))
        x.write(0, values)
        return x

    def features(self, x: FeatureMap) -> Tensor:
        """Return the band of x."""
        return x.read(*self.band.rows(x.height))

    def output(self, norm: nn.Module, conv: nn.Conv2d, x: FeatureMap) -> Tensor:
        """Return the band of ``conv(silu(norm(x)))``."""
        first, last = self.band.rows(x.height)
        return super().output(norm, conv, x)[:, :, first:last]

    def all_tokens(self, source: NormalisedRows, *layers: nn.Module) -> list[Tensor]:
        """Return each layer's result for all positions, gathered from all processes."""
        tokens = super().all_tokens(source, *layers)
        for whole in tokens:
            self.band.all_gather_bands(whole[0, 0])
        return tokens

    def spans(self, x: FeatureMap, values_per_pixel: int) -> list[Span]:
        """Return the rows of each strip that lie in the band."""
        band_first, band_last = self.band.rows(x.height)
        spans = super().spans(x, values_per_pixel)
        return [
            (max(first, band_first), min(last, band_last)) for first, last in spans if first < band_last and last > band_first
        ]


def _decode_band(decoder: LayeredDecoder, z: Tensor, zq: Tensor, band: Band) -> Tensor:
    """Return this process's rows of the images, decoded one after another."""
    dtype = compute_dtype(z)
    memory = cpu_memory(dtype) if z.device.type == "cpu" else GPU_MEMORY
    memory = memory.for_network(decoder)

    def decode_bands() -> Tensor:
        latents = zip(z.split(1), zq.contiguous(memory_format=torch.channels_last).split(1), strict=True)
        return torch.cat([BandStrips(BandStore(dtype, z.device, band), zq, memory).decode(decoder, z) for z, zq in latents])

    return memory.run(decode_bands)


def _check_arguments(decoder: MOVQDecoder, z: Tensor, zq: Tensor) -> None:
    if not isinstance(decoder, MOVQDecoder):
        raise TypeError(f"decoder must be a MOVQDecoder, got {type(decoder).__name__}")
    if any(hasattr(p, "placements") for p in decoder.parameters()):  # DTensors
        raise TypeError("decoder's parameters must be whole in every process, got sharded ones (DTensor, as with FSDP)")
    decoder.check_latents(z, zq)
    check_decoder_layers(decoder)
    check_no_dropout("decoder", decoder)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (z, zq, *decoder.parameters())):
        raise ValueError("decoder, z and zq must not require gradients: call under torch.no_grad() or torch.inference_mode()")


def _as_bytes(x: Tensor) -> Tensor:
    """View a contiguous tensor as bytes, a type that every backend can send."""
    return x.view(torch.uint8)


def _sample(x: Tensor) -> Tensor:
    """Return values from all over x, in float64."""
    indices = torch.linspace(0, x.numel() - 1, SAMPLED_VALUES, dtype=torch.float64, device=x.device).long()
    return x.reshape(-1)[indices].double()
