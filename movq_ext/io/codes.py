"""Code files: written by ``movq-ext encode``, read by ``movq-ext decode``.

A code file is a safetensors file with one int32 tensor ``(h, w)`` of code indices per image, stored under the image's name. Its
metadata identifies the codebook and holds each image's size before padding and the hash of the file that it was encoded from.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ..model.autoencoder import MOVQ
from .files import MAX_SHOWN_CHARACTERS, atomic_write, parse_json, printable, require_file, wrap_errors
from .images import pad_to_multiple, to_image, to_tensor
from .tensor_files import FLOAT_DTYPES, write_safetensors

FORMAT = "movq_ext.codes.1"
MAX_NAME_CHARACTERS = 4096  # no operating system has longer paths
MAX_HEADER_BYTES = 100_000_000  # safetensors reads no file with a larger header


class CodeFileError(ValueError):
    """The file is damaged or not a code file."""


def codebook_fingerprint(model: MOVQ) -> str:
    """Return a fingerprint of the codebook. Code indices are valid only for the codebook that produced them.

    Casting the model does not change it: a codebook read by `from_pretrained` is identified by the values in the file, until
    training or `load_state_dict` changes it.
    """
    weight, stored = model.quantize.embedding.weight.detach().cpu(), model.quantize.stored_codebook
    if stored is not None and _is_cast_of(weight, stored):
        weight = stored
    # In half precision, so that the float32 and float16 files of one model have the same fingerprint.
    return hashlib.sha256(weight.float().half().contiguous().numpy().tobytes()).hexdigest()[:16]


def _is_cast_of(weight: Tensor, stored: Tensor) -> bool:
    """Return True if weight is stored, cast to weight's dtype directly or through another."""
    return any(torch.equal(stored.to(dtype).to(weight.dtype), weight) for dtype in FLOAT_DTYPES)


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Yield the safetensors file and its metadata. Tensors are copies: the file may change after they are read."""
    require_file(path)
    with (
        wrap_errors(CodeFileError, f"{path} is damaged or not a code file"),
        safe_open(path, framework="pt", backend="pread") as file,
    ):
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            found = printable(repr(metadata.get("format")), MAX_SHOWN_CHARACTERS)
            raise CodeFileError(f"{path}: expected a code file of format {FORMAT!r}, got format {found}")
        yield file, metadata


def _max_json_characters(names: Iterable[str]) -> int:
    return sum(12 * len(name) + 64 for name in names) + 2  # JSON escapes a character in at most 12


def _parse_hashes(metadata: dict[str, str], max_characters: int) -> dict[str, str]:
    return dict(parse_json(metadata.get("hashes", "{}"), max_characters))  # older versions stored none


@dataclass
class CodeFile:
    """The codes of many images.

    Maps each name to its indices ``(h, w)`` int32, to its (height, width) in pixels and, if known, to the `content_hash` of the
    file that it was encoded from.
    """

    codebook: str
    codes: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    header_bytes: int = field(init=False, compare=False)  # at most

    def __post_init__(self) -> None:
        self.header_bytes = 256 + sum(map(max_header_bytes, self.codes))

    def has_room(self, names: Iterable[str]) -> bool:
        """Return True if images of these names fit in the header."""
        return self.header_bytes + sum(map(max_header_bytes, names)) <= MAX_HEADER_BYTES

    def add(self, name: str, codes: Tensor, size: tuple[int, int], source_hash: str = "") -> None:
        """Add an image. Raises ValueError for an invalid name, or if the file is full."""
        if (problem := name_problem(name)) is not None:
            raise ValueError(problem)
        if not self.has_room([name]):
            raise ValueError(f"the code file is full: its header would exceed {MAX_HEADER_BYTES} bytes")
        self.header_bytes += max_header_bytes(name)
        self.sizes[name] = size
        if source_hash:
            self.hashes[name] = source_hash
        # Last, so that an image with codes is complete even if SIGTERM ends this. safetensors saves no two tensors in one memory.
        self.codes[name] = codes.to("cpu", torch.int32, copy=True).contiguous()

    def save(self, path: str | Path) -> None:
        """Write the file atomically. Creates its folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": FORMAT,
            "codebook": self.codebook,
            "sizes": json.dumps(self.sizes),
            "hashes": json.dumps(self.hashes),
        }
        with wrap_errors(OSError, f"cannot write {path}"), atomic_write(path) as partial:
            write_safetensors(self.codes, partial, metadata)

    @classmethod
    def load(cls, path: str | Path) -> CodeFile:
        """Read and check a file.

        Raises OSError if it cannot be read, and CodeFileError if it is damaged or not a code file.
        """
        with _open(path) as (file, metadata):
            codes = {name: file.get_tensor(name) for name in file.keys()}
        with wrap_errors(CodeFileError, f"{path} is damaged"):
            max_characters = _max_json_characters(codes)
            entries = parse_json(metadata["sizes"], max_characters).items()
            sizes = {name: (height, width) for name, (height, width) in entries}
            result = cls(metadata["codebook"], codes, sizes, _parse_hashes(metadata, max_characters))
        result._check(path)
        return result

    def _check(self, path: str | Path) -> None:
        if len({PurePosixPath(name) for name in self.codes}) < len(self.codes):  # a/b.jpg and a/./b.jpg
            raise CodeFileError(f"{path} is damaged: two names refer to the same image")
        for name, grid in self.codes.items():
            if (problem := name_problem(name)) is not None:
                raise CodeFileError(f"{path}: {problem}")
            shown, size = printable(repr(name), MAX_SHOWN_CHARACTERS), self.sizes.get(name)
            if size is None:
                raise CodeFileError(f"{path} is damaged: {shown} has no size")
            if not all(type(side) is int and side > 0 for side in size):
                found = printable(repr(size), MAX_SHOWN_CHARACTERS)
                raise CodeFileError(f"{path} is damaged: expected two positive integers as the size of {shown}, got {found}")
            if grid.dtype != torch.int32 or grid.dim() != 2:
                found = f"{grid.dtype} with {grid.dim()}"
                raise CodeFileError(f"{path} is damaged: expected {shown} to be int32 with 2 dimensions, got {found}")

    def png_names(self) -> dict[str, str]:
        """Map each image to its PNG: ``.png`` replaces the suffix, or is appended where two images would share a file."""
        paths = {name: PurePosixPath(name) for name in self.codes}  # without repeated slashes and dots
        choices = {name: (str(path.with_suffix(".png")), f"{path}.png") for name, path in paths.items()}
        uses = Counter(png for pngs in choices.values() for png in {*pngs})
        return {name: replaced if uses[replaced] == 1 else appended for name, (replaced, appended) in choices.items()}


def read_hashes(path: str | Path) -> tuple[str, dict[str, str]]:
    """Return the codebook of a code file, and the hash of every image or "". Reads the header only.

    Raises OSError if the file cannot be read, and CodeFileError if it is damaged or not a code file.
    """
    with _open(path) as (file, metadata), wrap_errors(CodeFileError, f"{path} is damaged"):
        names = list(file.keys())
        hashes = _parse_hashes(metadata, _max_json_characters(names))
        return metadata["codebook"], {name: hashes.get(name, "") for name in names}


def max_header_bytes(name: str) -> int:
    """Return how many bytes an image takes in a code file's header at most: its tensor, its size and its hash."""
    in_json = json.dumps(name)
    return 176 + len(in_json) + 2 * len(json.dumps(in_json))  # the metadata are JSON in a JSON string


def name_problem(name: str) -> str | None:
    """Return why an image's name is invalid, or None if it is valid."""
    path, shown = PurePosixPath(name), printable(repr(name), MAX_SHOWN_CHARACTERS)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.name:
        return f"expected an image name inside the output folder, got {shown}"
    unstorable = name == "__metadata__" or any(char == "\0" or "\ud800" <= char <= "\udfff" for char in name)
    if unstorable or len(name) > MAX_NAME_CHARACTERS:
        return f"expected an image name in UTF-8 without NUL of at most {MAX_NAME_CHARACTERS} characters, got {shown}"
    return None


@torch.inference_mode()
def encode_image(model: MOVQ, image: Image.Image, max_memory: int | None = None) -> Tensor:
    """Return the code indices ``(h, w)`` of an RGB image of any size, padded to whole cells by repeating its border.

    max_memory limits the bytes of working memory, see `MOVQ.encode`.
    """
    weight = model.quant_conv.weight
    x = pad_to_multiple(to_tensor(image)[None], model.downsampling)
    return model.encode_code(x.to(weight.device, weight.dtype), max_memory)[0]


@torch.inference_mode()
def decode_image(model: MOVQ, codes: Tensor, size: tuple[int, int]) -> Image.Image:
    """Decode code indices ``(h, w)`` and crop the image to size (height, width).

    Raises ValueError if codes do not have the shape for that size, or an index is outside the codebook.
    """
    height, width = size
    expected = (-(-height // model.downsampling), -(-width // model.downsampling))
    if tuple(codes.shape) != expected:
        image = f"an image of {height} x {width} (height x width)"
        raise ValueError(f"expected codes of shape {expected} for {image}, got {tuple(codes.shape)}")
    x = model.decode_code(codes[None].to(model.quant_conv.weight.device))
    return to_image(x[0, :, :height, :width])
