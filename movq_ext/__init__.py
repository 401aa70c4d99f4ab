"""MoVQ latents to images: SpatialNorm, attention and decoder with hand-written CUDA kernels and a native path."""

from .autoencoder import MOVQ
from .decoder import MOVQDecoder
from .encoder import Encoder
from .functional import explain, spatial_attention, spatial_norm
from .modules import AttnBlock, Downsample, GroupNorm, ResnetBlock, SpatialNorm, Upsample
from .quantize import VectorQuantizer

__all__ = [
    "MOVQ",
    "AttnBlock",
    "Downsample",
    "Encoder",
    "GroupNorm",
    "MOVQDecoder",
    "ResnetBlock",
    "SpatialNorm",
    "Upsample",
    "VectorQuantizer",
    "explain",
    "spatial_attention",
    "spatial_norm",
]
