"""The encoder of VQGAN, which MoVQ shares: images to latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from .activation_checkpointing import ActivationCheckpointing
from .checks import (
    check_attention_levels,
    check_channels,
    check_flags,
    check_latent,
    check_level_channels,
    check_levels,
    check_number,
)
from .fusion import plain_weight
from .layers import AttnBlock, Downsample, MiddleBlock, ResnetBlock, Stage
from .norms import NORM_GROUPS, make_norm


class Encoder(ActivationCheckpointing):
    """Encoder of VQGAN (Esser et al., arXiv:2012.09841): GroupNorm + SiLU ResNet blocks, stride-2 downsampling.

    Args:
        ch: channels at full resolution; ``ch * m`` must be a multiple of 32 for every m in ch_mult.
        ch_mult: channel multiplier of each level, from full resolution to the latent's.
        num_res_blocks: number of ResNet blocks per level.
        attn_resolutions: map sizes, for an image of ``resolution``, at which attention follows every block.
        dropout: probability inside the ResNet blocks.
        resamp_with_conv: downsample by a stride-2 convolution rather than a 2x2 mean.
        in_channels: channels of the image.
        resolution: image size in pixels that attn_resolutions refers to. Any image of at least one latent cell can be encoded.
        z_channels: channels of the latent.
        double_z: double them, for the mean and log-variance of a KL model.
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
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = False,
        mid_attn: bool = True,
        gradient_checkpointing: bool = False,
        **ignorekwargs: Any,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        check_levels(ch_mult, num_res_blocks)
        check_channels(ch=ch, in_channels=in_channels, z_channels=z_channels)
        check_level_channels(ch, ch_mult, NORM_GROUPS)
        check_attention_levels(resolution, attn_resolutions)
        check_number("dropout", dropout, 0, 1)
        check_flags(resamp_with_conv=resamp_with_conv, double_z=double_z, mid_attn=mid_attn,
                    gradient_checkpointing=gradient_checkpointing)  # fmt: skip
        self.in_channels = in_channels
        self.num_resolutions = len(ch_mult)
        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        channels = ch
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(ch_mult):
            attends = resolution // 2**level in attn_resolutions
            stage = Stage()
            for _ in range(num_res_blocks):
                stage.block.append(ResnetBlock(in_channels=channels, out_channels=ch * multiplier, dropout=dropout))
                channels = ch * multiplier
                if attends:
                    stage.attn.append(AttnBlock(channels))
            if level < self.num_resolutions - 1:
                stage.downsample = Downsample(channels, resamp_with_conv)
            self.down.append(stage)
        self.mid = MiddleBlock(channels, dropout, mid_attn)
        self.norm_out = make_norm(channels, None, False)
        self.conv_out = nn.Conv2d(channels, 2 * z_channels if double_z else z_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images ``(B, in_channels, H, W)`` in [-1, 1] to latents ``(B, z_channels, h, w)``.

        h is ``H // 2 ** (len(ch_mult) - 1)``, w likewise.

        Raises ValueError (rank, channels, device, image smaller than one latent cell) or TypeError (dtype).
        """
        self.check_image(x)
        h: Tensor = self.conv_in(x)
        for layer in self.layers():
            h = self._run_layer(layer, h)
        return self._run_layer(self._to_latents, h)

    def layers(self) -> Iterator[nn.Module]:
        """Yield the layers between conv_in and norm_out, in execution order."""
        for module in self.down:
            stage = cast(Stage, module)
            for i, block in enumerate(stage.block):
                yield block
                if len(stage.attn):
                    yield stage.attn[i]
            if hasattr(stage, "downsample"):
                yield stage.downsample
        yield self.mid.block_1
        if self.mid.attn_1 is not None:
            yield self.mid.attn_1
        yield self.mid.block_2

    def check_image(self, x: Tensor) -> None:
        """Raise the ValueError or TypeError that `forward` raises for x."""
        check_latent("x", x, self.in_channels, plain_weight(self.conv_in))
        cell = 2 ** (self.num_resolutions - 1)
        if min(x.shape[-2:]) < cell:
            raise ValueError(f"x must be at least {cell} x {cell} (height x width), got {x.shape[-2]} x {x.shape[-1]}")

    def _to_latents(self, h: Tensor) -> Tensor:
        """``conv_out(silu(norm_out(h)))``."""
        return cast(Tensor, self.conv_out(self.norm_out(h, activation="silu")))
