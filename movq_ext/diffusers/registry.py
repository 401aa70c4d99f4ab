"""The accelerated class for each of diffusers' classes: created on first use, since diffusers is optional."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import nn

from .accelerated import Accelerated
from .attention import Attention
from .blocks import ResnetBlock2D, ResnetBlockCondNorm2D
from .coders import Decoder, Encoder
from .cogvideox import CogVideoXResnetBlock3D, CogVideoXUpsample3D
from .easyanimate import EasyAnimateCausalConv3d
from .frame_attention import HunyuanVideoMidBlock3D
from .frame_norms import MochiChunkedGroupNorm3D, MochiResnetBlock3D
from .kandinsky6 import Kandinsky6SRCausalConv3d, Kandinsky6SRResnetBlock3D
from .kvae_video import KVAECachedResnetBlock3D
from .norms import GroupNorm, SpatialNorm
from .output_norms import OutputNorm
from .replicated_border import CogVideoXCausalConv3d, HunyuanVideoCausalConv3d, KVAECachedCausalConv3d
from .residual_upsampling import Kandinsky6SRUpsample, KVAECachedPXSUpsample
from .temporal_blocks import AllegroTemporalConvLayer, ClipResnetBlock
from .upsampling import Upsample2D
from .video_norms import CogVideoXSpatialNorm3D, Kandinsky6SRSpatialNorm3D, KVAECachedSpatialNorm3D

QUALNAME_PREFIX = "accelerated_"

IMPLEMENTATIONS: dict[str, type[Accelerated]] = {
    "torch.nn.GroupNorm": GroupNorm,
    "diffusers.models.resnet.ResnetBlock2D": ResnetBlock2D,
    "diffusers.models.resnet.ResnetBlockCondNorm2D": ResnetBlockCondNorm2D,
    "diffusers.models.autoencoders.vae.Decoder": Decoder,
    "diffusers.models.autoencoders.vae.Encoder": Encoder,
    "diffusers.models.upsampling.Upsample2D": Upsample2D,
    "diffusers.models.attention_processor.Attention": Attention,
    "diffusers.models.attention_processor.SpatialNorm": SpatialNorm,
    "diffusers.models.resnet.TemporalResnetBlock": ClipResnetBlock,
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video.HunyuanVideoResnetBlockCausal3D": ClipResnetBlock,
    "diffusers.models.autoencoders.autoencoder_kl_magvit.EasyAnimateResidualBlock3D": ClipResnetBlock,
    "diffusers.models.upsampling.CogVideoXUpsample3D": CogVideoXUpsample3D,
    "diffusers.models.autoencoders.autoencoder_kl_kvae.KVAEDecoderSpatialNorm2D": SpatialNorm,
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox.CogVideoXSpatialNorm3D": CogVideoXSpatialNorm3D,
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox.CogVideoXResnetBlock3D": CogVideoXResnetBlock3D,
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox.CogVideoXCausalConv3d": CogVideoXCausalConv3d,
    "diffusers.models.autoencoders.autoencoder_kl_kvae_video.KVAECachedSpatialNorm3D": KVAECachedSpatialNorm3D,
    "diffusers.models.autoencoders.autoencoder_kl_kvae_video.KVAECachedResnetBlock3D": KVAECachedResnetBlock3D,
    "diffusers.models.autoencoders.autoencoder_kandinsky6_sr.Kandinsky6SRSpatialNorm3D": Kandinsky6SRSpatialNorm3D,
    "diffusers.models.autoencoders.autoencoder_kandinsky6_sr.Kandinsky6SRResnetBlock3D": Kandinsky6SRResnetBlock3D,
    "diffusers.models.autoencoders.autoencoder_kandinsky6_sr.Kandinsky6SRCausalConv3d": Kandinsky6SRCausalConv3d,
    "diffusers.models.autoencoders.autoencoder_kandinsky6_sr.Kandinsky6SRUpsample": Kandinsky6SRUpsample,
    "diffusers.models.autoencoders.autoencoder_kl_kvae_video.KVAECachedPXSUpsample": KVAECachedPXSUpsample,
    "diffusers.models.autoencoders.autoencoder_kl_kvae_video.KVAECachedCausalConv3d": KVAECachedCausalConv3d,
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video.HunyuanVideoMidBlock3D": HunyuanVideoMidBlock3D,
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video.HunyuanVideoCausalConv3d": HunyuanVideoCausalConv3d,
    "diffusers.models.autoencoders.autoencoder_kl_magvit.EasyAnimateCausalConv3d": EasyAnimateCausalConv3d,
    "diffusers.models.autoencoders.autoencoder_kl_allegro.AllegroTemporalConvLayer": AllegroTemporalConvLayer,
    "diffusers.models.autoencoders.autoencoder_kl_mochi.MochiChunkedGroupNorm3D": MochiChunkedGroupNorm3D,
    "diffusers.models.autoencoders.autoencoder_kl_mochi.MochiResnetBlock3D": MochiResnetBlock3D,
    "diffusers.models.autoencoders.autoencoder_kl_mochi.MochiEncoder3D": OutputNorm,
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox.CogVideoXEncoder3D": OutputNorm,
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox.CogVideoXDecoder3D": OutputNorm,
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video.HunyuanVideoEncoder3D": OutputNorm,
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video.HunyuanVideoDecoder3D": OutputNorm,
    "diffusers.models.autoencoders.autoencoder_kl_magvit.EasyAnimateEncoder": OutputNorm,
    "diffusers.models.autoencoders.autoencoder_kl_magvit.EasyAnimateDecoder": OutputNorm,
    "diffusers.models.autoencoders.autoencoder_kl_allegro.AllegroEncoder3D": OutputNorm,
    "diffusers.models.autoencoders.autoencoder_kl_allegro.AllegroDecoder3D": OutputNorm,
    "diffusers.models.autoencoders.autoencoder_kl_temporal_decoder.TemporalDecoder": OutputNorm,
}


@functools.cache
def accelerated_classes() -> dict[type[nn.Module], type[Accelerated]]:
    """Return a subclass of each of diffusers' classes, with the same name and our forward.

    Raises ImportError if diffusers is not installed.
    """
    try:
        import_module("diffusers.models.attention_processor")
    except ImportError as error:
        raise ImportError("accelerate needs diffusers: pip install diffusers") from error
    return {original: _subclass(original, implementation) for original, implementation in _installed_classes()}


def _installed_classes() -> Iterator[tuple[type[nn.Module], type[Accelerated]]]:
    for path, implementation in IMPLEMENTATIONS.items():
        module, _, name = path.rpartition(".")
        try:
            yield getattr(import_module(module), name), implementation
        except (ImportError, AttributeError):  # not in this version of diffusers
            continue


def _subclass(original: type[nn.Module], implementation: type[Accelerated]) -> type[Accelerated]:
    # pickle looks a class up by module and qualified name, where __getattr__ below finds it.
    names = {"__module__": __name__, "__qualname__": QUALNAME_PREFIX + original.__name__}
    return type(original.__name__, (implementation, original), {**names, "diffusers_class": original})


def __getattr__(name: str) -> Any:
    """Return an accelerated class by its qualified name, for pickle."""
    if name.startswith(QUALNAME_PREFIX):
        for accelerated in accelerated_classes().values():
            if accelerated.__qualname__ == name:
                return accelerated
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
