"""MoVQ latents to images: SpatialNorm, attention and decoder with hand-written CUDA kernels and a native path."""

from ._version import __version__
from .deploy.cuda_graph import CUDAGraphDecoder
from .deploy.export import ExportedDecoder, ExportError, export_decoder, load_exported
from .deploy.multi_gpu import decode_sharded
from .diffusers.acceleration import AccelerationReport, accelerate, restore
from .diffusers.clip_tiled import decode_clip_tiled
from .io.tensor_files import CheckpointError
from .io.weights import from_pretrained, save_pretrained
from .model.autoencoder import MOVQ
from .model.decoder import MOVQDecoder
from .model.encoder import Encoder
from .model.layers import AttnBlock, Downsample, ResnetBlock, Upsample
from .model.norms import GroupNorm, SpatialNorm
from .model.quantize import VectorQuantizer
from .model.tiled import decode_tiled, encode_tiled
from .ops.extension import build_info
from .ops.functional import attention, shared_kv_attention, spatial_attention, spatial_norm
from .ops.paths import explain
from .profiling import annotate

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
    "decode_clip_tiled",
    "decode_sharded",
    "decode_tiled",
    "encode_tiled",
    "explain",
    "export_decoder",
    "from_pretrained",
    "load_exported",
    "restore",
    "save_pretrained",
    "shared_kv_attention",
    "spatial_attention",
    "spatial_norm",
]
