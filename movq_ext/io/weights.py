"""Save and load the weights of a MoVQ model, in every published layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..model.autoencoder import MOVQ
from .diffusers_weights import read_diffusers_folder
from .files import atomic_write, parse_json, wrap_errors
from .original_weights import infer_config, strip_prefix
from .tensor_files import CheckpointError, format_names, is_plain_float, read_tensors

CONFIG_KEY = "movq_ext.config"  # in the metadata of model.safetensors
CONFIG_KEYS = ("ddconfig", "n_embed", "embed_dim", "beta", "sane_index_shape", "legacy")  # without remap, a path to read
MAX_LEVELS = 16  # a latent cell would be 32768 pixels wide


def save_pretrained(model: MOVQ, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write ``model.safetensors`` (weights, with the config in its metadata) and ``config.json`` (a readable copy).

    Both writes are atomic. ``model.safetensors`` alone is loaded, so an interrupted save never mixes two models.

    Args:
        model: a model on any device; not modified.
        folder: output folder; created if missing.
        dtype: dtype of the saved weights; the model's own if None.

    Raises:
        OSError: folder is not writable.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model.config, indent=2)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={CONFIG_KEY: config})
    with atomic_write(folder / "config.json") as partial:
        partial.write_text(config + "\n")


def from_pretrained(
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MOVQ:
    """Load a model in eval mode.

    Files may be untrusted: no code in them runs, and memory follows a file's real size, not its header's claims.

    Args:
        path: one of

            - a folder or ``.safetensors`` file written by `save_pretrained`;
            - a diffusers ``VQModel`` folder with ``norm_type="spatial"`` (Kandinsky 2.1 and 2.2);
            - an original checkpoint of Kandinsky 2.x or CogVideo (``.ckpt``, ``.pt``, ``.pth``, ``.safetensors``), with any
              prefix before its entries' names. Pickles are read with ``weights_only=True``.
        config: keyword arguments of `MOVQ` for an original checkpoint; inferred from the entries' shapes if None.
        device: device of the parameters.
        dtype: dtype of the parameters, whatever the file's.

    Returns:
        The model, with its parameters on device and in dtype.

    Raises:
        ValueError: config is given, but path has its own.
        FileNotFoundError: path does not exist.
        OSError: a file is unreadable or not a regular file.
        CheckpointError: a file is damaged, is not a MoVQ model, contains anything but tensors, or has missing, unexpected or
            unsuitable entries (which the message names).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    state, stored = _read(path)
    if stored is not None and config is not None:
        raise ValueError(f"config is only for original checkpoints, and {path} has its own")
    keywords = config if stored is None else stored
    if keywords is None:
        keywords = infer_config(state, path)
    with wrap_errors(CheckpointError, f"{path}: invalid MOVQ config"), torch.device("meta"):
        _check_config_size(keywords, len(state))
        model = MOVQ(**keywords)
    _check_entries(model.state_dict(), state, path)
    model.quantize.stored_codebook = state["quantize.embedding.weight"].clone()  # a view would keep the whole file mapped
    state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return (entries under the published names, the config that path holds or None)."""
    if path.is_dir() and not (path / "model.safetensors").exists():
        return read_diffusers_folder(path)
    file = path / "model.safetensors" if path.is_dir() else path
    state, metadata = read_tensors(file)
    if CONFIG_KEY in metadata:
        with wrap_errors(CheckpointError, f"{file} is damaged"):
            return state, _parse_config(metadata[CONFIG_KEY])
    if path.is_dir():
        raise CheckpointError(f"{file}: expected a file from save_pretrained, got one without {CONFIG_KEY!r} in its metadata")
    return strip_prefix(state, path), None


def _parse_config(text: str) -> dict[str, Any]:
    config = parse_json(text)
    if not isinstance(config, dict) or not config.keys() <= set(CONFIG_KEYS):
        raise ValueError(f"expected a config with the keys {', '.join(CONFIG_KEYS)}")
    return config


def _check_config_size(config: Mapping[str, Any], entries: int) -> None:
    """Refuse a config with more levels or blocks than the file can have weights for: building the model would take forever."""
    levels, blocks = len(config["ddconfig"].get("ch_mult", ())), config["ddconfig"]["num_res_blocks"]
    if levels > MAX_LEVELS or max(levels, 1) * blocks > entries:
        limits = f"at most {MAX_LEVELS} levels and {entries} blocks (the file has as many entries)"
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
