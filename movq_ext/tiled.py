"""Decoding large images in bounded memory, exactly: strip by strip, with the statistics and the attention of the whole image.

Every layer walks over strips of rows. A convolution's strip takes one more row of its input on either side; group norm's mean and variance
are gathered over all strips of a map before any is normalised; attention keeps the keys and values of all positions and walks over
queries. Maps between layers are kept in memory while they fit the budget, else in a temporary file. So, unlike tiles that are decoded
apart and blended, strips leave no seams: the result is that of decoding whole, up to rounding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import MOVQDecoder
from .functional import attention
from .modules import AttnBlock, GroupNorm, ResnetBlock, SpatialNorm, Upsample

MIB = 1 << 20
HALO = 2  # rows that a strip has beyond those it makes


class FeatureMap:
    """``(B, C, H, W)`` that is written and read by rows: in memory, or in a file."""

    def __init__(self, store: MapStore, batch: int, channels: int, height: int, width: int) -> None:
        self.store, self.shape = store, (batch, channels, height, width)
        self.bytes = batch * channels * height * width * store.dtype.itemsize
        self._rows: Tensor | None = None
        if store.reserve(self.bytes):
            self._rows = torch.empty(batch, height, width, channels, dtype=store.dtype, device=store.device)
        else:
            self._file = tempfile.TemporaryFile(dir=store.folder)
        self.moments = Moments(store.device)

    def read(self, first: int, last: int) -> Tensor:
        """Rows first to last - 1, as ``(B, C, rows, W)``. A copy: the caller may overwrite it."""
        if self._rows is not None:
            return self._rows[:, first:last].permute(0, 3, 1, 2).clone(memory_format=torch.channels_last)
        batch, channels, height, width = self.shape
        strip = torch.empty(batch, last - first, width, channels, dtype=self.store.dtype)
        for image, rows in enumerate(strip.view(torch.uint8).numpy()):
            self._file.seek((image * height + first) * rows[0].nbytes)
            if self._file.readinto(rows) != rows.nbytes:
                raise OSError("a temporary file of decode_tiled is shorter than what was written to it")
        return strip.to(self.store.device).permute(0, 3, 1, 2)

    def write(self, first: int, strip: Tensor) -> None:
        """Rows from first on; their part of the moments is added."""
        self.moments.add(strip)
        rows = strip.permute(0, 2, 3, 1).to(self.store.dtype)  # under autocast it may have another
        if self._rows is not None:
            self._rows[:, first : first + rows.shape[1]] = rows
            return
        for image, part in enumerate(rows.contiguous().cpu().view(torch.uint8).numpy()):
            self._file.seek((image * self.shape[2] + first) * part[0].nbytes)
            self._file.write(np.ascontiguousarray(part).data)

    def overwrite(self) -> None:
        """From here on rows are replaced by others' values: their moments begin anew. Rows not yet replaced can be read."""
        self.moments = Moments(self.store.device)

    def close(self) -> None:
        if self._rows is not None:
            self.store.release(self.bytes)
            self._rows = None
        else:
            self._file.close()


class Moments:
    """Mean and sum of squared distances of every channel of every image, gathered strip by strip (Chan et al.) in float64."""

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self.mean = self.m2 = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, strip: Tensor) -> None:
        """strip: ``(B, C, rows, W)``."""
        count = strip.shape[2] * strip.shape[3]
        variance, mean = torch.var_mean(widened(strip), dim=(2, 3), correction=0)
        variance, mean = variance.double(), mean.double()
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + variance * count + delta.square() * (self.count * count / total)
        self.count = total

    def of_groups(self, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal standard deviation of every channel's group, ``(B, C, 1, 1)`` float64."""
        size = self.mean.shape[1] // groups
        means = self.mean.unflatten(1, (groups, size))
        mean = means.mean(2, keepdim=True)
        variance = ((self.m2 / self.count).unflatten(1, (groups, size)) + (means - mean).square()).mean(2, keepdim=True)
        rstd = (variance + eps).rsqrt()
        return tuple(x.repeat_interleave(size, dim=2).flatten(1)[:, :, None, None] for x in (mean, rstd))  # type: ignore[return-value]


class MapStore:
    """Where maps are kept: at most ``budget`` bytes of them in memory, the others in temporary files in ``folder``."""

    def __init__(self, budget: int, dtype: torch.dtype, device: torch.device, folder: str | None) -> None:
        self.budget, self.dtype, self.device, self.folder = budget, dtype, device, folder
        self.used = 0
        self.maps: list[FeatureMap] = []

    def reserve(self, size: int) -> bool:
        fits = self.used + size <= self.budget
        self.used += size if fits else 0
        return fits

    def release(self, size: int) -> None:
        self.used -= size

    def new(self, batch: int, channels: int, height: int, width: int) -> FeatureMap:
        self.maps.append(FeatureMap(self, batch, channels, height, width))
        return self.maps[-1]

    def drop(self, map_: FeatureMap) -> None:
        self.maps.remove(map_)
        map_.close()

    def __enter__(self) -> MapStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for map_ in list(self.maps):
            self.drop(map_)


class Strips:
    """Runs a decoder's layers over strips whose tensors take about ``working`` bytes together."""

    def __init__(self, store: MapStore, zq: Tensor, working: int) -> None:
        self.store, self.zq, self.working = store, zq, working

    def run(self, decoder: MOVQDecoder, z: Tensor) -> Tensor:
        batch, _, height, width = z.shape
        x = self.store.new(batch, decoder.conv_in.out_channels, height, width)
        source = self.store.new(*z.shape)
        source.write(0, z)
        self.convolve(source, lambda strip, rows: strip, decoder.conv_in, x)
        self.store.drop(source)
        x = self.resnet_block(decoder.mid.block_1, x)
        if decoder.mid.attn_1 is not None:
            self.attn_block(decoder.mid.attn_1, x)
        x = self.resnet_block(decoder.mid.block_2, x)
        for level in reversed(range(decoder.num_resolutions)):
            stage = decoder.up[level]
            for i, block in enumerate(stage.block):
                x = self.resnet_block(block, x)
                if len(stage.attn):
                    self.attn_block(stage.attn[i], x)
            if level > 0:
                x = self.upsample(stage.upsample, x)
        if decoder.give_pre_end:
            return x.read(0, x.shape[2]).contiguous()
        out = z.new_empty(batch, decoder.conv_out.out_channels, *x.shape[2:])
        for first, strip in self.convolved(x, self.normalise(decoder.norm_out, x, "silu"), decoder.conv_out):
            out[:, :, first : first + strip.shape[2]] = strip
        return out

    # --- Layers

    def resnet_block(self, block: ResnetBlock, x: FeatureMap) -> FeatureMap:
        batch, _, height, width = x.shape
        h = self.store.new(batch, block.out_channels, height, width)
        self.convolve(x, self.normalise(block.norm1, x, "silu"), block.conv1, h)
        same = block.in_channels == block.out_channels
        out = x if same else self.store.new(batch, block.out_channels, height, width)
        norm2 = self.normalise(block.norm2, h, "silu")
        if same:
            x.overwrite()
        for first, strip in self.convolved(h, norm2, block.conv2):
            if hasattr(block, "conv_shortcut"):
                shortcut = self.haloed(x, lambda strip, rows: strip, block.conv_shortcut, first, first + strip.shape[2])
            else:
                shortcut = x.read(first, first + strip.shape[2])
                shortcut = block.nin_shortcut(shortcut) if hasattr(block, "nin_shortcut") else shortcut
            out.write(first, strip.add_(shortcut))
        self.store.drop(h)
        if not same:
            self.store.drop(x)
        return out

    def attn_block(self, block: AttnBlock, x: FeatureMap) -> None:
        batch, channels, height, width = x.shape
        normalise = self.normalise(block.norm, x, None)
        k, v = (torch.empty(batch, 1, height * width, channels, dtype=self.store.dtype, device=self.store.device) for _ in range(2))
        for first, last in self.spans(x, 8 * channels):
            n = normalise(x.read(first, last), (first, last))
            for layer, whole in ((block.k, k), (block.v, v)):
                whole[:, :, first * width : last * width] = layer(n).flatten(2).transpose(1, 2).unsqueeze(1)
        x.overwrite()
        for first, last in self.spans(x, 8 * channels):
            strip = x.read(first, last)
            q = block.q(normalise(strip.clone(), (first, last))).flatten(2).transpose(1, 2).unsqueeze(1)
            attended = attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, (last - first, width))
            x.write(first, strip.add_(block.proj_out(attended)))

    def upsample(self, layer: Upsample, x: FeatureMap) -> FeatureMap:
        batch, channels, height, width = x.shape
        out = self.store.new(batch, channels, 2 * height, 2 * width)
        for first, last in self.spans(x, 10 * channels):
            above, below = int(first > 0), int(last < height)
            strip = layer(x.read(first - above, last + below))
            # Rows at the ends of a haloed strip saw zeros in place of their neighbours: they are cut off.
            out.write(2 * first, strip[:, :, 2 * above : strip.shape[2] - 2 * below])
        self.store.drop(x)
        return out

    # --- What layers are made of

    def normalise(self, norm: nn.Module, x: FeatureMap, activation: str | None) -> Callable[[Tensor, tuple[int, int]], Tensor]:
        """A function of a strip of x, which it overwrites, and of its rows."""
        layer = norm.norm_layer if isinstance(norm, SpatialNorm) else norm
        assert isinstance(layer, nn.GroupNorm)
        mean, rstd = x.moments.of_groups(layer.num_groups, layer.eps)
        scale = rstd if layer.weight is None else rstd * layer.weight[:, None, None]
        shift = -mean * scale if layer.bias is None else layer.bias[:, None, None] - mean * scale
        scale, shift = (x.to(torch.promote_types(self.store.dtype, torch.float32)) for x in (scale, shift))
        modulate = None if isinstance(norm, GroupNorm) else self.modulation(norm, x.shape[2], x.shape[3])

        def apply(strip: Tensor, rows: tuple[int, int]) -> Tensor:
            out = torch.addcmul(shift, widened(strip), scale).to(strip.dtype)
            if modulate is not None:
                y, b = modulate(rows)
                out = out.mul_(y).add_(b)
            return F.silu(out, inplace=True) if activation == "silu" else out

        return apply

    def modulation(self, norm: SpatialNorm, height: int, width: int) -> Callable[[tuple[int, int]], tuple[Tensor, Tensor]]:
        """conv_y and conv_b of zq, resized, for rows of a map of this size."""
        source_rows, source_columns = (self.sources(self.zq.shape[2], height), self.sources(self.zq.shape[3], width))
        if not norm.add_conv:
            small = [layer(self.zq) for layer in (norm.conv_y, norm.conv_b)]

            def at(rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
                y, b = (x[:, :, source_rows[slice(*rows)]][:, :, :, source_columns] for x in small)
                return y, b

            return at

        def convolved(rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
            above, below = int(rows[0] > 0), int(rows[1] < height)
            zq = self.zq[:, :, source_rows[rows[0] - above : rows[1] + below]][:, :, :, source_columns]
            zq = convolve_rows(norm.conv, zq, 1 - above, 1 - below)
            return norm.conv_y(zq), norm.conv_b(zq)

        return convolved

    def sources(self, small: int, large: int) -> Tensor:
        """torch's nearest rule: from which cell of `small` each of `large` is."""
        cells = torch.arange(small, dtype=torch.float32, device=self.zq.device)
        return F.interpolate(cells[None, None], size=large, mode="nearest")[0, 0].long()

    def spans(self, x: FeatureMap, values: int) -> Iterator[tuple[int, int]]:
        """First and last row of each strip of x, for work that holds this many values for every pixel."""
        rows = max(1, self.working // (x.shape[0] * values * x.shape[3] * self.store.dtype.itemsize) - HALO)
        for first in range(0, x.shape[2], rows):
            yield first, min(first + rows, x.shape[2])

    def haloed(self, x: FeatureMap, before: Callable[[Tensor, tuple[int, int]], Tensor], conv: nn.Conv2d, first: int, last: int) -> Tensor:
        """Rows of conv(before(x))."""
        above, below = int(first > 0), int(last < x.shape[2])
        rows = first - above, last + below
        return convolve_rows(conv, before(x.read(*rows), rows), 1 - above, 1 - below)

    def convolved(self, x: FeatureMap, before: Callable[[Tensor, tuple[int, int]], Tensor], conv: nn.Conv2d) -> Iterator[tuple[int, Tensor]]:
        """Strip after strip of conv(before(x)), each with its first row. x must stay as it is."""
        for first, last in self.spans(x, convolution_values(x.shape[1], conv.out_channels)):
            yield first, self.haloed(x, before, conv, first, last)

    def convolve(self, x: FeatureMap, before: Callable[[Tensor, tuple[int, int]], Tensor], conv: nn.Conv2d, out: FeatureMap) -> None:
        for first, strip in self.convolved(x, before, conv):
            out.write(first, strip)


def widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def convolution_values(channels: int, out_channels: int) -> int:
    """For each pixel: a strip, its normalised copy, the two modulations and the padded copy; the result and what is added to it."""
    return 5 * channels + 2 * out_channels


def convolve_rows(conv: nn.Conv2d, strip: Tensor, above: int, below: int) -> Tensor:
    """A 3x3 convolution of rows that bring their neighbours along, with as many rows of zeros as are missing above and below."""
    if above or below:
        strip = F.pad(strip, (0, 0, above, below))
    return F.conv2d(strip, conv.weight, conv.bias, padding=(0, 1))


@torch.no_grad()
def decode_tiled(decoder: MOVQDecoder, z: Tensor, zq: Tensor, *, max_memory: int, folder: str | None = None) -> Tensor:
    """``decoder(z, zq)`` in bounded memory, for images of any size: exact, without seams, in evaluation and without gradients.

    Args:
        decoder: in evaluation mode, if it has dropout.
        z, zq: as for ``decoder``.
        max_memory: bytes of the device's memory to use beyond weights, latents and the image: half of it for maps between layers and half
            for the strip at work. An attention layer takes its keys and values beyond that: 2 * h * w * C elements. A decode that needs
            more keeps its maps in temporary files, up to ``(C0 + C1) * H * W`` elements for an image of ``H * W`` with C0 and C1 channels
            before and in the last level.
        folder: of the temporary files; the system's if None.

    Returns:
        What ``decoder(z, zq)`` returns, but for rounding.

    Raises:
        ValueError: as the decoder's; max_memory is too small for one row of the largest map; the decoder trains with dropout.
        TypeError: as the decoder's.
        OSError: the temporary files do not fit the disk.
    """
    decoder._check(z, zq)
    if decoder.training and any(isinstance(module, nn.Dropout) and module.p > 0 for module in decoder.modules()):
        raise ValueError("decoder must be in evaluation mode: call decoder.eval() first")
    scale = 2 ** (decoder.num_resolutions - 1)
    values = max(convolution_values(block.in_channels, block.out_channels) for stage in decoder.up for block in stage.block)
    least = 2 * (1 + HALO) * z.shape[0] * values * z.shape[3] * scale * z.element_size()
    if max_memory < least:
        raise ValueError(f"max_memory must be at least {least} bytes ({-(-least // MIB)} MiB) for z of shape {tuple(z.shape)}, got {max_memory}")
    with MapStore(max_memory // 2, z.dtype, z.device, folder) as store:
        return Strips(store, zq, max_memory // 2).run(decoder, z)
