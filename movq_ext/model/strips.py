"""Run a decoder or an encoder strip by strip.

The result matches whole maps up to rounding, but working memory holds only one strip.

- A convolution's strip has one more row of input above and below.
- A norm uses the statistics of the whole map, which are gathered while the map is written.
- Attention stores the keys and values of all positions, or the normalised map that serves as both, and walks over strips of
  queries.

So strips leave no seams, unlike tiles that are decoded separately and blended.

On a CPU this is also faster: a strip is normalised, convolved and added to the residual while it is in the cache, and only the
layers' results are written to memory. Each thread computes strips of its own, so threads wait for each other once a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .. import profiling
from ..ops.functional import attention, shared_kv_attention
from ..ops.moments import Moments
from ..ops.native import compute_dtype
from ..ops.onednn import Convolution
from ..ops.thread_pool import run_in_threads
from .feature_maps import FeatureMap, MapStore
from .fusion import is_plain_conv3x3
from .layers import AttnBlock, Downsample, ResnetBlock, Upsample, blocks_with_pixels, is_plain_network
from .map_rows import MapRows, StoredRows
from .overwritten_rows import OverwrittenRows
from .strip_buffer import StripBuffer
from .strip_checks import LayeredDecoder, LayeredNetwork, check_decoder_layers, check_encoder_layers
from .strip_norms import NormalisedRows
from .strip_rows import ConvolvedRows, Pointwise, PointwiseRows, RowSource, pack_direct
from .strip_spans import Span
from .upsampled_rows import upsampled_rows
from .working_memory import (
    ATTENTION_VALUES,
    DOWNSAMPLE_VALUES,
    INPUT_VALUES,
    UPSAMPLE_VALUES,
    WorkingMemory,
    convolution_values,
    cpu_memory,
)

MAX_IMAGES_BYTES = 512 << 20  # of the maps and weights of images that threads decode at once, without a memory limit
REARRANGED_WEIGHTS = 3  # a layer's rearranged weights, such as Winograd factors, take at most this many times its own
Result = TypeVar("Result")


def decode_in_strips(
    decoder: LayeredDecoder, z: Tensor, zq: Tensor, memory: WorkingMemory | None = None, folder: str | None = None
) -> Tensor:
    """Return ``decoder(z, zq)``, computed without gradients. Threads decode an image each, or strips of the same image.

    Args:
        decoder: its layers must pass `check_decoder_layers`.
        z, zq: as for the decoder.
        memory: how much it takes; `cpu_memory` if None.
        folder: see `MapStore`.
    """
    if computes_in_float32(decoder, z):
        with torch.autocast("cpu", enabled=False):
            return decode_in_strips(*to_float32(decoder, z, zq), memory, folder).half()
    check_decoder_layers(decoder)
    memory = (memory or cpu_memory(compute_dtype(z))).for_network(decoder)

    def decode_image(index: int, memory: WorkingMemory) -> Tensor:
        image_z, image_zq = z[index : index + 1], zq[index : index + 1].contiguous(memory_format=torch.channels_last)
        with MapStore(compute_dtype(z), z.device, memory.maps, folder) as store:
            return Strips(store, image_zq, memory).decode(decoder, image_z)

    alone = range(_count_images_alone(decoder, z, memory))
    one_thread = memory._replace(strip=memory.strip // memory.workers, workers=1)
    images = run_in_threads(lambda index: decode_image(index, one_thread), alone, memory.workers)
    return memory.run(lambda: torch.cat([*images, *(decode_image(index, memory) for index in range(len(alone), len(z)))]))


def _count_images_alone(decoder: LayeredDecoder, z: Tensor, memory: WorkingMemory) -> int:
    """Return how many images are decoded by one thread each: as many as keep all threads busy. Threads share each of the others.

    Threads with an image each never wait for each other, but each has maps and rearranged weights of its own: all must be small.
    """
    if memory.maps is not None or memory.workers == 1 or len(z) < memory.workers:
        return 0
    weights = max((weight.numel() for layer in decoder.layers() for weight in layer.parameters()), default=0)
    blocks = blocks_with_pixels(decoder.layers(), z[0, 0].numel())
    # At most a block's input, and the map between its convolutions.
    map_bytes = max((pixels * (block.in_channels + block.out_channels) for block, pixels in blocks), default=0) * z.itemsize
    image_bytes = map_bytes + REARRANGED_WEIGHTS * weights * z.itemsize
    if memory.workers * image_bytes > MAX_IMAGES_BYTES:
        return 0
    return len(z) // memory.workers * memory.workers


def encode_in_strips(encoder: LayeredNetwork, x: Tensor, memory: WorkingMemory, folder: str | None = None) -> Tensor:
    """Return ``encoder(x)``, computed image by image and without gradients.

    Args:
        encoder: its layers must pass `check_encoder_layers`.
        x: as for the encoder.
        memory: how much it takes.
        folder: see `MapStore`.
    """
    check_encoder_layers(encoder)
    memory = memory.for_network(encoder)

    def encode_images() -> Tensor:
        latents = []
        for image in x.split(1):
            with MapStore(compute_dtype(x), x.device, memory.maps, folder) as store:
                latents.append(Strips(store, None, memory).encode(encoder, image))
        return torch.cat(latents)

    return memory.run(encode_images)


def computes_in_float32(decoder: LayeredDecoder, z: Tensor) -> bool:
    """Return True for float16 on a CPU: float32 is more accurate there and, with oneDNN, about fifty times as fast."""
    return compute_dtype(z) == torch.float16 and z.device.type == "cpu" and is_plain_network(cast(nn.Module, decoder))


def to_float32(decoder: LayeredDecoder, z: Tensor, zq: Tensor) -> tuple[LayeredDecoder, Tensor, Tensor]:
    """Return a float32 copy of the decoder and its latents."""
    return copy.deepcopy(decoder).float(), z.float(), zq.float()


class Strips:
    """Runs the layers of a decoder or an encoder on the maps of one image, strip by strip.

    A subclass may override the public methods: `BandStrips` computes only some rows of each map.

    Args:
        store: allocates the maps.
        zq: the latent that norms are conditioned on, ``(1, zq_ch, h, w)``; None for an encoder.
        memory: for a strip and a Winograd convolution.
    """

    def __init__(self, store: MapStore, zq: Tensor | None, memory: WorkingMemory) -> None:
        self.store, self.zq, self.memory = store, zq, memory
        self.buffer = self._new_buffer()

    def decode(self, decoder: LayeredDecoder, z: Tensor) -> Tensor:
        """Return the decoder's image of z, ``(1, z_channels, h, w)``."""
        h = self.run_layers(decoder, z)
        return self.features(h) if decoder.give_pre_end else self.output(decoder.norm_out, decoder.conv_out, h)

    def encode(self, encoder: LayeredNetwork, image: Tensor) -> Tensor:
        """Return the encoder's latents of an image, ``(1, in_channels, H, W)``."""
        return self.output(encoder.norm_out, encoder.conv_out, self.run_layers(encoder, image))

    def run_layers(self, network: LayeredNetwork, values: Tensor) -> FeatureMap:
        """Return the map before norm_out, for the network's input ``(1, C, H, W)``."""
        x = self.store_input(values)
        h = self.convolve(StoredRows(x), network.conv_in)
        self.store.release(x)
        for layer in network.layers():
            h = self.run_layer(layer, h)
        return h

    def store_input(self, values: Tensor) -> FeatureMap:
        """Return the network's input as a map."""
        x = self.store.allocate(*values.shape[1:])
        for first, last in self.spans(x, INPUT_VALUES * x.channels):
            x.write(first, values[:, :, first:last])
        return x

    def run_layer(self, layer: nn.Module, x: FeatureMap) -> FeatureMap:
        """Return ``layer(x)``, and release x."""
        with profiling.layer_range(layer):
            if isinstance(layer, ResnetBlock):
                return self._resnet_block(layer, x)
            if isinstance(layer, AttnBlock):
                return self._attn_block(layer, x)
            if isinstance(layer, Downsample):
                return self._downsample(layer, x)
            return self._upsample(cast(Upsample, layer), x)

    def features(self, x: FeatureMap) -> Tensor:
        """Return x as a tensor, contiguous in NCHW."""
        return x.read(0, x.height).contiguous()

    def output(self, norm: nn.Module, conv: nn.Conv2d, x: FeatureMap) -> Tensor:
        """Return ``conv(silu(norm(x)))``, ``(1, conv.out_channels, H, W)``."""
        out = self.store.empty(1, conv.out_channels, x.height, x.width)
        values = convolution_values(x.channels, conv.out_channels)
        convolved = ConvolvedRows(conv, self._normalised(norm, x, "silu"), self.buffer, self.spans(x, values))

        def write_strip(first: int, last: int) -> None:
            rows = out.new_zeros(1, last - first, x.width, conv.out_channels).permute(0, 3, 1, 2)
            convolved.add_rows(first, last, rows)
            out[:, :, first:last] = rows

        self.run(write_strip, x, values)
        return out

    def convolve(
        self,
        source: MapRows,
        conv: nn.Conv2d,
        out: FeatureMap | None = None,
        residual: RowSource | None = None,
        packed: Convolution | None = None,
    ) -> FeatureMap:
        """Return ``residual + conv(source)``, written to ``out`` or to a new map. packed: see `pack_direct`."""
        x = source.x
        if out is None:
            out = self.store.allocate(conv.out_channels, x.height, x.width)
        values = convolution_values(x.channels, conv.out_channels)
        convolved = ConvolvedRows(conv, source, self.buffer, self.spans(x, values), packed)

        def write_strip(first: int, last: int) -> Moments:
            rows = out.reserve(first, last)
            if residual is None:
                convolved.write_rows(first, last, rows)
            else:
                residual.write_rows(first, last, rows)
                convolved.add_rows(first, last, rows)
            return out.commit_strip(first, rows)

        out.complete(self.run(write_strip, x, values))
        return out

    def all_tokens(self, source: NormalisedRows, *layers: nn.Module) -> list[Tensor]:
        """Return each layer's result for all positions of a normalised map, ``(1, 1, H * W, C)``."""
        x = source.x
        tokens = [self.store.empty(1, 1, x.height * x.width, x.channels) for _ in layers]
        convolutions = [Pointwise(layer, x.dtype) for layer in layers]

        def write_strip(first: int, last: int) -> None:
            n = self.buffer.rows(x, last - first)
            source.write_rows(first, last, n)
            for convolution, whole in zip(convolutions, tokens, strict=True):
                convolution.write_to(_as_map(whole[:, :, first * x.width : last * x.width], x.width), n)

        self.run(write_strip, x, ATTENTION_VALUES * x.channels)
        return tokens

    def spans(self, x: FeatureMap, values_per_pixel: int) -> list[Span]:
        """Divide x into strips: return (first, last) for each, which has rows first to last - 1.

        Args:
            x: the map.
            values_per_pixel: number of values in all tensors of a strip, per pixel of x.
        """
        return self.memory.spans(x, values_per_pixel)

    def run(self, compute: Callable[[int, int], Result], x: FeatureMap, values_per_pixel: int) -> list[Result]:
        """Return ``compute(first, last)`` of each strip, in order. Threads compute strips at the same time.

        Args:
            compute: computes a strip.
            x, values_per_pixel: see `spans`.
        """
        spans = self.spans(x, values_per_pixel)
        return run_in_threads(lambda span: compute(*span), spans, self.memory.strip_workers(x, values_per_pixel))

    def _new_buffer(self) -> StripBuffer:
        return StripBuffer(self.store, self.memory.winograd, self.memory.workers)

    # --- Layers

    def _resnet_block(self, block: ResnetBlock, x: FeatureMap) -> FeatureMap:
        packed1, packed2 = self._pack_direct(x, block.conv1, block.conv2)
        out = h = None
        if block.out_channels <= block.in_channels and not hasattr(block, "conv_shortcut"):  # that reads neighbouring rows
            out = x.reuse_storage(block.out_channels)
            h = out.beside(block.out_channels)
        if out is not None and h is not None and out.channels < x.channels:
            self._convolve_over(block, x, h, out, packed1)
            shortcut: RowSource = StoredRows(out)
        else:
            h = self.convolve(self._normalised(block.norm1, x, "silu"), block.conv1, h, packed=packed1)
            shortcut = self._shortcut(block, x)
        out = self.convolve(self._normalised(block.norm2, h, "silu"), block.conv2, out, shortcut, packed2)
        for read in (h, x):
            if read.storage is not out.storage:
                self.store.release(read)
        return out

    def _convolve_over(
        self, block: ResnetBlock, x: FeatureMap, h: FeatureMap, out: FeatureMap, packed: Convolution | None
    ) -> None:
        """Write the block's first convolution to h and its shortcut to out, which lie side by side in the storage of x.

        So a block whose channels shrink to half or less needs no other map. packed: see `pack_direct`.
        """
        source, shortcut = OverwrittenRows(block.norm1, x, self.zq, "silu", self.buffer), self._shortcut(block, x)
        values = convolution_values(x.channels, h.channels)
        convolved = ConvolvedRows(block.conv1, source, self.buffer, self.spans(x, values), packed)

        def write_strip(first: int, last: int) -> Moments:
            rows, shortcut_rows = h.reserve(first, last), out.reserve(first, last)
            convolved.write_rows(first, last, rows)
            shortcut.write_rows(first, last, shortcut_rows)
            source.keep_borders(first, last)
            out.commit_unmeasured(first, shortcut_rows)
            return h.commit_strip(first, rows)

        h.complete(self.run(write_strip, x, values))

    def _pack_direct(self, x: FeatureMap, *convs: nn.Conv2d) -> list[Convolution | None]:
        """Return what `pack_direct` returns for each convolution. Each thread packs one."""

        def pack(conv: nn.Conv2d) -> Convolution | None:
            spans = self.spans(x, convolution_values(conv.in_channels, conv.out_channels))
            return pack_direct(conv, x, spans, self.memory.winograd)

        return run_in_threads(pack, convs, self._threads(x, convolution_values(x.channels, convs[0].out_channels)))

    def _threads(self, x: FeatureMap, values_per_pixel: int) -> int:
        """Return how many threads have a strip of x to compute, at least 1."""
        return max(1, min(len(self.spans(x, values_per_pixel)), self.memory.strip_workers(x, values_per_pixel)))

    def _shortcut(self, block: ResnetBlock, x: FeatureMap) -> RowSource:
        if hasattr(block, "conv_shortcut"):
            return ConvolvedRows(block.conv_shortcut, StoredRows(x), self.buffer)
        if hasattr(block, "nin_shortcut"):
            return PointwiseRows(block.nin_shortcut, x)
        return StoredRows(x)

    def _attn_block(self, block: AttnBlock, x: FeatureMap) -> FeatureMap:
        attend = self._attend_shared if block.shares_keys_and_values(x.dtype) else self._attend
        return attend(block, x, self._normalised(block.norm, x, None))

    def _attend(self, block: AttnBlock, x: FeatureMap, normalised: NormalisedRows) -> FeatureMap:
        k, v = self.all_tokens(normalised, block.k, block.v)
        q, proj_out = Pointwise(block.q, x.dtype), Pointwise(block.proj_out, x.dtype)
        out = x.reuse_storage(x.channels)

        def write_strip(first: int, last: int) -> Moments:
            n = self.buffer.rows(x, last - first)
            normalised.write_rows(first, last, n)
            attended = _as_map(attention(_as_tokens(q(n)), k, v), x.width)
            return out.write_strip(first, proj_out(attended).add_(x.read(first, last)))

        out.complete(self.run(write_strip, x, ATTENTION_VALUES * x.channels))
        return out

    def _attend_shared(self, block: AttnBlock, x: FeatureMap, normalised: NormalisedRows) -> FeatureMap:
        """Compute `_attend` from one tensor instead of keys and values, as `AttnBlock` does."""
        (all_n,) = self.all_tokens(normalised, nn.Identity())
        v, proj_out = Pointwise(block.v, x.dtype), Pointwise(block.proj_out, x.dtype)
        out = x.reuse_storage(x.channels)

        def write_strip(first: int, last: int) -> Moments:
            n = _as_map(all_n[:, :, first * x.width : last * x.width], x.width)
            q, scale = block.shared_queries(n)
            attended = _as_map(shared_kv_attention(_as_tokens(q), all_n, scale), x.width)
            return out.write_strip(first, proj_out(v(attended)).add_(x.read(first, last)))

        out.complete(self.run(write_strip, x, ATTENTION_VALUES * x.channels))
        return out

    def _upsample(self, layer: Upsample, x: FeatureMap) -> FeatureMap:
        x = self._compact(x)
        self.buffer = self._new_buffer()  # the previous blocks' strips were larger, and the maps are largest now
        out = self.store.allocate(x.channels, 2 * x.height, 2 * x.width)
        if layer.with_conv and is_plain_conv3x3(layer.conv):
            self._upsample_folded(layer.conv, x, out)
        else:
            self._upsample_by_module(layer, x, out)
        self.store.release(x)
        return out

    def _compact(self, x: FeatureMap) -> FeatureMap:
        """Return x without gaps between its rows, so that it holds no more memory than it needs beside a large map."""
        if x.is_compact:
            return x
        out = self.store.allocate(x.channels, x.height, x.width)
        out.complete(self.run(lambda first, last: out.write_strip(first, x.read(first, last)), x, INPUT_VALUES * x.channels))
        self.store.release(x)
        return out

    def _upsample_by_module(self, layer: Upsample, x: FeatureMap, out: FeatureMap) -> None:
        def write_strip(first: int, last: int) -> Moments:
            above, below = x.halo(first, last)
            strip = layer(x.read(first - above, last + below))
            # The module pads the strip with zeros: drop the output rows that saw padding instead of neighbours.
            return out.write_strip(2 * first, strip[:, :, 2 * above : strip.shape[2] - 2 * below])

        out.complete(self.run(write_strip, x, UPSAMPLE_VALUES * x.channels))

    def _upsample_folded(self, conv: nn.Conv2d, x: FeatureMap, out: FeatureMap) -> None:
        values = UPSAMPLE_VALUES * x.channels
        upsampled = upsampled_rows(conv, x, self.buffer, self._threads(x, values))

        def write_strip(first: int, last: int) -> Moments:
            rows = out.reserve(2 * first, 2 * last)
            upsampled.write_rows(first, last, rows)
            return out.commit_strip(2 * first, rows)

        out.complete(self.run(write_strip, x, values))

    def _downsample(self, layer: Downsample, x: FeatureMap) -> FeatureMap:
        out = self.store.allocate(x.channels, x.height // 2, x.width // 2)

        def write_strip(first: int, last: int) -> Moments:
            below = min(1, x.height - 2 * last)  # the last output row reads one row more; at the bottom the layer pads it
            return out.write_strip(first, layer(x.read(2 * first, 2 * last + below)))

        out.complete(self.run(write_strip, out, DOWNSAMPLE_VALUES * x.channels))
        self.store.release(x)
        return out

    def _normalised(self, norm: nn.Module, x: FeatureMap, activation: str | None) -> NormalisedRows:
        return NormalisedRows(norm, x, self.zq, activation, self.buffer)


def _as_tokens(rows: Tensor) -> Tensor:
    """``(1, C, rows, W)`` as the tokens of one head, ``(1, 1, rows * W, C)``."""
    return rows.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)


def _as_map(tokens: Tensor, width: int) -> Tensor:
    """``(1, 1, rows * W, C)`` as ``(1, C, rows, W)``."""
    rows: Tensor = tokens.flatten(0, 2).unflatten(0, (1, -1, width)).permute(0, 3, 1, 2)
    return rows
