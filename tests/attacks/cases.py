"""What the fuzz targets of all readers share: damaged copies of intact files, and paths without a file."""

import json
import os
import random
import struct

from attacks.mutations import damage


class Cases:
    """Create hostile files for one reader from seeds.

    A subclass writes intact files and has a method for every kind of case: it takes a folder, writes a file into it and returns
    `reading` of that file.
    """

    kinds = ()  # names of the methods that create a case. One that is named twice is drawn twice as often

    def __init__(self, folder):
        self.folder, self.trace = folder, str(folder / "ran")
        intact = folder / "intact"
        intact.mkdir(parents=True)
        self.write_intact_files(intact)
        files = (path for path in sorted(intact.rglob("*")) if path.is_file())
        self.intact = {path.relative_to(intact).as_posix(): path.read_bytes() for path in files}
        self.others = self.intact  # files whose bytes are spliced in. fuzz.py adds those of the other readers

    def write_intact_files(self, folder):
        """Write a file of every kind that is read. `intact` will hold their contents by name."""
        raise NotImplementedError

    def reading(self, path):
        """Return (function that reads the file and checks what it got, errors that it documents)."""
        raise NotImplementedError

    def create(self, seed, folder):
        """Create a case in a folder; return (kind, function that reads it, errors that it may raise)."""
        self.random = random.Random(seed)
        kind = self.random.choice([*self.kinds, "no_file"])
        return kind, *getattr(self, kind)(folder)

    def damaged(self, data):
        return damage(self.random, data, self.others)

    def damaged_file(self, folder):
        """An intact file with damaged bytes."""
        name = self.random.choice(list(self.intact))
        path = folder / name.rpartition("/")[2]
        path.write_bytes(self.damaged(self.intact[name]))
        return self.reading(path)

    def no_file(self, folder):
        """A pipe, folder, link, device, file of another kind or nothing in place of the file."""
        names = [
            *(name.rpartition("/")[2] for name in self.intact),
            "config.json",
            os.fsdecode(b"\xff\xfe.safetensors"),
            "x" * 250,
        ]
        path = folder / self.random.choice(names)
        self.random.choice([
            lambda: os.mkfifo(path), path.mkdir, path.touch, lambda: path.symlink_to(path),
            lambda: path.symlink_to(folder / "nothing"), lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to("/dev/null"), lambda: path.symlink_to(folder),
            lambda: path.write_bytes(self.others[self.random.choice(list(self.others))]), lambda: None,
        ])()  # fmt: skip
        return self.reading(self.random.choice([path] * 8 + [path / "below", folder]))


def split_header(data):
    """Return (header, tensors) of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_header(header, tensors, declared=None):
    """Return a safetensors file with this header, as bytes, which may declare another length."""
    return struct.pack("<Q", len(header) if declared is None else declared) + header + tensors


def sort_header(path):
    """Rewrite a safetensors file with a sorted header, which the library writes in a random order."""
    header, tensors = split_header(path.read_bytes())
    path.write_bytes(join_header(json.dumps(header, sort_keys=True).encode(), tensors))
