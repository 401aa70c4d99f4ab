"""Code-file shards: the safetensors files that ``encode`` writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from ..io.codes import CodeFile
from ..io.files import atomic_write, require_file, wrap_errors
from .codebook import Codebook
from .shards import Sample, SampleError, Shard, WriteImage


class CodeFileShard(Shard):
    """A code file, decoded to a folder of PNGs. An earlier run may have written some of them, so `is_done` is always False."""

    suffix = ".safetensors"

    @classmethod
    def target_of(cls, relative: Path) -> Path:
        return relative.with_suffix("")

    @property
    def rejects_path(self) -> Path:
        return self.target / f"{self.source.name}.rejects.jsonl"

    def count_samples(self) -> int | None:
        try:
            require_file(self.source)
            with wrap_errors(ValueError, str(self.source)), safe_open(self.source, framework="pt") as file:
                return len(file.keys())
        except (OSError, ValueError):  # samples() reports it
            return None

    def is_done(self) -> bool:
        return False

    def image_path(self, sample: Sample) -> Path:
        return self.target / str(sample.payload)

    def has_image(self, sample: Sample) -> bool:
        return os.path.exists(self.image_path(sample))  # Path.exists() raises OSError for a name that is too long

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

    @contextmanager
    def open_writer(self) -> Iterator[WriteImage]:
        def write(sample: Sample, png: bytes) -> None:
            path = self.image_path(sample)
            with wrap_errors(SampleError, "the PNG cannot be written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as partial:
                    partial.write_bytes(png)

        yield write
