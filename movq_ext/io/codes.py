"""Files of codes: what ``python -m movq_ext encode`` writes and ``decode`` reads.

A safetensors file with one int32 tensor ``(h, w)`` of code indices per picture, under the picture's name. Its metadata
say which codebook the indices refer to and how large every picture was before padding.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..model.autoencoder import MOVQ
from .files import parse_json, printable, refusing, replacing, require_file
from .images import pad_to_multiple, to_image, to_tensor

FORMAT = "movq_ext.codes.1"
MOST_NAME = 4096  # characters: no system has longer paths
MOST_SHOWN = 100  # characters of a name in an error message


class CodeFileError(ValueError):
    """The file is damaged, or no file of codes."""


def codebook_id(model: MOVQ) -> str:
    """A fingerprint of the codebook: indices mean nothing to a model with another one."""
    # To half precision, so that a model keeps its fingerprint whatever dtype it was loaded in.
    weight = model.quantize.embedding.weight.detach().cpu().half().contiguous()
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]


@dataclass
class CodeFile:
    """Codes of many pictures: by name, the indices ``(h, w)`` int32 and the picture's (height, width) in pixels."""

    codebook: str
    codes: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, name: str, codes: Tensor, size: tuple[int, int]) -> None:
        """Raises ValueError for a name that the file cannot hold."""
        if (problem := name_problem(name)) is not None:
            raise ValueError(problem)
        self.codes[name] = codes.to(torch.int32).cpu().contiguous()
        self.sizes[name] = size

    def save(self, path: str | Path) -> None:
        """Write the file; an interrupted write leaves the old one whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": FORMAT, "codebook": self.codebook, "sizes": json.dumps(self.sizes)}
        with replacing(path) as partial:
            save_file(self.codes, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> CodeFile:
        """Read a file.

        Raises OSError (FileNotFoundError if there is none) if it cannot be read, CodeFileError, a ValueError, if it is damaged or
        no file of codes.
        """
        require_file(path)
        with refusing(CodeFileError, f"{path} is damaged"):
            with refusing(CodeFileError, f"{path} is damaged or no file of codes"), safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    found = printable(repr(metadata.get("format")), MOST_SHOWN)
                    raise CodeFileError(f"{path} is no file of codes: its format is {found}, not {FORMAT!r}")
                codes = {name: file.get_tensor(name) for name in file.keys()}
            most = sum(12 * len(name) + 64 for name in codes) + 2  # a character takes up to two escapes of six
            sizes = {name: (height, width) for name, (height, width) in parse_json(metadata["sizes"], most).items()}
            result = cls(metadata["codebook"], codes, sizes)
        if len({PurePosixPath(name) for name in codes}) < len(codes):  # a/b.jpg and a/./b.jpg
            raise CodeFileError(f"{path} is damaged: a name comes twice, written in two ways")
        for name, grid in codes.items():
            shown = printable(repr(name), MOST_SHOWN)
            if (problem := name_problem(name)) is not None:
                raise CodeFileError(f"{path} {problem}")
            if name not in sizes:
                raise CodeFileError(f"{path} is damaged: it has no size for {shown}")
            if not all(type(side) is int and side > 0 for side in sizes[name]):
                raise CodeFileError(f"{path} is damaged: the size of {shown} must be two positive numbers")
            if grid.dtype != torch.int32 or grid.dim() != 2:
                raise CodeFileError(f"{path} is damaged: {shown} must be int32 of 2 dimensions, got {grid.dtype} of {grid.dim()}")
        return result

    def png_names(self) -> dict[str, str]:
        """The file each picture is decoded to: its name with the suffix .png, added where another could have the same."""
        names = {name: str(PurePosixPath(name).with_suffix(".png")) for name in self.codes}
        could = Counter(png for name in names for png in {names[name], f"{name}.png"})
        return {name: png if could[png] == 1 else f"{name}.png" for name, png in names.items()}


def name_problem(name: str) -> str | None:
    """Why a picture cannot have this name; None if it can."""
    path, shown = PurePosixPath(name), printable(repr(name), MOST_SHOWN)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.name:
        return f"names a picture outside the output folder: {shown}"
    if name == "__metadata__" or len(name) > MOST_NAME or any(char == "\0" or "\ud800" <= char <= "\udfff" for char in name):
        return f"names a picture {shown}: it must be text in UTF-8 of at most {MOST_NAME} characters, none of them NUL"
    return None


@torch.inference_mode()
def encode_image(model: MOVQ, image: Image.Image) -> Tensor:
    """Code indices ``(h, w)`` of an RGB picture of any size (padded to whole cells by repeating its border)."""
    weight = model.quant_conv.weight
    x = pad_to_multiple(to_tensor(image)[None], model.downsampling)
    return model.encode_code(x.to(weight.device, weight.dtype))[0]


@torch.inference_mode()
def decode_image(model: MOVQ, codes: Tensor, size: tuple[int, int]) -> Image.Image:
    """The picture of code indices ``(h, w)``, cut to size (height, width).

    Raises ValueError where the size does not belong to the grid, or an index is outside the codebook.
    """
    cell = model.downsampling
    if codes.dim() != 2 or tuple(codes.shape) != tuple(-(-side // cell) for side in size):
        raise ValueError(f"a picture of {size[0]} x {size[1]} (height x width) has not codes of shape {tuple(codes.shape)}")
    x = model.decode_code(codes[None].to(model.quant_conv.weight.device, torch.long))
    return to_image(x[0, :, : size[0], : size[1]])
