"""Read the dictionaries of tensors in a ``torch.save`` file. No code from the file runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import MAX_REASON_CHARACTERS, printable
from .stored_tensors import StoredTensor
from .tensor_files import CheckpointError, format_names
from .torch_archives import ZIP_MAGIC, read_archive, read_legacy_file
from .torch_pickles import Placeholder

MAX_DEPTH = 8  # levels of dictionaries that are searched
MAX_FOREIGN_NAMES = 256  # of classes and functions that do not belong to tensors
MAX_MODULE_ENTRIES = 1 << 16  # of all saved nn.Modules in a file
MAX_MODULE_NAME_CHARACTERS = 1 << 10
SYSTEM_MODULES = ("os", "posix", "nt", "sys")  # no data have a class or function of these
KNOWN_NAMES = {  # classes and functions that torch.load(weights_only=True) knows
    "collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.bytearray", "builtins.set", "builtins.complex",
}  # fmt: skip


def read_torch_file(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return every dictionary of tensors in the file, by the keys that lead to it. Tensors are `StoredTensor`, not read yet.

    In a zip archive, objects of other classes become placeholders, so that a callback or a hyperparameter does not hide the
    weights. A saved ``nn.Module`` gives its entries.

    Raises CheckpointError if the file names a function of the system, or in the format before torch 1.6 any foreign class, and
    CheckpointError or another error if it is damaged.
    """
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    content, names = (read_archive if is_zip else read_legacy_file)(path)
    foreign = [name for name in names if name not in KNOWN_NAMES and name.partition(".")[0] != "torch"]
    calls_system = any(name.partition(".")[0] in SYSTEM_MODULES for name in foreign)
    if calls_system or len(foreign) > MAX_FOREIGN_NAMES or (foreign and not is_zip):
        advice = "If you trust the file, load it with torch.load(weights_only=False) and save its state_dict alone"
        raise CheckpointError(
            f"{path} contains objects other than tensors, which could run code: {format_names(foreign)}. {advice}"
        )
    if not isinstance(content, dict) or (isinstance(content, Placeholder) and not content and not _is_module(content)):
        found = content.original if isinstance(content, Placeholder) else type(content).__name__
        raise CheckpointError(f"{path}: expected a dictionary of named tensors, got {printable(found, MAX_REASON_CHARACTERS)}")
    return dict(_find_dictionaries(content, (), set(), itertools.count(1)))


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
        if all(isinstance(name, str) for name in value) and any(isinstance(entry, StoredTensor) for entry in value.values()):
            yield keys, value
        for name, child in value.items():
            if isinstance(name, str):
                yield from _find_dictionaries(child, (*keys, name), seen, entry_numbers)


def _is_module(value: Any) -> bool:
    parts = ("_parameters", "_buffers", "_modules")
    return isinstance(value, Placeholder) and isinstance(value.state, dict) and all(part in value.state for part in parts)


def _module_entries(module: Placeholder, seen: set[int], entry_numbers: Iterator[int]) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) for the parameters and buffers of a saved nn.Module, without the ones of submodules seen before."""
    modules = [("", module)]
    while modules:
        prefix, module = modules.pop()
        state = module.state
        temporary = state.get("_non_persistent_buffers_set")
        temporary = temporary if isinstance(temporary, set) else set()  # a file can put a long list there
        for name, value in [*state["_parameters"].items(), *state["_buffers"].items(), *state["_modules"].items()]:
            if type(name) is not str:
                raise CheckpointError("expected text as the names of a saved module's entries, got other keys")
            if next(entry_numbers) > MAX_MODULE_ENTRIES or len(prefix) + len(name) > MAX_MODULE_NAME_CHARACTERS:
                limits = f"at most {MAX_MODULE_ENTRIES} entries in all, with names of {MAX_MODULE_NAME_CHARACTERS} characters"
                raise CheckpointError(f"expected saved modules of {limits}, got more")
            if _is_module(value) and id(value) not in seen:
                seen.add(id(value))
                modules.append((f"{prefix}{name}.", value))
            elif isinstance(value, StoredTensor) and name not in temporary:
                yield prefix + name, value
