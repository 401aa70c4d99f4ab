"""MoVQ latents to images: SpatialNorm, attention and decoder with hand-written CUDA kernels and a native path."""

from ._extension import build_info
from ._version import __version__
from .accelerate import AccelerationReport, accelerate, restore
from .autoencoder import MOVQ
from .checkpoint import CheckpointError, from_pretrained, save_pretrained
from .decoder import MOVQDecoder
from .encoder import Encoder
from .export import ExportedDecoder, ExportError, export_decoder, load_exported
from .functional import attention, explain, spatial_attention, spatial_norm
from .graphs import CUDAGraphDecoder
from .modules import AttnBlock, Downsample, GroupNorm, ResnetBlock, SpatialNorm, Upsample
from .quantize import VectorQuantizer
from .ranges import annotate
from .sharded import decode_sharded
from .tiled import decode_tiled

__all__ = [
    "MOVQ",
    "AccelerationReport",
    "AttnBlock",
    "CUDAGraphDecoder",
    "CheckpointError",
    "Downsample",
    "Encoder",
    "ExportError",
    "ExportedDecoder",
    "GroupNorm",
    "MOVQDecoder",
    "ResnetBlock",
    "SpatialNorm",
    "Upsample",
    "VectorQuantizer",
    "__version__",
    "accelerate",
    "annotate",
    "attention",
    "build_info",
    "decode_sharded",
    "decode_tiled",
    "explain",
    "export_decoder",
    "from_pretrained",
    "load_exported",
    "restore",
    "save_pretrained",
    "spatial_attention",
    "spatial_norm",
]
