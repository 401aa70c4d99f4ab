"""Decoders as compiled files (.pt2) that run without the code of the model: torch.export and AOTInductor."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..io.files import atomic_write
from ..model.autoencoder import MOVQ
from ..model.decoder import MOVQDecoder

Sizes = int | tuple[int, int]  # one size, or the least and the most
METADATA = "movq_ext.decoder"


class ExportError(RuntimeError):
    """A decoder could not be compiled here."""


class QuantDecoder(nn.Module):
    """`MOVQ.decode` without the rest of the model."""

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
    height: Sizes = 32,
    width: Sizes | None = None,
    batch: Sizes = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    inductor_configs: Mapping[str, Any] | None = None,
) -> Path:
    """Compile a decoder, weights included, into one file that any program with libtorch runs. It takes a minute or several.

    The program of a MOVQDecoder takes ``z (B, z_channels, h, w)`` and ``zq (B, zq_ch, h, w)``; that of a MOVQ takes what
    `MOVQ.decode` takes, ``quant (B, embed_dim, h, w)``. Both return the image ``(B, out_ch, H, W)`` and run in evaluation,
    without gradients.

    `load_exported` runs the file and checks what it is given. Without movq_ext:

    - Python: ``torch._inductor.aoti_load_package(path)(z, zq)``;
    - C++: ``torch::inductor::AOTIModelPackageLoader(path).run({z, zq})``, from
      ``torch/csrc/inductor/aoti_package/model_package_loader.h``.

    **They check nothing**: a wrong size, dtype or layout (contiguous is right) is read as if it were the right one. What is right
    stands in ``get_metadata()["movq_ext.decoder"]`` and, with ``AOTI_RUNTIME_CHECK_INPUTS=1`` in the environment, torch checks it
    (and refuses size 1 where that is the least of several).

    The file is for this version of torch and this kind of device: CPUs with the vector instructions of this one, or GPUs of
    this one's compute capability. On a CPU it holds PyTorch's own operators only. Where the CUDA kernels run (see `explain`) it
    calls them, and whoever loads it without movq_ext calls ``torch.ops.load_library`` first, on movq_ext's ``_C.*.so`` (in C++
    ``dlopen``, in a program that is linked with libpython). Not yet run on a GPU.

    Args:
        model: is left as it is.
        path: file to write, ending in ``.pt2``. An older one is replaced at once, when all is done.
        height, width: of the latent: one size, or (least, most) for a program that takes all between. width is height if None.
        batch: images, alike.
        dtype: of weights, latents and image; the model's if None.
        device: to compile for and on; the model's if None.
        inductor_configs: options of torch._inductor.config, such as ``{"max_autotune": True}``.

    Returns:
        path.

    Raises:
        TypeError: model is neither class, a size is no integer, or dtype is not floating point.
        ValueError: path does not end in .pt2, or a size or range is not positive.
        FileNotFoundError: path's folder does not exist.
        ExportError: no C++ compiler is found, or PyTorch's compiler fails.
    """
    from torch._inductor import aoti_compile_and_package  # here, because it takes a second that only an export needs
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    path = Path(path)
    if not isinstance(model, (MOVQDecoder, MOVQ)):
        raise TypeError(f"model must be a MOVQDecoder or a MOVQ, got {type(model).__name__}")
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path is in a folder that does not exist: {str(path.parent)!r}")
    sizes = {"batch": batch, "height": height, "width": height if width is None else width}
    ranges = {name: _range(name, size) for name, size in sizes.items()}
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
    metadata = {"version": __version__, "channels": channels, **ranges, "dtype": str(dtype)[6:], "device": device.type}
    # A size of 1 would be taken for a constant, and two equal ones for one.
    example = [min(most, max(least, few)) for few, (least, most) in zip((2, 4, 6), ranges.values(), strict=True)]
    latents = tuple(torch.zeros(example[0], count, *example[1:], dtype=dtype, device=device) for count in channels.values())
    dynamic = {
        dim: torch.export.Dim(name, min=least, max=most)
        for dim, (name, (least, most)) in zip((0, 2, 3), ranges.items(), strict=True)
        if least < most
    }
    configs = {
        "aot_inductor.use_runtime_constant_folding": True,  # what is made of weights alone is made when the file is loaded
        **(inductor_configs or {}),
        "aot_inductor.metadata": {METADATA: json.dumps(metadata)},
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                program = torch.export.export(network, latents, dynamic_shapes=(dynamic,) * len(latents))
                package = aoti_compile_and_package(program, package_path=f"{folder}/decoder.pt2", inductor_configs=configs)
        except Exception as error:  # whatever the compilers of Python, C++ and CUDA have to say
            raise ExportError(f"PyTorch could not compile the decoder for {device}: {error}") from error
        with atomic_write(path) as partial:
            shutil.copyfile(package, partial)
    return path


class ExportedDecoder:
    """A file of `export_decoder`, loaded. Call it like the model it was made from: ``(z, zq)`` or ``(quant)`` to an image.

    Args:
        path, device: see `load_exported`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, is damaged, or was compiled for another kind of device.

    Attributes:
        inputs: channels of each latent, by name.
        batch: the least and the most images.
        height: the least and the most rows of the latent.
        width: the least and the most columns.
        dtype: of latents and image.
        device: of latents and image; without an index, any device of that type.
    """

    def __init__(self, path: str | Path, device: torch.device | str | None = None) -> None:
        from torch._inductor import aoti_load_package

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        device = None if device is None else torch.device(device)
        try:
            self._run = aoti_load_package(str(path), device_index=-1 if device is None or device.index is None else device.index)
            metadata = json.loads(self._run.get_metadata()[METADATA])
        except KeyError as error:
            raise ValueError(f"{path} was not made by export_decoder") from error
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be loaded: {error}") from error
        self.inputs: dict[str, int] = metadata["channels"]
        self.batch, self.height, self.width = (tuple(metadata[name]) for name in ("batch", "height", "width"))
        self.dtype: torch.dtype = getattr(torch, metadata["dtype"])
        self.device = device or torch.device(metadata["device"])
        if self.device.type != metadata["device"]:
            raise ValueError(f"{path} was compiled for {metadata['device']}, device is {self.device}")

    def __call__(self, *latents: Tensor) -> Tensor:
        """Latents ``(batch, channels, height, width)``, any strides, to images ``(batch, out_ch, H, W)``.

        Raises TypeError (number, dtype) or ValueError (shape, device) naming the argument.
        """
        if len(latents) != len(self.inputs):
            raise TypeError(f"the program takes {' and '.join(self.inputs)}, got {len(latents)} arguments")
        for (name, channels), x in zip(self.inputs.items(), latents, strict=True):
            if not isinstance(x, Tensor) or x.dtype != self.dtype:
                given = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name} must be a tensor of {self.dtype}, got {given}")
            if x.device.type != self.device.type or self.device.index not in (None, x.device.index):
                raise ValueError(f"{name} must be on {self.device}, got {x.device}")
            bounds = [self.batch, (channels, channels), self.height, self.width]
            if x.dim() != 4 or not all(least <= size <= most for size, (least, most) in zip(x.shape, bounds, strict=True)):
                wanted = ", ".join(str(least) if least == most else f"{least} to {most}" for least, most in bounds)
                raise ValueError(f"{name} must have shape ({wanted}), got {tuple(x.shape)}")
            if x.shape[0] != latents[0].shape[0] or x.shape[2:] != latents[0].shape[2:]:
                shapes = [tuple(x.shape) for x in latents]
                raise ValueError(f"{' and '.join(self.inputs)} must have one batch, height and width, got {shapes}")
        with torch.no_grad():
            out: Tensor = self._run(*(x.detach().contiguous() for x in latents))
        return out


def load_exported(path: str | Path, device: torch.device | str | None = None) -> ExportedDecoder:
    """Load a file that `export_decoder` wrote, to run it without the model.

    Args:
        path: the file. It holds machine code: load only what you trust.
        device: ``"cuda:1"`` for a GPU other than the first; it must be of the type that the file was compiled for.

    Returns:
        The program, to be called like the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, is damaged, or was compiled for another kind of device.
    """
    return ExportedDecoder(path, device)


def _range(name: str, sizes: Sizes) -> tuple[int, int]:
    bounds = sizes if isinstance(sizes, tuple) else (sizes, sizes)
    if len(bounds) != 2 or not all(isinstance(size, int) and not isinstance(size, bool) for size in bounds):
        raise TypeError(f"{name} must be an integer or two (least, most), got {sizes!r}")
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(f"{name} must be positive, and the least no more than the most, got {sizes!r}")
    return bounds
