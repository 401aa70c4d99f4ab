"""Which CogVideoX decoders can run in strips: those whose layers are diffusers' own, unmodified."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..model.fusion import is_unmodified
from .accelerated import child_reason, is_diffusers_class, is_plain_conv3d, original_class
from .cogvideox import CogVideoXUpsample3D
from .video_norms import CogVideoXSpatialNorm3D

Reasons = Iterator[tuple[str, str | None]]


def check_model(vae: Any) -> None:
    """Raise TypeError unless vae is an AutoencoderKLCogVideoX, or accelerated from one, whose decoder can run in strips."""
    if not is_diffusers_class(original_class(vae), "AutoencoderKLCogVideoX"):
        raise TypeError(f"vae must be diffusers' AutoencoderKLCogVideoX, got {type(vae).__name__}")
    for name, reason in _decoder_reasons(vae):
        if reason is not None:
            raise TypeError(f"vae must have the layers of AutoencoderKLCogVideoX, unmodified, got {name}: {reason}")


def _decoder_reasons(vae: Any) -> Reasons:
    """Yield the name of each layer and why it cannot run in strips, or None if it can.

    A layer's class is checked before its attributes are read.
    """
    decoder = vae.decoder
    yield "vae", child_reason("decoder", decoder, "CogVideoXDecoder3D")
    yield from _convolution_reasons("decoder", decoder, "conv_in")
    yield from _block_reasons("decoder", "mid_block", decoder.mid_block, "CogVideoXMidBlock3D")
    for i, block in enumerate(decoder.up_blocks):
        yield from _block_reasons("decoder", f"up_blocks.{i}", block, "CogVideoXUpBlock3D")
    yield from _norm_reasons("decoder", decoder, "norm_out")
    yield "decoder", child_reason("conv_act", decoder.conv_act, nn.SiLU)
    yield from _convolution_reasons("decoder", decoder, "conv_out")
    for name, module in decoder.named_modules():
        yield f"decoder.{name}", None if is_unmodified(module) else "it is hooked or patched"


def _block_reasons(where: str, name: str, block: Any, expected: str) -> Reasons:
    yield where, child_reason(name, block, expected)
    where = f"{where}.{name}"
    for i, resnet in enumerate(block.resnets):
        yield where, child_reason(f"resnets.{i}", resnet, "CogVideoXResnetBlock3D")
        yield from _resnet_reasons(f"{where}.resnets.{i}", resnet)
    for i, upsampler in enumerate(getattr(block, "upsamplers", None) or ()):
        yield where, child_reason(f"upsamplers.{i}", upsampler, "CogVideoXUpsample3D")
        yield f"{where}.upsamplers.{i}", CogVideoXUpsample3D.unsupported_reason(upsampler)


def _resnet_reasons(where: str, resnet: Any) -> Reasons:
    for name in ("norm1", "norm2"):
        yield from _norm_reasons(where, resnet, name)
    for name in ("conv1", "conv2"):
        yield from _convolution_reasons(where, resnet, name)
    yield where, child_reason("nonlinearity", resnet.nonlinearity, nn.SiLU)
    yield where, child_reason("dropout", resnet.dropout, nn.Dropout)
    if resnet.in_channels != resnet.out_channels:
        conv = resnet.conv_shortcut
        plain = is_plain_conv3d(conv) and conv.kernel_size == (1, 1, 1) and conv.padding == (0, 0, 0)
        yield f"{where}.conv_shortcut", None if plain else "it is replaced, hooked or not 1x1x1"


def _norm_reasons(where: str, owner: Any, name: str) -> Reasons:
    norm = getattr(owner, name)
    yield where, child_reason(name, norm, "CogVideoXSpatialNorm3D")
    yield f"{where}.{name}", CogVideoXSpatialNorm3D.unsupported_reason(norm)


def _convolution_reasons(where: str, owner: Any, name: str) -> Reasons:
    layer = getattr(owner, name)
    yield where, child_reason(name, layer, "CogVideoXCausalConv3d")
    plain = is_plain_conv3d(layer.conv) and (layer.conv.kernel_size, layer.conv.padding) == ((3, 3, 3), (0, 1, 1))
    yield f"{where}.{name}", None if plain else "its convolution is replaced, hooked or not a padded 3x3x3"
