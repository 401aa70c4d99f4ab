"""Code-file shards: the safetensors files that ``encode`` writes."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors import safe_open

from ..io.codes import CodeFile
from ..io.files import require_file, wrap_errors
from .codebook import Codebook
from .image_folder import ImageFolderShard, PngNames
from .shards import Sample


class CodeFileShard(ImageFolderShard):
    """A code file, decoded to a folder of PNGs."""

    suffixes = (".safetensors",)

    def count_samples(self) -> int | None:
        try:
            require_file(self.source)
            with wrap_errors(ValueError, str(self.source)), safe_open(self.source, framework="pt", backend="pread") as file:
                return len(file.keys())
        except (OSError, ValueError):  # samples() reports it
            return None

    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        file = CodeFile.load(self.source)
        codebook.check_fingerprint(file.codebook, self.source)
        names = PngNames(self.target)
        for name, png_name in file.png_names().items():
            sample = Sample(name, payload=png_name)
            try:
                grid = codebook.to_grid(file.codes[name].numpy(), file.sizes[name])
                names.add(png_name)
                sample.codes, sample.size = grid
            except ValueError as error:
                sample.problem = str(error)
            yield sample
