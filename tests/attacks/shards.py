"""Hostile shards: tar, tar.gz, npz and Parquet files of codes."""

import gzip
import io
import tarfile
import zipfile

import numpy as np
import torch
from shard_files import npy_bytes, write_parquet, write_tar

from attacks.cases import Cases
from attacks.mutations import JUNK, damage_json
from movq_ext.bulk.codebook import Codebook
from movq_ext.bulk.find import make_shard

BOOK = Codebook("book", 64, 2, max_pixels=1 << 20)
NAMES = ["a", "a.b", "b/a", "../a", "/a", "a/..", ".", "", "x" * 9999, "\x1b[2J", "é", "con", "a\\b", " "]
KINDS = [tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE,
                                 tarfile.GNUTYPE_SPARSE]  # fmt: skip


class ShardCases(Cases):
    kinds = ("damaged_file", "damaged_file", "tar", "npz")

    def write_intact_files(self, folder):
        rows = [("a.npy", npy_bytes(np.arange(6).reshape(2, 3))), ("a.json", b'{"height": 4, "width": 5}'),
                ("b/c.npy", npy_bytes(np.zeros(4, np.int32))), ("b/c.txt", b"text")]  # fmt: skip
        write_tar(folder / "a.tar", rows)
        (folder / "a.tar.gz").write_bytes(gzip.compress((folder / "a.tar").read_bytes(), mtime=0))
        np.savez(folder / "column.npz", codes=np.zeros((2, 3, 4), np.int16), name=["a", "b/c"], height=[5, 6], width=[7, 8])
        np.savez_compressed(folder / "grids.npz", **{"a": np.zeros((2, 3), int), "b/c": np.ones((1, 1), np.uint8)})
        write_parquet(folder / "a.parquet", height=[8, 7, 8, 1, 16, 7], name=list("abcdef"))

    def reading(self, path):
        def read():
            shard = make_shard(path, self.folder / "decoded" / path.name)
            shard.count_samples()
            for sample in shard.samples(BOOK):
                assert sample.problem or (sample.codes.dtype == torch.int64 and sample.codes.dim() == 2)
                assert sample.problem or (0 <= sample.codes.min() and sample.codes.max() < BOOK.size)
                image = shard.image_path(sample).resolve()
                assert sample.problem or image.is_relative_to((self.folder / "decoded").resolve()), image

        return read, (ValueError, OSError)

    def array(self):
        """An array, most of them valid codes, as a .npy file."""
        shape = self.random.choice([(2, 3), (2, 3), (4,), (2, 2, 2), (), (0, 1), (1, 5000)])
        dtype = self.random.choice(["<i4", "<i8", ">u2", "|u1", "<f4", "|b1", "<U3", "|O"])
        data = npy_bytes(np.full(shape, self.random.choice([0, 1, 200]), dtype))
        if self.random.random() < 0.2:
            data = data.replace(str(shape).encode(), self.random.choice([b"(99999,)", b"(-1, 3)", b"(1 << 60)", b"(" * 50]), 1)
        return self.damaged(data) if self.random.random() < 0.2 else data

    def tar(self, folder):
        """A tar file with unusual members."""
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=self.random.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
            for _ in range(self.random.randrange(4)):
                name = self.random.choice(NAMES)
                sizes = {"height": self.random.choice([4, *JUNK]), "width": 6}
                for suffix, data in [("npy", self.array()), ("json", damage_json(self.random, sizes).encode(errors="replace"))]:
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.type = self.random.choice(KINDS)
                    member.linkname = self.random.choice(["", "a.npy", "/etc/passwd", "../a"])
                    member.size = len(data) if member.isreg() else 0
                    if self.random.random() < 0.1:
                        member.pax_headers = {"size": "9" * 12, "GNU.sparse.realsize": "9" * 12, "GNU.sparse.map": "0,9"}
                    tar.addfile(member, io.BytesIO(data))
        data = file.getvalue() if self.random.random() < 0.8 else self.damaged(file.getvalue())
        if compressed := self.random.random() < 0.4:
            data = gzip.compress(data + bytes(self.random.choice([0, 0, 10**8])), mtime=0)
        path = folder / ("a.tgz" if compressed else "a.tar")
        path.write_bytes(data)
        return self.reading(path)

    def npz(self, folder):
        """An .npz file with unusual arrays."""
        path = folder / "a.npz"
        compression = self.random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
        with zipfile.ZipFile(path, "w", compression) as file:
            keys = {self.random.choice(["codes", "name", "height", "width", *NAMES]) for _ in range(self.random.randrange(5))}
            for key in sorted(keys):
                data = self.array() if self.random.random() < 0.9 else npy_bytes(np.zeros((1, 4000, 4000), np.uint8))
                file.writestr(f"{key}.npy", data)
        if self.random.random() < 0.2:
            path.write_bytes(self.damaged(path.read_bytes()))
        return self.reading(path)
