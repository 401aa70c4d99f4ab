"""The decoders that are compared: ours, the published one and diffusers', with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from published_decoder import published
from torch import Tensor

import movq_ext
from movq_ext.model import working_memory

VQ = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, num_vq_embeddings=16384, vq_embed_dim=4,
          norm_type="spatial", down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
          up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3)  # fmt: skip
SMALL = dict(VQ, block_out_channels=(32, 32, 64, 64))
DDCONFIG = dict(ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[32], in_channels=3, resolution=256,
                z_channels=4)  # fmt: skip
SMALL_DDCONFIG = dict(DDCONFIG, ch=32, ch_mult=(1, 1, 2, 2))
KINDS = ("ours", "published", "diffusers")
Decode = Callable[[Tensor], Tensor]


def save_random(folder: Path, small: bool) -> None:
    """Write Kandinsky 2.x's model, or one with fewer channels, with random weights that every peer can read.

    The folder has diffusers' format, or ours if diffusers is not installed: then only its decoder is missing.
    """
    torch.manual_seed(0)
    try:
        from diffusers import VQModel
    except ImportError:
        movq_ext.save_pretrained(movq_ext.MOVQ(SMALL_DDCONFIG if small else DDCONFIG, 16384, 4), folder)
    else:
        VQModel(**(SMALL if small else VQ)).save_pretrained(folder)


def load(kind: str, folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Decode]:
    """Return one of KINDS in evaluation mode: the model, and a function that decodes quantised latents."""
    if kind == "diffusers":
        from diffusers import VQModel

        theirs: Any = VQModel.from_pretrained(folder).to(device, dtype).eval()
        return theirs, lambda z: theirs.decode(z, force_not_quantize=True).sample
    model = movq_ext.from_pretrained(folder).to(device, dtype).eval()
    if kind == "published":
        model.decoder = published(model.decoder)
    return model, lambda z: model.decoder(model.post_quant_conv(z), z)


def peer(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Decode]:
    """Load a peer by name: one of KINDS, followed by any of these words. Returns what `load` returns.

    - ``nhwc``: weights and latents in channels_last.
    - ``compiled``: by torch.compile.
    - ``graph``: replays a CUDA graph, ours by CUDAGraphDecoder and compiled ones by torch.compile's mode "reduce-overhead".
    - ``frozen``: compiled, with weights as constants that Inductor packs ahead of time. On a CPU, without gradients.
    - ``tiled``: ours, by decode_tiled.
    - ``in-operators``: ours, with threads inside every operator. Holds for the whole process.
    """
    kind, *words = name.split()
    model, network = load(kind, folder, device, dtype)
    if "nhwc" in words:
        model.to(memory_format=torch.channels_last)
    if "frozen" in words:
        torch._inductor.config.freezing = True
    if "compiled" in words or "frozen" in words:
        network = torch.compile(network, dynamic=False, mode="reduce-overhead" if "graph" in words else None)
    elif "graph" in words:
        graphed = movq_ext.CUDAGraphDecoder(model.decoder)
        network = lambda z: graphed(model.post_quant_conv(z), z)
    if "in-operators" in words:
        working_memory.num_workers = lambda: 1
    if "tiled" in words:
        decoder = model.decoder
        network = lambda z: movq_ext.decode_tiled(decoder, model.post_quant_conv(z), z, max_memory=small_memory(decoder, z))
    if "nhwc" in words:
        return model, lambda z: network(z.contiguous(memory_format=torch.channels_last))
    return model, network


def small_memory(decoder: movq_ext.MOVQDecoder, z: Tensor) -> int:
    """Return twice the least memory that decode_tiled accepts for these latents, which gives many strips and maps in files."""
    try:
        movq_ext.decode_tiled(decoder, z, z, max_memory=1)
    except ValueError as error:
        return 2 * int(next(word for word in str(error).split() if word.isdigit()))
    raise AssertionError("decode_tiled took a max_memory of 1 byte")
