"""Find the weight file in the folder of a model or of a pipeline."""

from __future__ import annotations

import re
from pathlib import Path

from .files import require_file
from .tensor_files import CheckpointError, format_names

OUR_FILE = "model.safetensors"
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PIPELINE_PARTS = ("movq", "vae")  # the autoencoder's folder in a diffusers pipeline


def find_weights(path: Path, subfolder: str | None, variant: str | None) -> tuple[Path, Path | None]:
    """Return the weight file, and the ``config.json`` of a diffusers model if there is one.

    Args:
        path: a file, or a folder of a model or a diffusers pipeline.
        subfolder: folder below path, or None.
        variant: part of the file's name before its suffix, or None.

    Raises:
        ValueError: subfolder or variant is given, and path is a file.
        FileNotFoundError: path, subfolder or the weight file does not exist.
        OSError: ``config.json`` is not a regular file.
        CheckpointError: the folder does not hold a model. The message lists what it holds.
    """
    if not path.exists():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
        advice = "; to load from the Hugging Face Hub, pass the folder that huggingface_hub.snapshot_download returns"
        raise FileNotFoundError(f"no such file or folder: {path}{advice if hub else ''}")
    if not path.is_dir():
        if subfolder is not None or variant is not None:
            raise ValueError(f"subfolder and variant are only for folders, and {path} is a file")
        return path, None
    folder = path if subfolder is None else path / subfolder
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}; {_describe(path)}")
    names = [_with_variant(name, variant) for name in (OUR_FILE, *DIFFUSERS_FILES)]
    file = next((folder / name for name in names if (folder / name).exists()), None)
    config = folder / "config.json"
    if file is not None:
        return file, config if file.name != names[0] and config.exists() else None
    if config.exists():
        require_file(config)
    part = next((name for name in PIPELINE_PARTS if (folder / name).is_dir()), None)
    if part is not None and not config.exists():
        return find_weights(folder, part, variant)
    if config.exists() or variant is not None or _variants(folder):
        raise FileNotFoundError(f"no such file: {folder / names[1]} (or .bin); {_describe(folder)}")
    expected = f"{OUR_FILE} (from save_pretrained) or config.json (from diffusers), or a pipeline with movq/ or vae/"
    raise CheckpointError(f"{folder}: expected {expected}; {_describe(folder)}")


def _with_variant(name: str, variant: str | None) -> str:
    stem, suffix = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _variants(folder: Path) -> list[str]:
    matches = (re.fullmatch(r"diffusion_pytorch_model\.([\w-]+)\.(?:safetensors|bin)", file.name) for file in folder.iterdir())
    return sorted({match[1] for match in matches if match})


def _describe(folder: Path) -> str:
    """Return what the folder holds, for an error message."""
    found = format_names(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    variants = " or ".join(f"variant={variant!r}" for variant in _variants(folder))
    return f"{folder} has {found or 'no files'}" + (f": pass {variants}" if variants else "")
