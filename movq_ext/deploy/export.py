"""Compile decoders to files (.pt2) that run without the model's code, by torch.export and AOTInductor."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..io.files import (
    MAX_REASON_CHARACTERS,
    atomic_write,
    follow_link,
    parse_json,
    printable,
    remove_partial_files,
    require_file,
    require_writable,
    wrap_errors,
)
from ..model.autoencoder import MOVQ
from ..model.checks import check_positive
from ..model.decoder import MOVQDecoder

SizeRange = int | tuple[int, int]  # one size, or (minimum, maximum)
METADATA_KEY = "movq_ext.decoder"
EXAMPLE_SIZES = {"batch": 2, "height": 4, "width": 6}  # torch.export makes size 1 a constant, and gives equal sizes one symbol
DIMENSIONS = {"batch": 0, "height": 2, "width": 3}


class ExportError(RuntimeError):
    """The decoder could not be compiled on this machine."""


class QuantDecoder(nn.Module):
    """`MOVQ.decode` as a module."""

    def __init__(self, model: MOVQ) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = model.post_quant_conv, model.decoder

    def forward(self, quant: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(quant), quant)
        return out


def export_decoder(
    model: MOVQDecoder | MOVQ,
    path: str | Path,
    *,
    height: SizeRange = 32,
    width: SizeRange | None = None,
    batch: SizeRange = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    inductor_configs: Mapping[str, Any] | None = None,
) -> Path:
    """Compile a decoder and its weights to one file, which any program with libtorch can run. Takes a minute or more.

    The program compiled from a MOVQDecoder takes ``z (B, z_channels, h, w)`` and ``zq (B, zq_ch, h, w)``. The one compiled from a
    MOVQ takes the argument of `MOVQ.decode`, ``quant (B, embed_dim, h, w)``. Both return the image ``(B, out_ch, H, W)``, in
    evaluation mode and without gradients; ``torch.no_grad()`` is not needed.

    `load_exported` runs the file and checks its arguments. To run it without movq_ext:

    - Python: ``torch._inductor.aoti_load_package(path)(z, zq)``;
    - C++: ``torch::inductor::AOTIModelPackageLoader(path).run({z, zq})``, from
      ``torch/csrc/inductor/aoti_package/model_package_loader.h``.

    **Neither checks its arguments**: a tensor of the wrong size, dtype or layout (it must be contiguous) gives wrong results or
    reads beyond its memory. ``get_metadata()["movq_ext.decoder"]`` holds the right ones. With ``AOTI_RUNTIME_CHECK_INPUTS=1`` in
    the environment, torch checks them too, but also refuses size 1 where that is the minimum of a range.

    The file runs only with this version of torch, on CPUs with this one's vector instructions or GPUs of this one's compute
    capability. For a CPU, it holds only PyTorch's operators. Where the CUDA kernels run (see `explain`), it calls them: a program
    that does not import movq_ext must first load movq_ext's ``_C.*.so`` with ``torch.ops.load_library`` (in C++ with ``dlopen``,
    in a program linked with libpython). Not yet run on a GPU.

    Args:
        model: is not modified.
        path: file to write, ending in ``.pt2``. An existing file is replaced atomically.
        height, width: of the latent: one size, or (minimum, maximum) for a program that takes all sizes between. width defaults
            to height.
        batch: number of images: one size, or (minimum, maximum).
        dtype: of weights, latents and image; the model's if None.
        device: to compile on and for; the model's if None.
        inductor_configs: options of torch._inductor.config, such as ``{"max_autotune": True}``.

    Returns:
        path.

    Raises:
        TypeError: model is neither class, a size is not an integer, or dtype is not floating point.
        ValueError: path does not end in .pt2, or a size or range is not positive.
        FileNotFoundError: path's folder does not exist.
        OSError: path cannot be written.
        ExportError: no C++ compiler is found, or PyTorch's compiler fails.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # imported late: this takes a second
    from torch._inductor.exc import InvalidCxxCompiler

    path = Path(path)
    if not isinstance(model, (MOVQDecoder, MOVQ)):
        raise TypeError(f"model must be a MOVQDecoder or a MOVQ, got {type(model).__name__}")
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in an existing folder, got {str(path.parent)!r}")
    require_writable(follow_link(path).parent)  # compiling takes minutes
    sizes = {"batch": batch, "height": height, "width": height if width is None else width}
    ranges = {name: _as_range(name, size) for name, size in sizes.items()}
    weight = next(model.parameters())
    device, dtype = torch.device(device or weight.device), dtype or weight.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ExportError(f"a C++ compiler is needed to export a decoder (set CXX, or install g++): {error}") from error

    network = deepcopy(QuantDecoder(model) if isinstance(model, MOVQ) else model).to(device, dtype).eval().requires_grad_(False)
    decoder = model.decoder if isinstance(model, MOVQ) else model
    channels = {"quant": decoder.zq_ch} if isinstance(model, MOVQ) else {"z": decoder.z_channels, "zq": decoder.zq_ch}
    batch, height, width = (min(max(EXAMPLE_SIZES[name], low), high) for name, (low, high) in ranges.items())
    latents = [torch.zeros(batch, count, height, width, dtype=dtype, device=device) for count in channels.values()]
    metadata = {"version": __version__, "channels": channels, **ranges, "dtype": str(dtype)[6:], "device": device.type}
    with tempfile.TemporaryDirectory() as folder:
        try:
            package = _compile(network, latents, ranges, f"{folder}/decoder.pt2", metadata, inductor_configs)
        except Exception as error:  # the compilers of Python, C++ and CUDA raise many kinds
            raise ExportError(f"PyTorch could not compile the decoder for {device}: {error}") from error
        remove_partial_files([path])
        with atomic_write(path) as partial:
            shutil.copyfile(package, partial)
    return path


def _compile(
    network: nn.Module,
    latents: list[Tensor],
    ranges: Mapping[str, tuple[int, int]],
    path: str,
    metadata: Mapping[str, Any],
    inductor_configs: Mapping[str, Any] | None,
) -> str:
    from torch._inductor import aoti_compile_and_package

    dynamic = {DIMENSIONS[name]: torch.export.Dim(name, min=low, max=high) for name, (low, high) in ranges.items() if low < high}
    configs = {
        "aot_inductor.use_runtime_constant_folding": True,  # folded weights are computed once, on loading
        **(inductor_configs or {}),
        "aot_inductor.metadata": {METADATA_KEY: json.dumps(metadata)},
    }
    with torch.no_grad(), torch.autocast(latents[0].device.type, enabled=False):
        program = torch.export.export(network, tuple(latents), dynamic_shapes=(dynamic,) * len(latents))
        package: str = aoti_compile_and_package(program, package_path=path, inductor_configs=configs)
    return package


class ExportedDecoder:
    """A program that `export_decoder` compiled. Call it like the model: ``(z, zq)`` or ``(quant)`` to an image.

    Args:
        path, device: see `load_exported`.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it is unreadable or not a regular file.
        ValueError: the file was not written by `export_decoder`, is damaged, or was compiled for another type of device, machine
            or version of torch.

    Attributes:
        inputs: channels of each latent, by name.
        batch: minimum and maximum number of images.
        height: minimum and maximum number of the latent's rows.
        width: minimum and maximum number of the latent's columns.
        dtype: of latents and image.
        device: of latents and image; without an index, any device of that type.
    """

    def __init__(self, path: str | Path, device: torch.device | str | None = None) -> None:
        from torch._inductor import aoti_load_package

        path = Path(path)
        require_file(path)
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} cannot be loaded: expected an archive that export_decoder wrote, or the file is damaged")
        device = None if device is None else torch.device(device)
        with wrap_errors(ValueError, f"{path} cannot be loaded: damaged, or compiled for another machine or version of torch"):
            self._run = aoti_load_package(str(path), device_index=-1 if device is None or device.index is None else device.index)
            stored = self._run.get_metadata()
        if METADATA_KEY not in stored:
            raise ValueError(f"{path} was not written by export_decoder")
        try:
            metadata = parse_json(stored[METADATA_KEY])
            self.inputs = _parse_inputs(metadata)
            self.batch, self.height, self.width = (_as_range(name, tuple(metadata[name])) for name in DIMENSIONS)
            self.dtype = _parse_dtype(metadata["dtype"])
            compiled_for = torch.device(str(metadata["device"])).type  # of a number, a CUDA build would make cuda:0
        except Exception as error:  # of any type: a part may be missing or be anything
            reason = printable(repr(error), MAX_REASON_CHARACTERS)
            raise ValueError(f"{path} has metadata that this version of movq_ext cannot read: {reason}") from error
        self.device = device or torch.device(compiled_for)
        if self.device.type != compiled_for:
            raise ValueError(f"device must be a {compiled_for} device, which {path} was compiled for, got {self.device}")

    def __call__(self, *latents: Tensor) -> Tensor:
        """Decode latents ``(batch, channels, height, width)`` with any strides to images ``(batch, out_ch, H, W)``.

        Raises TypeError (number, dtype) or ValueError (shape, device), which name the argument.
        """
        if len(latents) != len(self.inputs):
            raise TypeError(f"expected {' and '.join(self.inputs)}, got {len(latents)} arguments")
        for (name, channels), x in zip(self.inputs.items(), latents, strict=True):
            if not isinstance(x, Tensor) or x.dtype != self.dtype:
                given = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name} must be a tensor of {self.dtype}, got {given}")
            if x.device.type != self.device.type or self.device.index not in (None, x.device.index):
                raise ValueError(f"{name} must be on {self.device}, got {x.device}")
            ranges = [self.batch, (channels, channels), self.height, self.width]
            if x.dim() != 4 or not all(low <= size <= high for size, (low, high) in zip(x.shape, ranges, strict=True)):
                expected = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in ranges)
                raise ValueError(f"{name} must have shape ({expected}), got {tuple(x.shape)}")
            if x.shape[0] != latents[0].shape[0] or x.shape[2:] != latents[0].shape[2:]:
                shapes = [tuple(x.shape) for x in latents]
                raise ValueError(f"{' and '.join(self.inputs)} must have the same batch, height and width, got {shapes}")
        with torch.no_grad():
            out: Tensor = self._run(*(x.detach().contiguous() for x in latents))
        return out


def load_exported(path: str | Path, device: torch.device | str | None = None) -> ExportedDecoder:
    """Load a file that `export_decoder` wrote. The model is not needed, nor is ``torch.no_grad()`` for calling the program.

    Args:
        path: the file. It contains machine code: load only files you trust.
        device: a GPU other than the first, such as ``"cuda:1"``; its type must be the one that the file was compiled for.

    Returns:
        The program, called like the model.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it is unreadable or not a regular file.
        ValueError: the file was not written by `export_decoder`, is damaged, or was compiled for another type of device, machine
            or version of torch.
    """
    return ExportedDecoder(path, device)


def _parse_inputs(metadata: Mapping[str, Any]) -> dict[str, int]:
    inputs = dict(metadata["channels"])
    if list(inputs) not in (["quant"], ["z", "zq"]):
        raise ValueError(f"channels must match quant, or z and zq, got {inputs!r}")
    check_positive(**inputs)
    return inputs


def _parse_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be the name of a floating-point dtype, got {name!r}")
    return dtype


def _as_range(name: str, size: SizeRange) -> tuple[int, int]:
    bounds = size if isinstance(size, tuple) else (size, size)
    if len(bounds) != 2 or not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds):
        raise TypeError(f"{name} must be an integer or (minimum, maximum), got {size!r}")
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(f"{name} must be positive, with minimum <= maximum, got {size!r}")
    return bounds
