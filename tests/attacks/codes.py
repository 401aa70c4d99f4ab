"""Hostile code files."""

import json

import torch
from safetensors.torch import save_file

from attacks.cases import Cases, join_header, sort_header, split_header
from attacks.mutations import JUNK, NUMBERS, damage_json
from movq_ext.io.codes import FORMAT, CodeFile, CodeFileError

NAMES = ["a", "a.jpg", "a.png", "b/a", "../a", "/a", "a/..", ".", "a/.", "", "\0", "x" * 9999, "\x1b[2J", "é", "con", "a\\b",
         " ", "/"]  # fmt: skip


class CodeFileCases(Cases):
    kinds = ("damaged_file", "header", "code_file")

    def write_intact_files(self, folder):
        codes = CodeFile("book")
        codes.add("a.jpg", torch.arange(6).view(2, 3), (15, 24))
        codes.add("deep/b.png", torch.zeros(1, 1, dtype=torch.long), (1, 1))
        codes.save(folder / "codes.safetensors")
        sort_header(folder / "codes.safetensors")

    def reading(self, path):
        def read():
            file = CodeFile.load(path)
            pngs = ((self.folder / png).resolve() for png in file.png_names().values())
            outside = [png for png in pngs if not png.is_relative_to(self.folder.resolve())]
            assert not outside, outside
            assert all(grid.dtype == torch.int32 for grid in file.codes.values())

        return read, (CodeFileError, OSError)

    def header(self, folder):
        """A code file with a damaged header."""
        header, tensors = split_header(self.intact["codes.safetensors"])
        header = damage_json(self.random, header).encode("utf-8", "surrogatepass")
        declared = self.random.choice([len(header)] * 8 + [self.random.choice(NUMBERS) % 2**64])
        path = folder / "codes.safetensors"
        path.write_bytes(join_header(header, tensors, declared))
        return self.reading(path)

    def code_file(self, folder):
        """A code file with unusual names, tensors and sizes."""
        tensors, sizes = {}, {}
        for _ in range(self.random.randrange(4)):
            name = self.random.choice(NAMES)
            grid = torch.zeros(self.random.choice([(1, 1), (2, 3), (0, 1), (1,), (), (1, 1, 1)]))
            dtypes = [torch.int32] * 4 + [torch.int64, torch.float32, torch.bool, torch.float8_e5m2]
            tensors[name] = grid.to(self.random.choice(dtypes))
            sizes[name] = self.random.choice([[1, 1], [2, 3], [9, 9], self.random.choice(JUNK)])
        text = self.random.choice([json.dumps(sizes), damage_json(self.random, sizes)])
        metadata = {"format": FORMAT, "codebook": "book", "sizes": text.encode("utf-8", "replace").decode()}
        if self.random.random() < 0.2:
            metadata.pop(self.random.choice(list(metadata)))
        save_file(tensors, folder / "codes.safetensors", metadata=metadata)
        return self.reading(folder / "codes.safetensors")
