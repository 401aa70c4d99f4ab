"""Original checkpoints of Kandinsky 2.x and CogVideo: the model's entries, and a config inferred from their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .tensor_files import CheckpointError, format_names

TRAINING_ONLY = ("loss.", "model_ema.")  # prefixes of the discriminator and the EMA in training checkpoints
NOMINAL_RESOLUTION = 256  # only the ratios to attn_resolutions matter


def strip_prefix(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the model's entries without the prefix of the module that held the model.

    Raises CheckpointError if the entries are not those of exactly one MoVQ model.
    """
    landmark = "quantize.embedding.weight"
    entries = {name: tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}
    prefixes = [name.removesuffix(landmark) for name in entries if name.endswith(landmark)]
    if len(prefixes) != 1:
        raise CheckpointError(f"{path} is not a MoVQ checkpoint: expected one entry ...{landmark}, got {len(prefixes)}")
    (prefix,) = prefixes
    others = [name for name in entries if not name.startswith(prefix)]
    if others:
        raise CheckpointError(f"{path}: expected all entries under {prefix!r}, got others: {format_names(others)}")
    entries = {name.removeprefix(prefix): tensor for name, tensor in entries.items()}
    return {name: tensor for name, tensor in entries.items() if not name.startswith(TRAINING_ONLY)}


def infer_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Infer the keyword arguments of MOVQ from the shapes of the published entries.

    Raises CheckpointError if an entry is missing or has an impossible shape.
    """
    try:
        levels = _count_indices(state, r"decoder\.up\.(\d+)\.")
        ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
        z_channels = state["decoder.conv_in.weight"].shape[1]
        return {
            "ddconfig": {
                "ch": ch,
                "out_ch": state["decoder.conv_out.weight"].shape[0],
                "ch_mult": [state[f"decoder.up.{level}.block.0.conv1.weight"].shape[0] // ch for level in range(levels)],
                "num_res_blocks": _count_indices(state, r"encoder\.down\.0\.block\.(\d+)\."),
                "attn_resolutions": [
                    NOMINAL_RESOLUTION >> level for level in range(levels) if f"decoder.up.{level}.attn.0.q.weight" in state
                ],
                "resamp_with_conv": levels == 1 or "decoder.up.1.upsample.conv.weight" in state,
                "in_channels": in_channels,
                "resolution": NOMINAL_RESOLUTION,
                "z_channels": z_channels,
                "double_z": state["encoder.conv_out.weight"].shape[0] == 2 * z_channels,
                "add_conv": "decoder.norm_out.conv.weight" in state,
                "mid_attn": "decoder.mid.attn_1.q.weight" in state,
            },
            "n_embed": state["quantize.embedding.weight"].shape[0],
            "embed_dim": state["quantize.embedding.weight"].shape[1],
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is not a MoVQ checkpoint: missing or malformed entry: {error}") from error


def _count_indices(state: Mapping[str, Tensor], pattern: str) -> int:
    """Count the distinct values of the pattern's group among the names."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
