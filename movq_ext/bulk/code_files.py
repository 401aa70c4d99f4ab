"""Code-file shards: the safetensors files that ``encode`` writes."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors import safe_open

from ..io.codes import CodeFile
from ..io.files import require_file, wrap_errors
from .codebook import Codebook
from .image_folder import ImageFolderShard
from .shards import Sample


class CodeFileShard(ImageFolderShard):
    """A code file, decoded to a folder of PNGs."""

    suffixes = (".safetensors",)

    def count_samples(self) -> int | None:
        try:
            require_file(self.source)
            with wrap_errors(ValueError, str(self.source)), safe_open(self.source, framework="pt") as file:
                return len(file.keys())
        except (OSError, ValueError):  # samples() reports it
            return None

    def samples(self, codebook: Codebook) -> Iterator[Sample]:
        file = CodeFile.load(self.source)
        codebook.check_fingerprint(file.codebook, self.source)
        for name, png_name in file.png_names().items():
            sample = Sample(name, payload=png_name)
            try:
                sample.codes, sample.size = codebook.to_grid(file.codes[name].numpy(), file.sizes[name])
            except ValueError as error:
                sample.problem = str(error)
            yield sample
