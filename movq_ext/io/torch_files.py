"""Read the dictionaries of tensors in a ``torch.save`` file. No code from the file runs."""

from __future__ import annotations

import itertools
import pickle
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import MAX_REASON_CHARACTERS, printable
from .tensor_files import CheckpointError, check_claimed_bytes, format_names

ZIP_MAGIC = b"PK\3\4"  # torch.save writes a zip archive since torch 1.6
MAX_DEPTH = 8  # levels of dictionaries that are searched
MAX_FOREIGN_NAMES = 256  # of classes and functions that torch does not know
MAX_MODULE_ENTRIES = 1 << 16  # of all saved nn.Modules in a file
MAX_MODULE_NAME_CHARACTERS = 1 << 10

_allow_lock = threading.Lock()  # torch keeps one list of allowed names for the whole process


class Placeholder:
    """Takes the place of an object whose class torch.load does not know. Stores the object's state and does nothing else."""

    original = ""  # the qualified name of the object's class
    state: Any = None

    def __new__(cls, *arguments: Any) -> Placeholder:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_torch_file(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return every dictionary of tensors in the file, by the keys that lead to it.

    ``torch.load(weights_only=True)`` reads the file. In a zip archive, names that torch does not know become `Placeholder`
    classes, so that a callback or a hyperparameter does not hide the weights. A saved ``nn.Module`` gives its entries.

    ``torch.serialization.safe_globals`` allows these names in the whole process while the file is read.

    Raises CheckpointError if the file is damaged, or contains objects that only their own code could read.
    """
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if is_zip:
        _check_archive(path)
    foreign: list[str] = []
    try:
        with _allow_lock:
            if is_zip:
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if len(foreign) > MAX_FOREIGN_NAMES:
                raise pickle.UnpicklingError(f"more than {MAX_FOREIGN_NAMES} classes and functions")
            with torch.serialization.safe_globals([_placeholder_for(name) for name in foreign]):
                with open(path, "rb") as file:  # by its path, torch.load reads x.safetensors as safetensors, whatever is in it
                    content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = foreign or re.findall(r"GLOBAL (\S+) was not an allowed global", str(error))
        problem = "contains" if names else "is damaged or contains"
        paragraphs = str(error).split("\n\n")  # of torch: advice, the reason, a link
        reason = printable(paragraphs[-2 if len(paragraphs) > 2 else 0].strip(), MAX_REASON_CHARACTERS)
        advice = "If you trust the file, load it with torch.load(weights_only=False) and save its state_dict alone"
        message = f"{path} {problem} objects other than tensors, which could run code: {format_names(names) or reason}. {advice}"
        raise CheckpointError(f"{message}. Reason: {reason}" if foreign else message) from error
    if not isinstance(content, dict) and not _is_module(content):
        found = content.original if isinstance(content, Placeholder) else type(content).__name__
        raise CheckpointError(f"{path}: expected a dictionary of named tensors, got {printable(found, MAX_REASON_CHARACTERS)}")
    return dict(_find_dictionaries(content, (), set(), itertools.count(1)))


def _check_archive(path: Path) -> None:
    """Refuse archives that torch.save did not write, and compressed ones, which could fill the memory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename.rpartition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript archive: expected a state_dict saved by torch.save or safetensors")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive that torch.save did not write: expected weights")
    check_claimed_bytes(path, sum(entry.file_size for entry in entries))


def _placeholder_for(name: str) -> tuple[Any, str]:
    """Return (object, name) for safe_globals. torch.load adds items only to dict, OrderedDict and Counter."""
    if name == "collections.defaultdict":
        return _empty_dictionary, name
    return type("Placeholder", (Placeholder,), {"original": name}), name


def _empty_dictionary(*arguments: Any) -> OrderedDict[Any, Any]:
    return OrderedDict()


def _find_dictionaries(
    value: Any, keys: tuple[str, ...], seen: set[int], entry_numbers: Iterator[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield (keys, dictionary) for value and the dictionaries below it that contain tensors.

    seen has the ids of dictionaries and modules that were found, and entry_numbers counts the entries of modules in the file.
    """
    if id(value) in seen or len(keys) > MAX_DEPTH:  # a file can nest a dictionary in itself
        return
    seen.add(id(value))
    if _is_module(value):
        yield keys, dict(_module_entries(value, seen, entry_numbers))
    elif isinstance(value, dict):
        if all(isinstance(name, str) for name in value) and any(isinstance(entry, Tensor) for entry in value.values()):
            yield keys, value
        for name, child in value.items():
            if isinstance(name, str):
                yield from _find_dictionaries(child, (*keys, name), seen, entry_numbers)


def _is_module(value: Any) -> bool:
    parts = ("_parameters", "_buffers", "_modules")
    return isinstance(value, Placeholder) and isinstance(value.state, dict) and all(part in value.state for part in parts)


def _module_entries(module: Placeholder, seen: set[int], entry_numbers: Iterator[int]) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) for the parameters and buffers of a saved nn.Module, without those of submodules seen before."""
    modules = [("", module)]
    while modules:
        prefix, module = modules.pop()
        state = module.state
        for name, value in [*state["_parameters"].items(), *state["_buffers"].items(), *state["_modules"].items()]:
            if next(entry_numbers) > MAX_MODULE_ENTRIES or len(prefix) + len(name) > MAX_MODULE_NAME_CHARACTERS:
                limits = f"at most {MAX_MODULE_ENTRIES} entries in all, with names of {MAX_MODULE_NAME_CHARACTERS} characters"
                raise CheckpointError(f"expected saved modules of {limits}, got more")
            if _is_module(value) and id(value) not in seen:
                seen.add(id(value))
                modules.append((f"{prefix}{name}.", value))
            elif isinstance(value, Tensor) and name not in state.get("_non_persistent_buffers_set", ()):
                yield prefix + name, value
