"""Loading of the compiled extension ``movq_ext._C``, if the running torch can use it; any failure leaves the native path."""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import torch

from .._version import __version__
from .source_folder import warn_if_installed_elsewhere

Function = TypeVar("Function", bound=Callable[..., Any])

PACKAGE = Path(__file__).resolve().parents[1]
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RECORD = PACKAGE / "_build_record.json"  # written by setup.py


def read_record(path: Path = RECORD) -> dict[str, Any]:
    """Return the build record of setup.py, or one that gives the reason why there is none."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return {"torch": None, "reason": "it was imported from its source folder, not installed"}
    except (OSError, ValueError) as error:
        return {"torch": None, "reason": f"{path} cannot be read: {error}"}
    return record if isinstance(record, dict) else {"torch": None, "reason": f"{path} is damaged"}


def load(record: dict[str, Any]) -> tuple[ModuleType | None, str | None]:
    """Return (the extension, None), or (None, the reason); warn if this torch could use a GPU, but not with the extension.

    The versions in the record are compared first: with another CUDA the extension would need libraries that are not there, and
    an older torch may crash.
    """
    if record.get("torch") is None:
        return None, f"movq_ext was built without its CUDA kernels: {record.get('reason')}"
    reason = _mismatch(record)
    if reason is None:
        try:
            return import_module("movq_ext._C"), None
        except Exception as error:  # no failure here stops the native path
            reason = f"movq_ext._C cannot be loaded: {error}"
    if torch.version.cuda is not None:
        warnings.warn(f"{reason}. The native path is used instead.", RuntimeWarning, stacklevel=2)
    return None, reason


def _mismatch(record: dict[str, Any]) -> str | None:
    """Return why the running torch cannot use the extension, or None if it can.

    The extension uses PyTorch's stable ABI: it runs with every torch from ``minimum_torch`` on. It also uses torch's CUDA
    runtime, which is compatible within a major version.
    """
    if "minimum_torch" not in record:
        return "movq_ext._C was compiled by an older movq_ext; reinstall movq_ext"
    minimum, built_cuda = str(record["minimum_torch"]), str(record.get("nvcc"))
    running = f"torch {torch.__version__} is running"
    if _release(torch.__version__) < _release(minimum):
        return f"movq_ext._C needs torch {minimum} or newer, but {running}"
    if torch.version.cuda is None:
        return f"movq_ext._C needs a torch for CUDA {_major(built_cuda)}, but {running}, a build without CUDA"
    if _major(torch.version.cuda) != _major(built_cuda):
        return (
            f"movq_ext._C was compiled for CUDA {_major(built_cuda)}, but {running}, a build for CUDA {torch.version.cuda}; "
            "reinstall movq_ext from source to compile it for that"
        )
    return None


def _release(version: str) -> tuple[int, ...]:
    """Return the first two numbers: a pre-release of the minimum has its ABI."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _major(version: str) -> str:
    return version.split(".")[0]


warn_if_installed_elsewhere(PACKAGE)
_record = read_record()
extension, _reason = load(_record)


def extension_available() -> bool:
    """Return True if the compiled extension is loaded."""
    return extension is not None


def extension_reason() -> str | None:
    """Return why there is no compiled extension, or None if there is one."""
    return _reason


def arch_list() -> str:
    """Return the compute capabilities that the extension was compiled for, as in ``TORCH_CUDA_ARCH_LIST``."""
    return _record.get("arch_list") or ""


def cached_constant(function: Function) -> Function:
    """Cache a function of constants, and let torch.compile take its results as constants.

    functools.cache alone does not do that: torch.compile traces the function behind it.
    """
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def constant(*args: Any) -> Any:
        return cached(*args)

    functools.update_wrapper(constant, function, updated=())
    constant.cache_clear = cached.cache_clear
    return cast(Function, constant)


@cached_constant  # the answer cannot change, and asking creates a CUDA context on the device
def device_reason(index: int | None) -> str | None:
    """Return why the extension cannot run on a CUDA device, or None if it can."""
    if extension is None:
        return _reason
    try:
        support = extension.device_support(index)
    except RuntimeError as error:
        return f"device {index} cannot be queried: {error}"
    if support["binary_version"]:
        return None
    major, minor = divmod(support["device_capability"], 10)
    return (
        f"movq_ext._C was compiled for compute capability {_record.get('arch_list')}, but device {index} has {major}.{minor}; "
        f"reinstall movq_ext with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def dtype_reason(dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot take a dtype, or None if they can."""
    if dtype in KERNEL_DTYPES:
        return None
    return f"the CUDA kernels take {', '.join(dtype_name(kind) for kind in KERNEL_DTYPES)}, got {dtype_name(dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@cached_constant
def warn_once(reason: str) -> None:
    """Warn that a GPU tensor takes the native path, once for each reason."""
    warnings.warn(f"movq_ext runs PyTorch's own operators: {reason}", RuntimeWarning, stacklevel=4)


def build_info() -> dict[str, Any]:
    """Return how movq_ext was built and what it runs on.

    - ``version``: of movq_ext;
    - ``extension``: ``"loaded"``, or why it is not;
    - ``built_with_torch``, ``built_with_nvcc``, ``minimum_torch``, ``arch_list``: of the extension, None without one. It runs
      with every torch from ``minimum_torch`` on with nvcc's CUDA major version, on GPUs of the architectures in ``arch_list``;
    - ``torch``, ``torch_cuda``: the running versions; ``torch_cuda`` is None for a CPU build;
    - ``devices``: for every visible GPU its ``name``, ``capability`` and ``kernels``, which is ``"compiled"`` if the extension
      has code for it, or the reason why not.

    Returns:
        A dictionary with these keys, serialisable as JSON.
    """
    return {
        "version": __version__,
        "extension": _reason or "loaded",
        "built_with_torch": _record.get("torch"),
        "built_with_nvcc": _record.get("nvcc"),
        "arch_list": _record.get("arch_list"),
        "minimum_torch": _record.get("minimum_torch"),
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
