"""Finding the compiled extension ``movq_ext._C``: it is loaded where it fits the running torch, and never crashes."""

from __future__ import annotations

import functools
import json
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .._version import __version__

RECORD = Path(__file__).parents[1] / "_build_record.json"  # written by setup.py


def read_record(path: Path = RECORD) -> dict[str, Any]:
    """What setup.py noted of the build; a reason instead where it noted nothing."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return {"torch": None, "reason": "movq_ext was not installed but imported from its source folder"}
    except (OSError, ValueError) as error:
        return {"torch": None, "reason": f"{path} cannot be read: {error}"}
    return record if isinstance(record, dict) else {"torch": None, "reason": f"{path} is damaged"}


def load(record: dict[str, Any]) -> tuple[ModuleType | None, str | None]:
    """(the extension, None) or (None, why there is none).

    Warns, once, where an extension was compiled but cannot be used. The record is read first because loading a library
    that was compiled against another torch can end the process. Another torch is any other version string: what torch
    promises of its C++ interface holds within one build, and 2.14.1+cu126 and 2.14.1+cu130 need different CUDA libraries.
    """
    built_with = record.get("torch")
    if built_with is None:
        return None, f"movq_ext was built without its CUDA kernels: {record.get('reason')}"
    if built_with != torch.__version__:
        reason = (
            f"movq_ext._C was compiled against torch {built_with}, but torch {torch.__version__} is running; "
            "reinstall movq_ext to compile it against the running torch"
        )
    else:
        try:
            return import_module("movq_ext._C"), None
        except Exception as error:  # whatever is wrong with it, the native path works
            reason = f"movq_ext._C cannot be loaded: {error}"
    warnings.warn(f"{reason}. The native path is used instead.", RuntimeWarning, stacklevel=2)
    return None, reason


_record = read_record()
extension, _reason = load(_record)


def extension_available() -> bool:
    """Whether the compiled extension is loaded."""
    return extension is not None


def extension_reason() -> str | None:
    """Why there is no compiled extension, or None if there is one."""
    return _reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache  # the answer cannot change, and asking makes the device's CUDA context
def device_reason(index: int) -> str | None:
    """Why the extension has nothing to run on the CUDA device of this index, or None if it has."""
    if extension is None:
        return _reason
    try:
        support = extension.device_support(index)
    except RuntimeError as error:
        return f"device {index} cannot be asked: {error}"
    if support["binary_version"]:
        return None
    major, minor = divmod(support["device_capability"], 10)
    return (
        f"movq_ext._C was compiled for compute capability {_record.get('arch_list')}, device {index} has {major}.{minor}; "
        f"reinstall movq_ext with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def warn_once(reason: str) -> None:
    """Says that the native path runs on a GPU, and why: once for each reason."""
    warnings.warn(f"movq_ext runs on PyTorch's own operators: {reason}", RuntimeWarning, stacklevel=4)


def build_info() -> dict[str, Any]:
    """How movq_ext was built and what it runs on:

    - ``version`` of movq_ext;
    - ``extension``, ``"loaded"`` or why not;
    - ``built_with_torch``, ``built_with_nvcc`` and ``arch_list`` of the extension, None without one;
    - ``torch`` and ``torch_cuda``, the running versions; ``torch_cuda`` is None for a CPU build;
    - ``devices``, for every visible GPU its ``name``, ``capability`` and ``kernels``, which is ``"compiled"`` if the extension
      holds code for it, or why not.

    Returns:
        A dictionary with these keys, which JSON can hold.
    """
    return {
        "version": __version__,
        "extension": _reason or "loaded",
        "built_with_torch": _record.get("torch"),
        "built_with_nvcc": _record.get("nvcc"),
        "arch_list": _record.get("arch_list"),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "devices": [_device_info(index) for index in range(torch.cuda.device_count())],
    }


def _device_info(index: int) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": f"{major}.{minor}",
        "kernels": device_reason(index) or "compiled",
    }
