"""Reading and writing the weights of a MoVQ model in every published layout."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..model.autoencoder import MOVQ
from ..model.layers import NORM_GROUPS
from .files import parse_json, printable, read_json, refusing, replacing, require_file

CONFIG_KEY = "movq_ext.config"  # of the safetensors metadata
TRAINING_ONLY = ("loss.", "model_ema.")  # what released training checkpoints hold beside the model
RESOLUTION = 256  # nominal: only places attn_resolutions, which is chosen to fit
MAX_NAMES = 8  # in an error message
MAX_NAME = 200  # characters of each
MAX_LEVELS = 16  # of a model from a file: one latent cell is then 32768 pixels wide
CONFIG_KEYS = ("ddconfig", "n_embed", "embed_dim", "beta", "sane_index_shape", "legacy")  # not remap, which names a file to read
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointError(ValueError):
    """The file is no checkpoint of a MoVQ model, or not a whole one."""


def save_pretrained(model: MOVQ, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write ``model.safetensors`` (weights, and the config in its metadata) and ``config.json`` (a copy to read) to folder.

    An interrupted save leaves the old files whole: each is replaced at once, and the one that is loaded holds weights and config
    together.

    Args:
        model: is left as it is, on any device.
        folder: is made if it is not there.
        dtype: of the weights in the file; the model's if None.

    Raises:
        OSError: folder cannot be written to.
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

            - a folder or ``.safetensors`` file that `save_pretrained` wrote;
            - a diffusers ``VQModel`` folder with ``norm_type="spatial"`` (Kandinsky 2.1 and 2.2);
            - an original checkpoint of Kandinsky 2.x or CogVideo (``.ckpt``, ``.pt``, ``.pth``, ``.safetensors``), its entries
              under any prefix. It is read with ``weights_only=True``: no code in it can run.

            A file from anywhere may be given: reading it takes memory in proportion to its size, whatever it claims.
        config: keywords of `MOVQ`; only for original checkpoints, where it is otherwise read off the entries' shapes.
        device: where to put the model.
        dtype: dtype of the parameters, whatever they are stored as.

    Returns:
        The model, its parameters on device and of dtype.

    Raises:
        ValueError: config is given for a path that has its own.
        FileNotFoundError: there is no such file or folder.
        OSError: it may not be read, or what should be a file is a folder, pipe or device.
        CheckpointError: it is damaged or truncated, no MoVQ model, holds anything but tensors, or has missing, extra,
            misshapen or unsuitable entries (which are named).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if not path.is_dir():
        state, stored = _read(path)
        if stored is None:
            state = _strip_prefix(state, path)
    elif (path / "model.safetensors").exists():
        state, stored = _read(path / "model.safetensors")
        if stored is None:
            raise CheckpointError(
                f"{path / 'model.safetensors'} has no {CONFIG_KEY!r} in its metadata: save_pretrained did not write it"
            )
    else:
        state, stored = _read_diffusers(path)
    if stored is not None and config is not None:
        raise ValueError(f"config is for original checkpoints, and {path} has its own")
    if stored is None:
        keywords = config if config is not None else _infer_config(state, path)
    else:
        keywords = stored
    with refusing(CheckpointError, f"{path}: its config is no config of MOVQ"), torch.device("meta"):
        _check_size(keywords, len(state))
        model = MOVQ(**keywords)
    _check_entries(model.state_dict(), state, path)
    state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(all tensors of a file, the config save_pretrained put there or None)."""
    require_file(path)
    with refusing(CheckpointError, f"{path} is damaged or no checkpoint"):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                config = (file.metadata() or {}).get(CONFIG_KEY)
                stored = None if config is None else _config(config)
                return {name: file.get_tensor(name) for name in file.keys()}, stored
        _check_archive(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = printable(str(error), MAX_NAME)
            message = f"{path} is damaged, or holds objects that are no tensors, which could run code"
            raise CheckpointError(f"{message}: {reason}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} holds no dictionary of named tensors")
    others = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    if others:
        raise CheckpointError(f"{path} has entries that are no tensors: {_names(others)}")
    claimed = sum(tensor.nbytes for tensor in state.values() if _is_suitable(tensor))
    if claimed > path.stat().st_size:  # tensors with a stride of 0 can be of any size
        raise CheckpointError(f"{path} is damaged: its {path.stat().st_size} bytes claim to hold tensors of {claimed}")
    return state, None


def _config(text: str) -> dict[str, Any]:
    """The config that save_pretrained put into a file."""
    config = parse_json(text)
    if not isinstance(config, dict) or not config.keys() <= set(CONFIG_KEYS):
        raise ValueError(f"its config must be an object with the keys {', '.join(CONFIG_KEYS)}")
    return config


def _check_archive(path: Path) -> None:
    """What torch.save wrote is not compressed: a zip archive with more in it than it has bytes is made to fill the memory."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # else in the format from before torch 1.6
            return
        with zipfile.ZipFile(file) as archive:
            inside = sum(entry.file_size for entry in archive.infolist())
    if inside > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its {path.stat().st_size} bytes claim to hold {inside}")


def _check_size(config: Mapping[str, Any], entries: int) -> None:
    """A model takes time to build: refuse one with more levels or blocks than the file can have weights for."""
    levels, blocks = len(config["ddconfig"].get("ch_mult", ())), config["ddconfig"]["num_res_blocks"]
    if levels > MAX_LEVELS or max(levels, 1) * blocks > entries:
        raise ValueError(f"{levels} levels of {blocks} blocks, of at most {MAX_LEVELS} levels and {entries} entries in the file")


def _is_suitable(tensor: Tensor) -> bool:
    """Whether this is a plain tensor of floating-point numbers, with its values in memory."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and tensor.dtype in DTYPES and not tensor.is_quantized


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
                "attn_resolutions": [
                    RESOLUTION >> level for level in range(levels) if f"decoder.up.{level}.attn.0.q.weight" in state
                ],
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
    require_file(file)
    with refusing(CheckpointError, f"{file} is damaged or no config of a diffusers VQModel"):
        config = read_json(file)
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
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).exists():
            state, _ = _read(folder / name)
            published = {_published_name(key, levels): _as_convolution(key, tensor) for key, tensor in state.items()}
            if len(published) < len(state):
                raise CheckpointError(f"{folder / name} has entries twice, under old names and new")
            return published, keywords
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
    up = re.match(r"decoder\.up_blocks\.(\d{1,4})\.", name)
    if up:  # diffusers counts in execution order, the published model by resolution
        name = f"decoder.up.{levels - 1 - int(up[1])}.{name[up.end() :]}"
    name = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d{1,4})\.", lambda match: f".mid.block_{int(match[1]) + 1}.", name)
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
    unsuitable = [f"{name} {given[name].dtype}" for name in expected.keys() & given.keys() if not _is_suitable(given[name])]
    kinds = {"missing": missing, "extra": extra, "misshapen": misshapen, "no plain tensors of floating-point numbers": unsuitable}
    problems = [f"{len(names)} {what}: {_names(names)}" for what, names in kinds.items() if names]
    if problems:
        raise CheckpointError(f"{path} does not fit the model; entries {'; '.join(problems)}")


def _names(names: Iterable[str]) -> str:
    ordered = [printable(name, MAX_NAME) for name in sorted(names)]
    return ", ".join(ordered[:MAX_NAMES]) + (f" and {len(ordered) - MAX_NAMES} more" if len(ordered) > MAX_NAMES else "")
