"""Find the entries of a MoVQ model in a checkpoint of any training program, and infer a config from their shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from .files import MAX_SHOWN_CHARACTERS, printable
from .stored_tensors import load_entries
from .tensor_files import CheckpointError, format_names

Weights = Literal["model", "ema"]
Dictionaries = Mapping[tuple[str, ...], Mapping[str, Any]]  # by the keys that lead to them in the file

NOMINAL_RESOLUTION = 256  # only the ratios to attn_resolutions matter
CODEBOOK = "quantize.embedding.weight"
LANDMARK = "decoder.norm_out.conv_y.weight"  # an entry that only MoVQ decoders have
MAX_MODELS = 64  # that are compared with each other
_LANDMARKS = (LANDMARK, "decoder.conv_norm_out.conv_y.weight")  # the second is diffusers'
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_EMA = re.compile(r"(?:^|[._])ema(?:[._]|$)")
_TRAINING_ONLY = re.compile(  # discriminator, losses and averages beside the model
    r"(?:loss|discriminator|lpips|perceptual\w*|model_ema|ema(?:_\w+)?)\.|(?:n_averaged|colorize)$"
)
OTHER_MODELS = (  # an entry's name, and the model that has it
    (re.compile(r"\.conv_y\.conv\.weight$"), "the video autoencoder of CogVideoX and Kandinsky 4"),
    (re.compile(r"decoder\.conv_in\.conv\.weight$"), "a video autoencoder, such as Kandinsky 5's"),
    (re.compile(r"decoder\.conv_in\.weight$"), "an autoencoder without SpatialNorm, such as AutoencoderKL or VQGAN"),
)


def strip_wrappers(name: str) -> str:
    """Remove the modules that torch.compile, data parallelism, FSDP and activation checkpointing put around parts of a model."""
    return _WRAPPERS.sub("", name)


def select_model(dictionaries: Dictionaries, path: Path, weights: Weights = "model") -> dict[str, Tensor]:
    """Return the entries of the file's one MoVQ model, without the prefix of the module that held the model.

    ``weights="ema"`` returns their exponential moving averages. They may be a second model whose prefix or keys contain "ema",
    or entries without dots in their names (``ema_encoder.conv_inweight``, ``model_ema.encoderconv_inweight``).

    Raises CheckpointError if the file has no model or more than one, entries other than tensors, or no averages to return.
    """
    dictionaries = {keys: rename(entries, strip_wrappers, path) for keys, entries in dictionaries.items()}
    models = [(keys, prefix) for keys, entries in dictionaries.items() for prefix in _prefixes(entries)]
    if len(models) > MAX_MODELS:
        raise CheckpointError(f"{path}: expected one MoVQ model, got {len(models)}, more than {MAX_MODELS} at ...{LANDMARK}")
    averages = [(keys, prefix) for keys, prefix in models if any(_EMA.search(part) for part in (*keys, prefix))]
    trained = [model for model in models if model not in averages]
    if weights == "ema" and len(averages) == 1:
        state = _below(dictionaries[averages[0][0]], averages[0][1])
    elif len(trained) == 1:
        entries, prefix = dictionaries[trained[0][0]], trained[0][1]
        known = (prefix, *(other for _, other in averages if other))
        others = [name for name in entries if not name.startswith(known) and not _TRAINING_ONLY.match(name)]
        if others:
            shown = printable(prefix, MAX_SHOWN_CHARACTERS)
            raise CheckpointError(f"{path}: expected all entries under '{shown}', got others: {format_names(others)}")
        state = _below(entries, prefix)
        if weights == "ema":
            state = _dotless_averages(entries, prefix, state, path)
    elif averages and not trained:
        raise CheckpointError(f"{path} contains EMA weights only: pass weights='ema'")
    else:
        _raise_not_one_model(dictionaries, models, path)
    return rename(load_entries(state, path), _published_norm, path)


def rename(entries: Mapping[str, Any], new_name: Callable[[str], str], path: Path) -> dict[str, Any]:
    """Return the entries under new names. Raises CheckpointError if two entries get the same one."""
    renamed: dict[str, Any] = {}
    for name, entry in entries.items():
        new = new_name(name)
        if new in renamed:
            raise CheckpointError(
                f"{path} has two entries for {printable(new, MAX_SHOWN_CHARACTERS)}; one is {format_names([name])}"
            )
        renamed[new] = entry
    return renamed


def _published_norm(name: str) -> str:
    """Convert a name of Kandinsky 3, whose encoder has SpatialNorm layers that are not modulated."""
    return re.sub(r"^(encoder\..*)\.norm_layer\.", r"\1.", name)


def _prefixes(entries: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(landmark) for name in entries for landmark in _LANDMARKS if name.endswith(landmark)]


def _below(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    below = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
    return {name: entry for name, entry in below.items() if not _TRAINING_ONLY.match(name)}


def _dotless_averages(entries: Mapping[str, Any], prefix: str, model: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the averages that LitEma stores as buffers, whose names cannot contain dots."""
    averages, missing = {}, []
    for name in model:
        part, _, rest = name.partition(".")
        candidates = [f"{start}model_ema.{name.replace('.', '')}" for start in (prefix, "")]
        candidates.append(f"{prefix}ema_{part}.{rest.replace('.', '')}")
        found = next((candidate for candidate in candidates if candidate in entries), None)
        if found is None:
            missing.append(name)
        else:
            averages[name] = entries[found]
    if missing:
        raise CheckpointError(f"{path}: expected EMA weights for all entries, got none for {format_names(missing)}")
    return averages


def _raise_not_one_model(dictionaries: Dictionaries, models: list[tuple[tuple[str, ...], str]], path: Path) -> NoReturn:
    names = [name for entries in dictionaries.values() for name in entries]
    for pattern, description in OTHER_MODELS if not models else ():
        if any(pattern.search(name) for name in names):
            raise CheckpointError(f"{path} is {description}: expected a MoVQ model, whose decoder has {LANDMARK}")
    places = f": {format_names('.'.join((*keys, prefix)) for keys, prefix in models)}" if models else ""
    raise CheckpointError(f"{path} is not a MoVQ checkpoint: expected one entry ...{LANDMARK}, got {len(models)}{places}")


def with_codebook(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add an empty codebook if the model has none, like Kandinsky 3's. MOVQ has one entry for it in any case."""
    if "post_quant_conv.weight" not in state or any(name.startswith("quantize.") for name in state):
        return state
    weight = state["post_quant_conv.weight"]
    return {**state, CODEBOOK: torch.empty(0, *weight.shape[1:2])}


def infer_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Infer the keyword arguments of MOVQ from the shapes of the published entries.

    Raises CheckpointError if an entry is missing or has an impossible shape.
    """
    temporal = [name for name in state if re.search(r"\.temporal_\w+\.", name)]
    if temporal:
        raise CheckpointError(f"{path} is Kandinsky Video's decoder, with layers over time: {format_names(temporal)}")
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
            "n_embed": state[CODEBOOK].shape[0],
            "embed_dim": state[CODEBOOK].shape[1],
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is not a MoVQ checkpoint: missing or malformed entry: {error}") from error


def _count_indices(state: Mapping[str, Tensor], pattern: str) -> int:
    """Count the distinct values of the pattern's group among the names."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
