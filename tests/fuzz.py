"""Feeds the readers of files what could be wrong with a file, and holds every case to: a right answer or the reader's own error,
in bounded time and memory, and no code of the file's run.

    python tests/fuzz.py --cases 10000           # seeds 0 to 9999: each seed is one case, the same in every run
    python tests/fuzz.py --first 1234 --cases 1  # one of them again
"""

import argparse
import collections
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from movq_ext import MOVQ, CheckpointError, from_pretrained, save_pretrained
from movq_ext.io import weights
from movq_ext.io.codes import FORMAT, CodeFile, CodeFileError
from movq_ext.io.images import load_image, to_tensor

SECONDS = 10  # a case may take
MEMORY = 256 << 20  # bytes that all cases together may add to the peak of the process
PIXELS = 1 << 20  # of a picture: half of what is refused
DDCONFIG = dict(ch=32, out_ch=3, ch_mult=[1], num_res_blocks=0, attn_resolutions=[], in_channels=3, resolution=256, z_channels=4)
DIFFUSERS = {
    "_class_name": "VQModel", "norm_type": "spatial", "block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "in_channels": 3, "out_channels": 3, "latent_channels": 4, "num_vq_embeddings": 8,
    "layers_per_block": 0, "norm_num_groups": 32, "vq_embed_dim": 4,
}  # fmt: skip
NUMBERS = [0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, 10**30, -1, -(2**31)]
JUNK = [
    *NUMBERS,
    None,
    True,
    0.5,
    1e308,
    float("inf"),
    "",
    "x",
    "1",
    "\ud800",
    "\0",
    "../x",
    "__metadata__",
    [],
    {},
    [1, 2],
    [[]],
    {"a": 1},
]


class Hang(BaseException):
    pass


class Code:
    """Pickled: a call of os.mkdir(trace) when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


class Fuzzer:
    def __init__(self, folder):
        self.folder, self.trace = folder, str(folder / "ran")
        torch.manual_seed(0)
        self.model = MOVQ(DDCONFIG, 8, 4)
        self.state = dict(self.model.state_dict())
        bases = folder / "bases"
        save_pretrained(self.model, bases / "ours")
        save_file(self.state, bases / "original.safetensors")
        torch.save(self.state, bases / "zip.ckpt")
        torch.save({"state_dict": self.state}, bases / "legacy.pt", _use_new_zipfile_serialization=False)
        codes = CodeFile("book")
        codes.add("a.jpg", torch.arange(6).view(2, 3), (15, 24))
        codes.add("deep/b.png", torch.zeros(1, 1, dtype=torch.long), (1, 1))
        codes.save(bases / "codes.safetensors")
        pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a picture"
        for suffix, mode in [("png", "RGB"), ("png", "P"), ("png", "I;16"), ("jpg", "RGB"), ("jpg", "CMYK"), ("gif", "P"),
        ("bmp", "RGB"), ("bmp", "P"),
                             ("ppm", "RGB"), ("tif", "RGB"), ("tif", "F"), ("webp", "RGB")]:  # fmt: skip
            more = {"exif": exif} if suffix in ("png", "jpg", "tif", "webp") else {}
            image = Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11)) if mode == "I;16" else pixels.convert(mode)
            image.save(bases / f"{mode.replace(';', '')}.{suffix}", **more)
        pixels.save(bases / "packed.tif", compression="tiff_lzw")
        self.bases = {file.relative_to(bases).as_posix(): file.read_bytes() for file in bases.rglob("*") if file.is_file()}
        self.pictures = [name for name in self.bases if name.rpartition(".")[2] not in ("safetensors", "ckpt", "pt", "json")]
        self.kinds = [self.bytes_of_checkpoint, self.bytes_of_codes, self.bytes_of_picture, self.bytes_of_picture, self.header,
        self.config,
                      self.entries, self.pickle, self.archive, self.codes, self.diffusers, self.png, self.no_file]  # fmt: skip

    def run(self, seed):
        """One case; returns its kind and outcome. Raises AssertionError for what should not be."""
        self.random = random.Random(seed)
        folder = self.folder / "case"
        folder.mkdir()
        try:
            kind = self.random.choice(self.kinds)
            read, allowed = kind(folder)
            with Watch(self.trace):
                try:
                    read()
                    outcome = "read"
                except allowed as error:
                    assert str(error).strip(), "an error without a message"
                    assert len(str(error)) < 4000, "an error of more than 4000 characters"
                    outcome = type(error).__name__
            return kind.__name__, outcome
        finally:
            shutil.rmtree(folder)

    # --- What reads a file, and the errors that it documents

    def as_checkpoint(self, path):
        def read():
            model = from_pretrained(path)
            assert all(p.dtype == torch.float32 and type(p) is torch.nn.Parameter for p in model.parameters())
            assert (
                model.state_dict().keys() == self.state.keys()
                or path.is_dir()
                or sum(p.numel() for p in model.parameters()) < 10**7
            )

        return read, (CheckpointError, OSError)

    def as_codes(self, path):
        def read():
            file = CodeFile.load(path)
            outside = [
                png
                for png in file.png_names().values()
                if not (self.folder / png).resolve().is_relative_to(self.folder.resolve())
            ]
            assert not outside, outside
            assert all(grid.dtype == torch.int32 for grid in file.codes.values())

        return read, (CodeFileError, OSError)

    def as_picture(self, path):
        def read():
            image = load_image(path)
            assert image.mode == "RGB" and to_tensor(image).shape == (3, image.height, image.width)

        return read, OSError

    # --- Kinds of cases

    def bytes_of_checkpoint(self, folder):
        name = self.random.choice(["ours/model.safetensors", "original.safetensors", "zip.ckpt", "legacy.pt"])
        path = folder / name.rpartition("/")[2]
        path.write_bytes(self.damaged(self.bases[name]))
        return self.as_checkpoint(path)

    def bytes_of_codes(self, folder):
        path = folder / "codes.safetensors"
        path.write_bytes(self.damaged(self.bases["codes.safetensors"]))
        return self.as_codes(path)

    def bytes_of_picture(self, folder):
        name = self.random.choice(self.pictures)
        path = folder / name
        path.write_bytes(self.damaged(self.bases[name]))
        return self.as_picture(path)

    def header(self, folder):
        """A safetensors header that says something else."""
        name, reader = self.random.choice([("original.safetensors", self.as_checkpoint), ("ours/model.safetensors",
        self.as_checkpoint),
                                           ("codes.safetensors", self.as_codes)])  # fmt: skip
        data = self.bases[name]
        size = struct.unpack("<Q", data[:8])[0]
        header = self.json_text(json.loads(data[8 : 8 + size])).encode("utf-8", "surrogatepass")
        declared = self.random.choice([len(header)] * 8 + [self.random.choice(NUMBERS) % 2**64])
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", declared) + header + data[8 + size :])
        return reader(path)

    def config(self, folder):
        """The config beside the weights, changed."""
        text = self.json_text(self.model.config)
        try:
            save_file(self.state, folder / "model.safetensors", metadata={weights.CONFIG_KEY: text})
        except UnicodeEncodeError:
            save_file(self.state, folder / "model.safetensors", metadata={weights.CONFIG_KEY: ascii(text)})
        return self.as_checkpoint(folder)

    def entries(self, folder):
        """Entries of a checkpoint that are other tensors, or none."""
        state = dict(self.state)
        for _ in range(self.random.choice([1, 1, 2, len(state)])):
            name = self.random.choice(
                [*state, "decoder.up.0.block.1.conv1.weight", "decoder.up.999999.block.0.conv1.weight", "loss.x", "x" * 5000]
            )
            state[name] = self.entry(self.state.get(name, torch.zeros(2)))
        if self.random.random() < 0.2:
            state = {
                name: torch.empty(1).expand(tensor.shape if tensor.dim() < 2 else (10**5, *tensor.shape[1:]))
                for name, tensor in self.state.items()
            }
        path = folder / "movq.ckpt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(
                self.random.choice([state, {"state_dict": state}, {"model." + name: x for name, x in state.items()}]), path
            )
        return self.as_checkpoint(path)

    def entry(self, like):
        return self.random.choice([
            lambda: torch.zeros(1).expand(10**6, 10**6), lambda: torch.zeros(1).expand(like.shape),
            lambda: torch.zeros(like.shape, device="meta"),
            lambda: torch.zeros(10**9, 10**3, device="meta"), lambda: like.to_sparse(), lambda: like.to(torch.complex64),
            lambda: like.long(),
            lambda: like.double(), lambda: like.bool(), lambda: like.to(torch.float8_e4m3fn), lambda: torch.nn.Parameter(like),
            lambda: like[..., :0],
            lambda: torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8),
            lambda: like.t() if like.dim() == 2 else like[None],
            lambda: torch.full_like(like, float("nan")), lambda: None, lambda: "text", lambda: {}, lambda: deep([], 150),
            lambda: 10**30,
            lambda: collections.OrderedDict(a=like), lambda: {1, 2}, lambda: bytearray(5), lambda: torch.Size([1]),
            lambda: like.flip(0).T if like.dim() == 2 else like,
        ])()  # fmt: skip

    def pickle(self, folder):
        """A pickle as a checkpoint: with code, or with other opcodes in it."""
        path = folder / self.random.choice(["movq.ckpt", "movq.pt", "movq.pth", "movq.bin"])
        protocol = self.random.randrange(6)
        value = self.random.choice([Code(self.trace), {"state_dict": Code(self.trace)}, {"a": [Code(self.trace)]}, [], {},
        {1: 2}, deep([], 200), 10**300, None,
                                    collections.Counter("abc"), bytearray(9), {"state_dict": {"a": 1}}, "x" * 10**5])  # fmt: skip
        if self.random.random() < 0.3:
            torch.save(value, path, _use_new_zipfile_serialization=self.random.random() < 0.5, pickle_protocol=protocol)
        elif self.random.random() < 0.5:
            path.write_bytes(pickle.dumps(value, protocol))
        else:
            path.write_bytes(self.crafted())
        return self.as_checkpoint(path)

    def crafted(self):
        """Pickles that no object makes."""
        call = lambda module, name, *arguments: (
            b"\x80\x02c"
            + module
            + b"\n"
            + name
            + b"\n("
            + b"".join(b"\x8a\x08" + struct.pack("<q", x) for x in arguments)
            + b"tR."
        )
        return self.random.choice([
            call(b"builtins", b"bytearray", 10**13), call(b"torch", b"FloatTensor", 10**13), call(b"torch.storage",
            b"UntypedStorage", 10**13),
            call(b"torch", b"Tensor", 10**6, 10**6), call(b"builtins", b"eval", 1), call(b"collections", b"OrderedDict", 1),
            b"\x80\x02" + b"]" * 10**5 + b".",
            b"\x80\x02X\xff\xff\xff\xffabc.", b"\x80\x02" + b"(" * 10**5, b"\x80\x02j\xff\xff\xff\xff.", b"\x80\x02.",
            b"\x80\x02(((ttt.", b"\x80\x02]q\0h\0a.",
            b"\x80\x02}q\0X\x01\0\0\0ah\0s.", b"\x80\x02" + b"\x8a\xff" + b"\x7f" * 255 + b".",
            b"cos\nmkdir\n(S'" + self.trace.encode() + b"'\ntR.",
        ])  # fmt: skip

    def archive(self, folder):
        """A zip checkpoint with another pickle, other sizes, or compressed."""
        path = folder / "movq.ckpt"
        compression = self.random.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
        with (
            zipfile.ZipFile(io.BytesIO(self.bases["zip.ckpt"])) as old,
            zipfile.ZipFile(path, "w", compression) as new,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of names that come twice
            victim = self.random.choice(old.namelist())
            for name in old.namelist():
                data = old.read(name)
                if name.endswith("data.pkl") and self.random.random() < 0.7:
                    data = self.numbers_changed(data) if self.random.random() < 0.5 else self.damaged(data)
                elif name == victim:
                    data = self.random.choice([b"", self.damaged(data), bytes(32 << 20) if compression else data, data * 2])
                for _ in range(self.random.choice([1] * 20 + [0, 2])):
                    new.writestr(name, data)
        if self.random.random() < 0.2:
            path.write_bytes(self.damaged(path.read_bytes()))
        return self.as_checkpoint(path)

    def numbers_changed(self, data):
        """The pickle with other sizes, strides and offsets."""
        places = [i for i in range(len(data) - 5) if data[i] in b"KMJ"]
        out = bytearray(data)
        for i in sorted(self.random.sample(places, min(len(places), self.random.choice([1, 2, 8]))), reverse=True):
            width = {b"K": 1, b"M": 2, b"J": 4}[data[i : i + 1]]
            number = self.random.choice([-1, 0, 1, 2, 2**16, 2**31, 2**33, 10**12, 2**62])
            out[i : i + 1 + width] = b"\x8a\x08" + struct.pack("<q", number)
        return bytes(out)

    def codes(self, folder):
        """A file of codes with other tensors, names and sizes."""
        tensors, sizes = {}, {}
        for _ in range(self.random.randrange(4)):
            name = self.random.choice(
                [
                    "a",
                    "a.jpg",
                    "a.png",
                    "b/a",
                    "../a",
                    "/a",
                    "a/..",
                    ".",
                    "a/.",
                    "",
                    "\0",
                    "x" * 9999,
                    "\x1b[2J",
                    "é",
                    "con",
                    "a\\b",
                    " ",
                    "/",
                ]
            )
            grid = torch.zeros(self.random.choice([(1, 1), (2, 3), (0, 1), (1,), (), (1, 1, 1)]))
            tensors[name] = grid.to(
                self.random.choice([torch.int32] * 4 + [torch.int64, torch.float32, torch.bool, torch.float8_e5m2])
            )
            sizes[name] = self.random.choice([[1, 1], [2, 3], [9, 9], self.random.choice(JUNK)])
        text = self.random.choice([json.dumps(sizes), self.json_text(sizes)])
        metadata = {"format": FORMAT, "codebook": "book", "sizes": text.encode("utf-8", "replace").decode()}
        if self.random.random() < 0.2:
            metadata.pop(self.random.choice(list(metadata)))
        save_file(tensors, folder / "codes.safetensors", metadata=metadata)
        return self.as_codes(folder / "codes.safetensors")

    def diffusers(self, folder):
        """A diffusers folder with another config.json or other names."""
        (folder / "config.json").write_bytes(
            self.random.choice(
                [self.json_text(DIFFUSERS).encode("utf-8", "surrogatepass")] * 4 + [self.damaged(json.dumps(DIFFUSERS).encode())]
            )
        )
        names = self.random.choice([{}, {"decoder.up.0.": "decoder.up_blocks.0."},
        {"decoder.up.0.": "decoder.up_blocks." + "9" * 5000 + "."},
                                    {".q.": ".attentions.0.to_q.", ".k.": ".attentions.0.query."}])  # fmt: skip
        state = {}
        for name, tensor in self.state.items():
            for old, new in names.items():
                name = name.replace(old, new)
            state[name] = tensor
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        return self.as_checkpoint(folder)

    def png(self, folder):
        """PNGs with other chunks, their checksums right."""
        size = [self.random.choice([1, 2, 1000, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 0]) for _ in range(2)]
        head = struct.pack(
            ">IIBBBBB",
            *size,
            self.random.choice([1, 2, 4, 8, 16, 9]),
            self.random.choice([0, 2, 3, 4, 6, 5]),
            0,
            0,
            self.random.choice([0, 1, 7]),
        )
        body = zlib.compress(bytes(self.random.choice([0, 10, 10**4, 10**7])))
        chunks = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
        for _ in range(self.random.randrange(3)):
            kind = self.random.choice(
                [b"iCCP", b"zTXt", b"tEXt", b"iTXt", b"eXIf", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"gAMA", b"pHYs", b"IHDR"]
            )
            data = self.random.choice(
                [
                    b"",
                    self.random.randbytes(20),
                    b"name\0\0" + zlib.compress(bytes(10**8 // 2)),
                    b"Exif\0\0II*\0\xff\xff\xff\xff",
                    b"II*\0\x08\0\0\0\xff\xff" + bytes(50),
                ]
            )
            chunks.insert(self.random.randrange(1, len(chunks)), (kind, data))
        path = folder / "a.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind,
            data in chunks))  # fmt: skip
        return self.as_picture(path)

    def no_file(self, folder):
        """Something else where the file should be."""
        path = folder / self.random.choice(
            ["model.safetensors", "config.json", "movq.ckpt", "a.png", os.fsdecode(b"\xff\xfe.safetensors"), "x" * 250]
        )
        self.random.choice([
            lambda: os.mkfifo(path), path.mkdir, path.touch, lambda: path.symlink_to(path),
            lambda: path.symlink_to(folder / "nothing"),
            lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to("/dev/null"), lambda: path.symlink_to(folder),
            lambda: path.write_bytes(self.bases[self.random.choice(list(self.bases))]), lambda: None,
        ])()  # fmt: skip
        reader = self.random.choice([self.as_checkpoint, self.as_codes, self.as_picture])
        if reader == self.as_checkpoint and self.random.random() < 0.5:
            return reader(folder)
        return reader(path if self.random.random() < 0.9 else path / "below")

    # --- Damage

    def damaged(self, data):
        """Bytes cut off, flipped, overwritten, taken out, put in or taken from another file, mostly near the beginning."""
        data, rng = bytearray(data), self.random
        for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
            reach = rng.choice([16, 64, 512, 4096, len(data)])
            at = rng.randrange(max(1, min(reach, len(data))))
            if rng.random() < 0.2:
                at = max(0, len(data) - 1 - at)
            length = rng.choice([1, 2, 4, 8, 100, 5000])
            other = self.bases[rng.choice(list(self.bases))]
            number = struct.pack(rng.choice("<>") + "Q", rng.choice(NUMBERS) % 2**64)
            action = rng.randrange(8)
            if action == 0:
                del data[at:]
            elif action == 1 and data:
                data[at] ^= 1 << rng.randrange(8)
            elif action == 2:
                data[at : at + length] = rng.randbytes(length)
            elif action == 3:
                del data[at : at + length]
            elif action == 4:
                data[at:at] = data[at : at + length]
            elif action == 5:
                data[at : at + length] = other[at : at + length]
            elif action == 6:
                width = rng.choice([1, 2, 4, 8])
                data[at : at + width] = number[:width] if rng.random() < 0.5 else number[-width:]
            else:
                data[at : at + length] = bytes(length)
        return bytes(data)

    def json_text(self, value):
        """JSON of value with some of it replaced, nested deeply, named twice or grown."""
        text = json.dumps(value)
        for _ in range(self.random.choice([0, 1, 1, 2, 5])):
            junk = self.random.choice(JUNK)
            value = self.replaced(value, junk)
            text = json.dumps(value)
        extreme = self.random.randrange(30)
        if extreme == 0:
            text = text.replace(":", ":" + "[" * 10**6, 1)
        elif extreme == 1:
            text = "[" * 10**6 + "]" * 10**6
        elif extreme == 2 and text.startswith("{") and len(text) > 2:
            text = text[:-1] + "," + text[1:]
        elif extreme == 3:
            text = text.replace("1", "9" * 10**4, 1)
        elif extreme == 4:
            text = text[:-1] + ', "more": [' + "{}," * 10**6 + "{}]}"
        elif extreme == 5:
            text = "\ufeff" + text
        return text

    def replaced(self, value, junk):
        """value with one of its parts, at any depth, in place of which is junk."""
        keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, (list, tuple)) else []
        if not keys or self.random.random() < 0.1:
            return junk
        key, copy = self.random.choice(keys), dict(value) if isinstance(value, dict) else list(value)
        what = self.random.randrange(6)
        if what == 0:
            del copy[key]
        elif what == 1 and isinstance(copy, dict):
            copy[self.random.choice(["remap", "x", "dropout", "gradient_checkpointing", "self", "beta", "\ud800"])] = junk
        else:
            copy[key] = self.replaced(copy[key], junk)
        return copy


def deep(value, levels):
    for _ in range(levels):
        value = [value]
    return value


class Watch:
    """Around a case: ends it when it takes too long, and fails where the process did what only a file's code would do."""

    seen = None

    def __init__(self, trace):
        self.trace = trace

    def __enter__(self):
        Watch.seen = []
        signal.setitimer(signal.ITIMER_REAL, SECONDS)

    def __exit__(self, kind, error, trace):
        signal.setitimer(signal.ITIMER_REAL, 0)
        seen, Watch.seen = Watch.seen, None
        assert not seen, f"did {seen}"
        assert not os.path.exists(self.trace), "ran code"

    @staticmethod
    def audit(event, arguments):
        if Watch.seen is None:
            return
        writes = (
            event == "open"
            and isinstance(arguments[1], str)
            and set(arguments[1]) & set("wax+")
            and "/case/" in str(arguments[0])
        )
        if writes or event in (
            "os.system",
            "subprocess.Popen",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "socket.connect",
            "os.remove",
        ):
            Watch.seen.append(event)


def hang(*_):
    raise Hang(f"took more than {SECONDS} s")


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=1000)
    options.add_argument("--first", type=int, default=0, help="seed of the first case")
    args = options.parse_args()
    sys.addaudithook(Watch.audit)
    signal.signal(signal.SIGALRM, hang)
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = PIXELS
    torch.set_num_threads(1)
    failures, outcomes = 0, collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for name in ("ours/model.safetensors", "zip.ckpt", "legacy.pt"):
            from_pretrained(Path(folder) / "bases" / name)
        before = top = peak()
        for seed in range(args.first, args.first + args.cases):
            print(f"\r{seed}", end="", file=sys.stderr, flush=True)  # a crash leaves it there
            try:
                outcomes[" ".join(fuzzer.run(seed))] += 1
                grown, top = peak() - top, max(top, peak())
                assert grown < MEMORY // 2 and top - before < MEMORY, f"took {grown >> 20} MiB more, {top - before >> 20} in all"
            except (Exception, Hang) as error:
                failures += 1
                chain = " from ".join(f"{type(e).__name__}: {str(e)[:300]}" for e in (error, error.__context__) if e)
                print(f"\rcase {seed}: {chain}", file=sys.stderr)
    print(
        json.dumps(
            {
                "cases": args.cases,
                "failures": failures,
                "peak_mib": top - before >> 20,
                "outcomes": dict(sorted(outcomes.items())),
            },
            indent=1,
        )
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
