"""The MoVQ decoder: latents to images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.statistics import MeasuredMap
from ..ops.thread_pool import num_workers, run_in_threads, run_in_worker
from .activation_checkpointing import ActivationCheckpointing
from .checks import (
    check_attention_levels,
    check_batch,
    check_channels,
    check_flags,
    check_latent,
    check_level_channels,
    check_levels,
    check_number,
)
from .fusion import plain_weight, run_fused, runs_inference, submodules
from .layers import AttnBlock, MiddleBlock, ResnetBlock, Stage, Upsample, blocks_with_pixels, input_groups, is_plain_network
from .modulation import Modulations
from .norms import NORM_GROUPS, SpatialNorm, make_norm
from .strips import decode_in_strips

# Of maps at the image's resolution that threads compute at once, each for images of its own. Up to about this size one thread
# decodes whole maps in less time than all threads decode strips: its cache holds the maps, and strips take more operators.
MAX_WHOLE_MAP_BYTES = 2 << 20
# Of the largest map of an image that all threads decode as whole maps, inside operators. Strips of such maps are so small that
# threads of their own wait for the interpreter and for each other. Beside busy processes such a decode takes several times as
# long as in strips, about as long as other decoders.
MAX_SHARED_MAP_BYTES = 8 << 20


class DecoderStep(NamedTuple):
    """One layer between conv_in and norm_out.

    Attributes:
        name: unique in the decoder, such as ``up_1_block_0``.
        layer: a ResnetBlock, AttnBlock or Upsample, unless the user has replaced it.
        takes_zq: call it as ``layer(h, zq=zq)`` rather than ``layer(h)``.
    """

    name: str
    layer: nn.Module
    takes_zq: bool


class MOVQDecoder(ActivationCheckpointing):
    """Decoder of MoVQ (Zheng et al., arXiv:2209.09002) as released with Kandinsky 2.x and CogVideo.

    The image is ``2 ** (len(ch_mult) - 1)`` times the latent in height and width.

    Args:
        ch: channels at full resolution; ``ch * m`` must be a multiple of 32 for every m in ch_mult.
        out_ch: channels of the image.
        ch_mult: channel multiplier of each level, from full resolution to the latent's.
        num_res_blocks: each level has ``num_res_blocks + 1`` ResNet blocks.
        attn_resolutions: map sizes, for an image of ``resolution``, at which attention follows every block.
        dropout: probability inside the ResNet blocks.
        resamp_with_conv: convolve after every 2x upsampling.
        in_channels: channels of the encoder's image; unused here, but in the published configs.
        resolution: image size in pixels that attn_resolutions refers to. Latents of any size can be decoded.
        z_channels: channels of z.
        give_pre_end: return the features before norm_out.
        zq_ch: channels of zq; z_channels if None.
        add_conv: see `SpatialNorm`.
        mid_attn: use attention in the middle; False for diffusers models with ``mid_block_add_attention=False``.
        gradient_checkpointing: train in less memory, see ActivationCheckpointing.
        **ignorekwargs: ignored, since published configs hold keys of other classes.

    Raises:
        ValueError: ch_mult is empty, a number of channels is not positive, the channels of a level are not a multiple of 32,
            num_res_blocks is negative, or another argument is out of range. The message names the argument.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        zq_ch: int | None = None,
        add_conv: bool = False,
        mid_attn: bool = True,
        gradient_checkpointing: bool = False,
        **ignorekwargs: Any,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        zq_ch = z_channels if zq_ch is None else zq_ch
        check_levels(ch_mult, num_res_blocks)
        check_channels(ch=ch, out_ch=out_ch, z_channels=z_channels, zq_ch=zq_ch)
        check_level_channels(ch, ch_mult, NORM_GROUPS)
        check_attention_levels(resolution, attn_resolutions)
        check_number("dropout", dropout, 0, 1)
        check_flags(resamp_with_conv=resamp_with_conv, give_pre_end=give_pre_end, add_conv=add_conv, mid_attn=mid_attn,
                    gradient_checkpointing=gradient_checkpointing)  # fmt: skip
        self.ch = ch
        self.num_resolutions = len(ch_mult)
        self.num_res_blocks = num_res_blocks
        self.in_channels = in_channels
        self.resolution = resolution
        self.z_channels = z_channels
        self.zq_ch = zq_ch
        self.give_pre_end = give_pre_end
        norm: dict[str, Any] = {"zq_ch": zq_ch, "add_conv": add_conv}

        channels = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, channels, kernel_size=3, padding=1)
        self.mid = MiddleBlock(channels, dropout, mid_attn, **norm)

        self.up = nn.ModuleList()  # up[level] is level's stage; the highest level (smallest map) runs first
        for level in reversed(range(self.num_resolutions)):
            attends = resolution // 2**level in attn_resolutions
            stage = Stage()
            for _ in range(num_res_blocks + 1):
                out_channels = ch * ch_mult[level]
                stage.block.append(ResnetBlock(in_channels=channels, out_channels=out_channels, dropout=dropout, **norm))
                channels = out_channels
                if attends:
                    stage.attn.append(AttnBlock(channels, **norm))
            if level > 0:
                stage.upsample = Upsample(channels, resamp_with_conv)
            self.up.insert(0, stage)

        self.norm_out = make_norm(channels, **norm)
        self.conv_out = nn.Conv2d(channels, out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor, zq: Tensor) -> Tensor:
        """Decode z ``(B, z_channels, h, w)``, conditioned on zq ``(B, zq_ch, any height, any width)``.

        Returns:
            ``(B, out_ch, H, W)`` with ``H = h * 2 ** (len(ch_mult) - 1)``, roughly in [-1, 1]. With give_pre_end the features
            before norm_out, ``(B, ch * ch_mult[0], H, W)``.

        Raises:
            ValueError: z or zq has the wrong rank, channels or device, or is empty, or their batch sizes differ.
            TypeError: z or zq differs from the model in dtype, outside autocast.
        """
        self.check_latents(z, zq)
        if runs_inference(self, z, zq) and is_plain_network(self):
            if z.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
                if batch_size := self._images_in_cache(z):
                    return self._forward_in_cache(z, zq, batch_size)
                if self._operators_share_maps(z):
                    images = zip(z.split(1), zq.split(1), strict=True)
                    return torch.cat([self._forward_fused(*image) for image in images])
                return decode_in_strips(self, z, zq)  # strips stay in the cache
            return self._forward_fused(z, zq)
        z, zq = _in_channels_last(z, zq)
        h: Tensor = self.conv_in(z)
        for step in self.steps():
            h = self._run_step(step, h, zq)
        if not self.give_pre_end:
            h = self._run_layer(self._to_image, h, zq)
        return h.contiguous()

    def _forward_fused(self, z: Tensor, zq: Tensor) -> Tensor:
        """Compute forward in inference, for a decoder of unmodified layers.

        Runs each layer's ``_forward_fused``, and computes the modulations of neighbouring norms in one product. On a GPU each
        layer also computes the statistics that the next layer's norm needs.
        """
        z, zq = _in_channels_last(z, zq)
        layers = list(self.layers())
        modulations = Modulations(zq, _spatial_norms([*layers, self.norm_out]))
        followers = [*layers[1:], None if self.give_pre_end else self.norm_out]
        h = MeasuredMap(self.conv_in(z))
        for layer, follower in zip(layers, followers, strict=True):
            h = run_fused(layer, h, modulations, input_groups(follower))
        features, statistics = h
        if self.give_pre_end:
            return features.contiguous()
        image: Tensor = self.conv_out(run_fused(self.norm_out, features, modulations, "silu", statistics=statistics))
        return image.contiguous()

    def _forward_in_cache(self, z: Tensor, zq: Tensor, batch_size: int) -> Tensor:
        """Compute `_forward_fused` of batches that fit a thread's cache. Threads decode batches of their own."""
        batches = list(zip(z.split(batch_size), zq.split(batch_size), strict=True))
        if len(batches) == 1:
            return run_in_worker(lambda: self._forward_fused(z, zq))
        return torch.cat(run_in_threads(lambda batch: self._forward_fused(*batch), batches))

    def _images_in_cache(self, z: Tensor) -> int:
        """Return how many images each thread decodes as whole maps at once; 0 if they are decoded in strips.

        float16 is always decoded in strips, which compute it in float32.
        """
        if z.dtype == torch.float16:
            return 0
        threads = min(num_workers(), len(z))
        pixels = z[0, 0].numel() << 2 * (self.num_resolutions - 1)
        map_bytes = pixels * self.conv_out.in_channels * z.itemsize
        return min(MAX_WHOLE_MAP_BYTES // threads // map_bytes, -(-len(z) // threads))

    def _operators_share_maps(self, z: Tensor) -> bool:
        """Return True if images are decoded as whole maps, one after another, with all threads inside every operator.

        For fewer images than threads, whose largest map is small.
        """
        if z.dtype == torch.float16 or len(z) >= num_workers():
            return False
        blocks = blocks_with_pixels(self.layers(), z[0, 0].numel())
        largest = max(pixels * max(block.in_channels, block.out_channels) for block, pixels in blocks)
        return largest * z.itemsize <= MAX_SHARED_MAP_BYTES

    def forward_with_features_output(self, z: Tensor, zq: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode as `forward` does, and return every intermediate map by name, in execution order.

        The names: conv_in, mid_block_1, mid_attn_1, mid_block_2, up_{level}_block_{i}, up_{level}_attn_{i},
        up_{level}_upsample and, unless give_pre_end, norm_out, nonlinearity, conv_out. Maps are ``(B, C, height, width)`` in
        channels_last. Raises what `forward` raises.
        """
        self.check_latents(z, zq)
        z, zq = _in_channels_last(z, zq)
        h: Tensor = self.conv_in(z)
        features = {"conv_in": h}
        for step in self.steps():
            h = features[step.name] = self._run_step(step, h, zq)
        if not self.give_pre_end:
            features["norm_out"] = self.norm_out(h, zq)
            features["nonlinearity"] = F.silu(features["norm_out"])
            h = features["conv_out"] = self.conv_out(features["nonlinearity"])
        return h, features

    def steps(self) -> Iterator[DecoderStep]:
        """Yield the layers between conv_in and norm_out, in execution order."""
        yield DecoderStep("mid_block_1", self.mid.block_1, takes_zq=True)
        if self.mid.attn_1 is not None:
            yield DecoderStep("mid_attn_1", self.mid.attn_1, takes_zq=True)
        yield DecoderStep("mid_block_2", self.mid.block_2, takes_zq=True)
        for level in reversed(range(self.num_resolutions)):
            stage = cast(Stage, self.up[level])
            for i, block in enumerate(stage.block):
                yield DecoderStep(f"up_{level}_block_{i}", block, takes_zq=True)
                if len(stage.attn):
                    yield DecoderStep(f"up_{level}_attn_{i}", stage.attn[i], takes_zq=True)
            if level > 0:
                yield DecoderStep(f"up_{level}_upsample", stage.upsample, takes_zq=False)

    def layers(self) -> Iterator[nn.Module]:
        """Yield the layers of `steps`."""
        return (step.layer for step in self.steps())

    def check_latents(self, z: Tensor, zq: Tensor) -> None:
        """Raise the errors that `forward` raises for z and zq."""
        weight = plain_weight(self.conv_in)
        check_latent("z", z, self.z_channels, weight)
        check_latent("zq", zq, self.zq_ch, weight)
        check_batch(z=z, zq=zq)

    def _run_step(self, step: DecoderStep, h: Tensor, zq: Tensor) -> Tensor:
        return self._run_layer(step.layer, h, zq=zq) if step.takes_zq else self._run_layer(step.layer, h)

    def _to_image(self, h: Tensor, zq: Tensor) -> Tensor:
        """``conv_out(silu(norm_out(h, zq)))``."""
        return cast(Tensor, self.conv_out(self.norm_out(h, zq, activation="silu")))


def _spatial_norms(layers: Iterable[nn.Module]) -> list[SpatialNorm]:
    """Return the SpatialNorms among these layers and in them, in execution order."""
    return [module for layer in layers for module in submodules(layer) if isinstance(module, SpatialNorm)]


def _in_channels_last(z: Tensor, zq: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest layout for convolutions and norms, which all later maps inherit."""
    return z.contiguous(memory_format=torch.channels_last), zq.contiguous(memory_format=torch.channels_last)
