"""Convert a diffusers ``VQModel``: published names for its entries, and a config for MOVQ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model.checks import check_channels, check_count, check_flags
from ..model.norms import NORM_GROUPS
from .files import MAX_SHOWN_CHARACTERS, printable, read_json, require_file, wrap_errors
from .original_weights import NOMINAL_RESOLUTION, rename
from .tensor_files import CheckpointError, format_names

UP_BLOCK = re.compile(r"decoder\.up_blocks\.(\d{1,4})\.")
RENAMED = (
    (".mid_block.attentions.0.", ".mid.attn_1."),
    (".resnets.", ".block."),
    (".attentions.", ".attn."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".upsamplers.0.", ".upsample."),
    (".downsamplers.0.", ".downsample."),
    (".conv_norm_out.", ".norm_out."),
)
RENAMED_IN_ATTENTION = {"to_q": "q", "query": "q", "to_k": "k", "key": "k", "to_v": "v", "value": "v", "to_out.0": "proj_out",
                        "proj_attn": "proj_out", "group_norm": "norm", "spatial_norm": "norm"}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """Return the keyword arguments of MOVQ for the ``config.json`` of a diffusers ``VQModel``.

    Raises OSError if the file cannot be read, and CheckpointError unless it is a ``VQModel`` with ``norm_type="spatial"``.
    """
    require_file(path)
    with wrap_errors(CheckpointError, f"{path} is damaged or not a config of a diffusers VQModel"):
        return _convert_config(read_json(path), path)


def published_entries(state: Mapping[str, Tensor], levels: int | None, path: Path) -> dict[str, Tensor]:
    """Return diffusers' entries under the published names. Entries that have them already stay as they are.

    levels is the number of resolutions, counted from the names if None.

    Raises CheckpointError if an entry is there under both names.
    """
    if levels is None:
        levels = len({match[1] for name in state if (match := UP_BLOCK.match(name))})
    convolutions = {name: _as_convolution(name, tensor) for name, tensor in state.items()}
    return rename(convolutions, lambda name: _published_name(name, levels), path)


def _convert_config(config: Any, path: Path) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(config).__name__}")
    for key, default, expected in (
        ("_class_name", None, "VQModel"),
        ("norm_type", "group", "spatial"),
        ("norm_num_groups", 32, NORM_GROUPS),
        ("act_fn", "silu", "silu"),
    ):
        if config.get(key, default) != expected:
            advice = "; movq_ext.accelerate takes other models of diffusers" if key == "_class_name" else ""
            raise CheckpointError(f"{path}: expected {key} {expected!r}, got {_shown(config.get(key, default))}{advice}")
    widths = config["block_out_channels"]
    if not isinstance(widths, list) or not widths:
        raise CheckpointError(f"{path}: expected block_out_channels to be a list of integers, got {_shown(widths)}")
    check_channels(**{f"block_out_channels[{level}]": width for level, width in enumerate(widths)})
    check_channels(**{name: config[name] for name in ("in_channels", "out_channels", "latent_channels")})
    check_channels(vq_embed_dim=config.get("vq_embed_dim") or config["latent_channels"])
    check_count("num_vq_embeddings", config["num_vq_embeddings"])
    check_count("layers_per_block", config["layers_per_block"])
    check_flags(mid_block_add_attention=config.get("mid_block_add_attention", True))
    attention = _levels_with_attention(config, "down_block_types", "DownEncoderBlock2D", path)
    decoder_attention = _levels_with_attention(config, "up_block_types", "UpDecoderBlock2D", path)[::-1]
    if len(attention) != len(widths) or attention != decoder_attention:
        raise CheckpointError(f"{path}: expected the same levels in block_out_channels, down_block_types and up_block_types")
    if any(width % widths[0] for width in widths):
        raise CheckpointError(f"{path}: expected block_out_channels to be multiples of the first, got {_shown(widths)}")
    return {
        "ddconfig": {
            "ch": widths[0],
            "out_ch": config["out_channels"],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": config["layers_per_block"],
            "attn_resolutions": [NOMINAL_RESOLUTION >> level for level, attends in enumerate(attention) if attends],
            "in_channels": config["in_channels"],
            "resolution": NOMINAL_RESOLUTION,
            "z_channels": config["latent_channels"],
            "mid_attn": config.get("mid_block_add_attention", True),
        },
        "n_embed": config["num_vq_embeddings"],
        "embed_dim": config.get("vq_embed_dim") or config["latent_channels"],
    }


def _levels_with_attention(config: Mapping[str, Any], key: str, plain: str, path: Path) -> list[bool]:
    blocks = config[key]
    if not isinstance(blocks, list) or not all(isinstance(block, str) for block in blocks):
        raise CheckpointError(f"{path}: expected {key} to be a list of names, got {_shown(blocks)}")
    if others := set(blocks) - {plain, f"Attn{plain}"}:
        raise CheckpointError(f"{path}: expected {key} to be {plain} or Attn{plain}, got {format_names(others)}")
    return [block != plain for block in blocks]


def _shown(value: object) -> str:
    return printable(repr(value), MAX_SHOWN_CHARACTERS)


def _published_name(name: str, levels: int) -> str:
    """Convert a name: with 4 levels, ``decoder.up_blocks.0.resnets.1.conv1.weight`` is ``decoder.up.3.block.1.conv1.weight``."""
    if up := UP_BLOCK.match(name):
        # diffusers numbers the decoder's levels in execution order, the published model from the highest resolution.
        name = f"decoder.up.{levels - 1 - int(up[1])}.{name[up.end() :]}"
    name = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d{1,4})\.", lambda match: f".mid.block_{int(match[1]) + 1}.", name)
    for old, new in RENAMED:
        name = name.replace(old, new)
    attention = re.match(r"(.*\.attn(?:_1|\.\d+)\.)(to_out\.0|\w+)(\..*)", name)
    if attention and attention[2] in RENAMED_IN_ATTENTION:
        name = attention[1] + RENAMED_IN_ATTENTION[attention[2]] + attention[3]
    return name


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """Reshape an attention weight: diffusers stores linear layers, the published model 1x1 convolutions."""
    linear = re.search(r"\.attentions\.\d+\.(query|key|value|proj_attn|to_[qkv]|to_out\.0)\.weight$", name)
    return tensor[:, :, None, None] if linear and tensor.dim() == 2 else tensor
