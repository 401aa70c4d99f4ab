"""Reading and writing the weights of a MoVQ model in every published layout."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .autoencoder import MOVQ
from .files import replacing
from .modules import NORM_GROUPS

CONFIG_KEY = "movq_ext.config"  # of the safetensors metadata
TRAINING_ONLY = ("loss.", "model_ema.")  # what released training checkpoints hold beside the model
RESOLUTION = 256  # nominal: only places attn_resolutions, which is chosen to fit
MAX_NAMES = 8  # in an error message


class CheckpointError(ValueError):
    """The file is no checkpoint of a MoVQ model, or not a whole one."""


def save_pretrained(model: MOVQ, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write ``model.safetensors`` (weights, and the config in its metadata) and ``config.json`` (a copy to read) to folder.

    The weights are stored as dtype, or as they are. An interrupted save leaves the old files whole: each is replaced at once,
    and the one that is loaded holds weights and config together.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model.config, indent=2)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={CONFIG_KEY: config})
    with replacing(folder / "config.json") as partial:
        partial.write_text(config + "\n")


def from_pretrained(
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MOVQ:
    """Load a model, in eval mode.

    Args:
        path: one of
            a folder or ``.safetensors`` file that save_pretrained wrote;
            a diffusers ``VQModel`` folder with ``norm_type="spatial"`` (Kandinsky 2.1 and 2.2);
            an original checkpoint of Kandinsky 2.x or CogVideo (``.ckpt``, ``.pt``, ``.pth``, ``.safetensors``), its entries
            under any prefix. It is read with ``weights_only=True``: no code in it can run.
        config: keywords of MOVQ; only for original checkpoints, where it is otherwise read off the entries' shapes.
        device: where to put the model.
        dtype: dtype of the parameters, whatever they are stored as.

    Raises:
        FileNotFoundError: there is no such file or folder.
        CheckpointError: it is damaged or truncated, no MoVQ model, holds anything but tensors, or has missing, extra or
            misshapen entries (which are named).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_file():
        state, stored = _read(path)
        if stored is None:
            state = _strip_prefix(state, path)
    elif (path / "model.safetensors").exists():
        state, stored = _read(path / "model.safetensors")
        if stored is None:
            raise CheckpointError(f"{path / 'model.safetensors'} has no {CONFIG_KEY!r} in its metadata: save_pretrained did not write it")
    else:
        state, stored = _read_diffusers(path)
    if stored is None:
        stored = config if config is not None else _infer_config(state, path)
    elif config is not None:
        raise ValueError(f"config is for original checkpoints, and {path} has its own")
    try:
        with torch.device("meta"):
            model = MOVQ(**stored)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its config is no config of MOVQ: {error}") from error
    _check_entries(model.state_dict(), state, path)
    state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(all tensors of a file, the config save_pretrained put there or None)."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                config = (file.metadata() or {}).get(CONFIG_KEY)
                return {name: file.get_tensor(name) for name in file.keys()}, None if config is None else json.loads(config)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is damaged, or holds objects that are no tensors, which could run code: {error}") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} holds no dictionary of named tensors")
    others = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    if others:
        raise CheckpointError(f"{path} has entries that are no tensors: {_names(others)}")
    return state, None


def _strip_prefix(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The model's entries under the published names, whatever module held the model."""
    landmark = "quantize.embedding.weight"
    prefixes = [name.removesuffix(landmark) for name in state if name.endswith(landmark) and not name.startswith(TRAINING_ONLY)]
    if len(prefixes) != 1:
        raise CheckpointError(f"{path} must have one entry named ...{landmark}, it has {len(prefixes)}: no MoVQ model")
    (prefix,) = prefixes
    entries = {name: tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}
    strangers = [name for name in entries if not name.startswith(prefix)]
    if strangers:
        raise CheckpointError(f"{path} has entries outside {prefix!r}: {_names(strangers)}")
    entries = {name.removeprefix(prefix): tensor for name, tensor in entries.items()}
    return {name: tensor for name, tensor in entries.items() if not name.startswith(TRAINING_ONLY)}


def _infer_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The keywords of MOVQ, read off the shapes of a published state dict."""
    try:
        levels = _count(state, r"decoder\.up\.(\d+)\.")
        ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
        z_channels = state["decoder.conv_in.weight"].shape[1]
        return {
            "ddconfig": {
                "ch": ch,
                "out_ch": state["decoder.conv_out.weight"].shape[0],
                "ch_mult": [state[f"decoder.up.{level}.block.0.conv1.weight"].shape[0] // ch for level in range(levels)],
                "num_res_blocks": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
                "attn_resolutions": [RESOLUTION >> level for level in range(levels) if f"decoder.up.{level}.attn.0.q.weight" in state],
                "resamp_with_conv": levels == 1 or "decoder.up.1.upsample.conv.weight" in state,
                "in_channels": in_channels,
                "resolution": RESOLUTION,
                "z_channels": z_channels,
                "double_z": state["encoder.conv_out.weight"].shape[0] == 2 * z_channels,
                "add_conv": "decoder.norm_out.conv.weight" in state,
                "mid_attn": "decoder.mid.attn_1.q.weight" in state,
            },
            "n_embed": state["quantize.embedding.weight"].shape[0],
            "embed_dim": state["quantize.embedding.weight"].shape[1],
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is no MoVQ model: it lacks a usable entry {error}") from error


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the names hold at the pattern's group."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _read_diffusers(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(entries under the published names, keywords of MOVQ) of a diffusers VQModel folder."""
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder} has neither model.safetensors (save_pretrained) nor config.json (diffusers)")
    try:
        config = json.loads(file.read_text())
        widths = config["block_out_channels"]
        levels = len(widths)
        expected = {
            "_class_name": (config.get("_class_name"), "VQModel"),
            "norm_type": (config.get("norm_type", "group"), "spatial"),
            "norm_num_groups": (config.get("norm_num_groups", 32), NORM_GROUPS),
            "act_fn": (config.get("act_fn", "silu"), "silu"),
        }
        for key, (given, wanted) in expected.items():
            if given != wanted:
                raise CheckpointError(f"{file}: {key} must be {wanted!r}, got {given!r}")
        attends = _attending_levels(config["down_block_types"], "DownEncoderBlock2D", file)
        if len(attends) != levels or attends != _attending_levels(config["up_block_types"], "UpDecoderBlock2D", file)[::-1]:
            raise CheckpointError(f"{file}: block_out_channels, down_block_types and up_block_types must have the same levels")
        if any(width % widths[0] for width in widths):
            raise CheckpointError(f"{file}: block_out_channels must be multiples of the first, got {widths}")
        keywords = {
            "ddconfig": {
                "ch": widths[0],
                "out_ch": config["out_channels"],
                "ch_mult": [width // widths[0] for width in widths],
                "num_res_blocks": config["layers_per_block"],
                "attn_resolutions": [RESOLUTION >> level for level in range(levels) if attends[level]],
                "in_channels": config["in_channels"],
                "resolution": RESOLUTION,
                "z_channels": config["latent_channels"],
                "mid_attn": config.get("mid_block_add_attention", True),
            },
            "n_embed": config["num_vq_embeddings"],
            "embed_dim": config.get("vq_embed_dim") or config["latent_channels"],
        }
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or no config of a diffusers VQModel: {error!r}") from error
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).exists():
            state, _ = _read(folder / name)
            return {_published_name(key, levels): _as_convolution(key, tensor) for key, tensor in state.items()}, keywords
    raise FileNotFoundError(f"no such file: {folder / 'diffusion_pytorch_model.safetensors'} (or .bin)")


def _attending_levels(blocks: list[str], plain: str, file: Path) -> list[bool]:
    strangers = set(blocks) - {plain, f"Attn{plain}"}
    if strangers:
        raise CheckpointError(f"{file}: blocks must be {plain} or Attn{plain}, got {_names(strangers)}")
    return [block != plain for block in blocks]


_ATTENTION = {"to_q": "q", "query": "q", "to_k": "k", "key": "k", "to_v": "v", "value": "v", "to_out.0": "proj_out",
              "proj_attn": "proj_out", "group_norm": "norm", "spatial_norm": "norm"}  # fmt: skip


def _published_name(name: str, levels: int) -> str:
    """The published name of a diffusers entry: ``decoder.up_blocks.0.resnets.1.conv1.weight`` is ``decoder.up.3.block.1...``."""
    up = re.match(r"decoder\.up_blocks\.(\d+)\.", name)
    if up:  # diffusers counts in execution order, the published model by resolution
        name = f"decoder.up.{levels - 1 - int(up[1])}.{name[up.end() :]}"
    name = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda match: f".mid.block_{int(match[1]) + 1}.", name)
    name = name.replace(".mid_block.attentions.0.", ".mid.attn_1.")
    name = name.replace(".resnets.", ".block.").replace(".attentions.", ".attn.").replace(".conv_shortcut.", ".nin_shortcut.")
    name = name.replace(".upsamplers.0.", ".upsample.").replace(".downsamplers.0.", ".downsample.")
    name = name.replace(".conv_norm_out.", ".norm_out.")
    attention = re.match(r"(.*\.attn(?:_1|\.\d+)\.)(to_out\.0|\w+)(\..*)", name)
    if attention and attention[2] in _ATTENTION:
        name = attention[1] + _ATTENTION[attention[2]] + attention[3]
    return name


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """diffusers keeps q, k, v and proj_out as linear layers, the published model as 1x1 convolutions."""
    linear = re.search(r"\.attentions\.\d+\.(query|key|value|proj_attn|to_[qkv]|to_out\.0)\.weight$", name)
    return tensor[:, :, None, None] if linear and tensor.dim() == 2 else tensor


def _check_entries(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & given.keys()
        if given[name].shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {_names(names)}"
        for what, names in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit the model; entries {'; '.join(problems)}")


def _names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:MAX_NAMES]) + (f" and {len(ordered) - MAX_NAMES} more" if len(ordered) > MAX_NAMES else "")
