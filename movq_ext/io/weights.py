"""Save and load the weights of a MoVQ model, in every published layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..model.autoencoder import MOVQ
from .checkpoint_files import read_dictionaries
from .diffusers_weights import published_entries, read_config
from .files import atomic_write, parse_json, remove_partial_files, require_file, wrap_errors
from .original_weights import CODEBOOK, Weights, infer_config, rename, select_model, strip_wrappers, with_codebook
from .tensor_files import CheckpointError, format_names, is_plain_float, write_safetensors
from .weight_folders import find_weights

CONFIG_KEY = "movq_ext.config"  # in the metadata of model.safetensors
CONFIG_KEYS = ("ddconfig", "n_embed", "embed_dim", "beta", "sane_index_shape", "legacy")  # without remap, a path to read
MAX_LEVELS = 16  # a latent cell would be 32768 pixels wide


def save_pretrained(model: MOVQ, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write ``model.safetensors`` (weights, with the config in its metadata) and ``config.json`` (a readable copy).

    Both writes are atomic. ``model.safetensors`` alone is loaded, so an interrupted save never mixes two models.

    Args:
        model: a model on any device; not modified. It, or parts of it, may be wrapped by ``torch.compile`` or data parallelism.
        folder: output folder; created if missing.
        dtype: dtype of the saved weights; the model's own if None.

    Raises:
        TypeError: model is not a MOVQ, or has weights that are not dense floating-point tensors (quantised ones, say).
        OSError: folder is not writable.
    """
    model = _unwrap(model)
    config = json.dumps(model.config, indent=2)
    tensors = {strip_wrappers(name): tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    others = [name for name, tensor in tensors.items() if not is_plain_float(tensor)]
    if others:
        raise TypeError(f"model must have dense floating-point tensors, got others: {format_names(others)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial_files([folder / "model.safetensors", folder / "config.json"])
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    owners = Counter(tensor.data_ptr() for tensor in tensors.values())
    # safetensors refuses tied weights, which share memory.
    tensors = {name: tensor.clone() if owners[tensor.data_ptr()] > 1 else tensor for name, tensor in tensors.items()}
    with atomic_write(folder / "model.safetensors") as partial:
        write_safetensors(tensors, partial, {CONFIG_KEY: config})
    with atomic_write(folder / "config.json") as partial:
        partial.write_text(config + "\n")


def _unwrap(model: nn.Module) -> MOVQ:
    """Return the MOVQ in a compiled or data-parallel module."""
    inner: Any = model
    while not isinstance(inner, MOVQ):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise TypeError(f"model must be a MOVQ, got {type(model).__name__}")
    return inner


def from_pretrained(
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    subfolder: str | None = None,
    variant: str | None = None,
    weights: Weights = "model",
) -> MOVQ:
    """Load a model in eval mode.

    Files may be untrusted: no code in them runs, and memory follows a file's real size, not its header's claims.

    Args:
        path: one of

            - a folder or file written by `save_pretrained`;
            - a diffusers ``VQModel`` with ``norm_type="spatial"`` (Kandinsky 2.1, 2.2 and 3): its folder, its weight file alone,
              or the folder of a pipeline, whose ``movq/`` or ``vae/`` is loaded;
            - an original or training checkpoint of Kandinsky 2.x, Kandinsky 3 or CogVideo, whatever prefix and dictionaries its
              entries are in. Pickles are interpreted without calling anything in them. Objects other than tensors become inert.

            The format is recognised by the file's first bytes, not by its name.
        config: keyword arguments of `MOVQ` for an original checkpoint; inferred from the entries' shapes if None.
        device: device of the parameters.
        dtype: dtype of the parameters, whatever the file's.
        subfolder: folder below path that holds the model.
        variant: part of the weight file's name, as in diffusers: ``"fp16"`` loads
            ``diffusion_pytorch_model.fp16.safetensors``.
        weights: ``"model"``, or ``"ema"`` for the exponential moving averages in a training checkpoint.

    Returns:
        The model, with its parameters on device and in dtype. Without a codebook in the file (Kandinsky 3), it has
        ``n_embed=0``: it encodes to latents and decodes them.

    Raises:
        ValueError: config is given, but path has its own; subfolder or variant is given for a file; unknown weights.
        FileNotFoundError: path, subfolder or the weight file does not exist.
        OSError: a file is unreadable or not a regular file.
        CheckpointError: a file is damaged, is not a MoVQ model, contains objects that only their code could read, or has missing,
            unexpected or unsuitable entries. The message names the entries, the objects or the file's format.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be 'model' or 'ema', got {weights!r}")
    path = Path(path)
    file, config_file = find_weights(path, subfolder, variant)
    state, stored = _read(file, config_file, weights)
    if stored is not None and config is not None:
        raise ValueError(f"config is only for original checkpoints, and {path} has its own")
    keywords = config if stored is None else stored
    if keywords is None:
        keywords = infer_config(state, file)
    with wrap_errors(CheckpointError, f"{file}: invalid MOVQ config"), torch.device("meta"):
        _check_config_size(keywords, len(state))
        model = MOVQ(**keywords)
    _check_entries(model.state_dict(), state, file)
    model.quantize.stored_codebook = state[CODEBOOK].clone()
    tied: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    for names in tied.values():  # converts a tensor once, and frees one of another dtype at once
        state |= dict.fromkeys(names, state[names[0]].to(device, dtype))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read(file: Path, config_file: Path | None, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return (entries under the published names, the config that the file or its folder holds or None)."""
    require_file(file)
    config = None if config_file is None else read_config(config_file)
    dictionaries, metadata = read_dictionaries(file)
    if CONFIG_KEY in metadata:
        if weights != "model":
            raise CheckpointError(f"{file} has no EMA weights besides the model's: leave out weights={weights!r}")
        with wrap_errors(CheckpointError, f"{file} is damaged"):
            return rename(dictionaries[()], strip_wrappers, file), _parse_config(metadata[CONFIG_KEY])
    state = select_model(dictionaries, file, weights)
    levels = None if config is None else len(config["ddconfig"]["ch_mult"])
    state = with_codebook(published_entries(state, levels, file))
    if config is not None and CODEBOOK in state and state[CODEBOOK].numel() == 0:
        config["n_embed"] = 0
    return state, config


def _parse_config(text: str) -> dict[str, Any]:
    config = parse_json(text)
    if not isinstance(config, dict) or not config.keys() <= set(CONFIG_KEYS):
        raise ValueError(f"expected a config with the keys {', '.join(CONFIG_KEYS)}")
    return config


def _check_config_size(config: Mapping[str, Any], entries: int) -> None:
    """Refuse a config with more levels or blocks than the file can have weights for: building the model would take forever."""
    sizes = config.get("ddconfig")
    multipliers, blocks = (sizes.get("ch_mult", ()), sizes.get("num_res_blocks")) if isinstance(sizes, Mapping) else ((), 0)
    if not isinstance(multipliers, Sequence) or not isinstance(blocks, int):
        return  # MOVQ names the argument
    levels = len(multipliers)
    if levels > MAX_LEVELS or max(levels, 1) * blocks > entries:
        limits = f"at most {MAX_LEVELS} levels (ch_mult) and {entries} blocks (num_res_blocks; the file has as many entries)"
        raise ValueError(f"expected {limits}, got {levels} levels of {blocks} blocks")


def _check_entries(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    common = expected.keys() & given.keys()
    problems = {
        "missing": expected.keys() - given.keys(),
        "unexpected": given.keys() - expected.keys(),
        "of the wrong shape": [
            f"{name} (expected {tuple(expected[name].shape)}, got {tuple(given[name].shape)})"
            for name in common
            if given[name].shape != expected[name].shape
        ],
        "of the wrong type (expected dense floating-point tensors)": [
            f"{name} {given[name].dtype}" for name in common if not is_plain_float(given[name])
        ],
    }
    found = [f"{len(names)} {problem}: {format_names(names)}" for problem, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{path} does not match the model; entries: {'; '.join(found)}")
