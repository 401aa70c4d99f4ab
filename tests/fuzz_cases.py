"""Cases for fuzz.py: hostile checkpoints, code files and images, and what their readers may do with them."""

import collections
import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
import zlib

import numpy as np
import torch
from fuzz_mutations import JUNK, NUMBERS, Code, ForeignCall, change_numbers, crafted_pickle, damage, damage_json, nested
from PIL import Image, ImageCms
from safetensors.torch import save_file

from movq_ext import MOVQ, CheckpointError, from_pretrained, save_pretrained
from movq_ext.io.codes import FORMAT, CodeFile, CodeFileError
from movq_ext.io.images import load_image, to_tensor
from movq_ext.io.weights import CONFIG_KEY

DDCONFIG = dict(ch=32, out_ch=3, ch_mult=[1], num_res_blocks=0, attn_resolutions=[], in_channels=3, resolution=256, z_channels=4)
DIFFUSERS = {
    "_class_name": "VQModel", "norm_type": "spatial", "block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "in_channels": 3, "out_channels": 3, "latent_channels": 4, "num_vq_embeddings": 8,
    "layers_per_block": 0, "norm_num_groups": 32, "vq_embed_dim": 4,
}  # fmt: skip
IMAGES = [("png", "RGB"), ("png", "P"), ("png", "RGBA"), ("png", "I;16"), ("jpg", "RGB"), ("jpg", "CMYK"), ("gif", "P"),
          ("bmp", "RGB"), ("bmp", "P"), ("ppm", "RGB"), ("tif", "RGB"), ("tif", "F"), ("webp", "RGB")]  # fmt: skip
NAMES = ["a", "a.jpg", "a.png", "b/a", "../a", "/a", "a/..", ".", "a/.", "", "\0", "x" * 9999, "\x1b[2J", "é", "con", "a\\b",
         " ", "/"]  # fmt: skip


def split_header(data):
    """Return (header, tensors) of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def sort_header(path):
    """Rewrite a safetensors file with a sorted header, which the library writes in a random order."""
    header, tensors = split_header(path.read_bytes())
    text = json.dumps(header, sort_keys=True).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


class Cases:
    """Create cases from seeds: a file in a folder, a reader for it, and the errors the reader may raise."""

    def __init__(self, folder):
        self.folder, self.trace = folder, str(folder / "ran")
        torch.manual_seed(0)
        self.model = MOVQ(DDCONFIG, 8, 4)
        self.state = dict(self.model.state_dict())
        self.intact = self.write_intact_files(folder / "intact")
        self.images = [name for name in self.intact if name.rpartition(".")[2] not in ("safetensors", "ckpt", "pt", "json")]
        self.kinds = [
            self.checkpoint_bytes, self.code_file_bytes, self.image_bytes, self.image_bytes, self.header, self.config,
            self.entries, self.pickle, self.archive, self.code_file, self.diffusers, self.png, self.no_file,
        ]  # fmt: skip

    def write_intact_files(self, folder):
        """Write files of every kind that is read, and return their contents by name."""
        save_pretrained(self.model, folder / "ours")
        save_file(self.state, folder / "original.safetensors")
        torch.save(self.state, folder / "zip.ckpt")
        torch.save({"state_dict": self.state}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
        codes = CodeFile("book")
        codes.add("a.jpg", torch.arange(6).view(2, 3), (15, 24))
        codes.add("deep/b.png", torch.zeros(1, 1, dtype=torch.long), (1, 1))
        codes.save(folder / "codes.safetensors")
        pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a picture"
        for suffix, mode in IMAGES:
            options = {"exif": exif} if suffix in ("png", "jpg", "tif", "webp") else {}
            image = Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11)) if mode == "I;16" else pixels.convert(mode)
            image.save(folder / f"{mode.replace(';', '')}.{suffix}", **options)
        pixels.save(folder / "packed.tif", compression="tiff_lzw")
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for suffix in ("png", "jpg", "tif"):
            pixels.save(folder / f"profile.{suffix}", icc_profile=profile)
        for path in folder.rglob("*.safetensors"):
            sort_header(path)
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}

    def create(self, seed, folder):
        """Return (kind, function that reads the file, errors that it may raise)."""
        self.random = random.Random(seed)
        kind = self.random.choice(self.kinds)
        return kind.__name__, *kind(folder)

    def damaged(self, data):
        return damage(self.random, data, self.intact)

    # --- Readers, and the errors that they document

    def as_checkpoint(self, path):
        def read():
            model = from_pretrained(path)
            assert all(p.dtype == torch.float32 and type(p) is torch.nn.Parameter for p in model.parameters())
            same_names = model.state_dict().keys() == self.state.keys()
            assert same_names or path.is_dir() or sum(p.numel() for p in model.parameters()) < 10**7

        return read, (CheckpointError, OSError)

    def as_code_file(self, path):
        def read():
            file = CodeFile.load(path)
            pngs = ((self.folder / png).resolve() for png in file.png_names().values())
            outside = [png for png in pngs if not png.is_relative_to(self.folder.resolve())]
            assert not outside, outside
            assert all(grid.dtype == torch.int32 for grid in file.codes.values())

        return read, (CodeFileError, OSError)

    def as_image(self, path):
        def read():
            image = load_image(path)
            assert image.mode == "RGB" and to_tensor(image).shape == (3, image.height, image.width)

        return read, OSError

    # --- Kinds of cases

    def checkpoint_bytes(self, folder):
        name = self.random.choice(["ours/model.safetensors", "original.safetensors", "zip.ckpt", "legacy.pt"])
        path = folder / name.rpartition("/")[2]
        path.write_bytes(self.damaged(self.intact[name]))
        return self.as_checkpoint(path)

    def code_file_bytes(self, folder):
        path = folder / "codes.safetensors"
        path.write_bytes(self.damaged(self.intact["codes.safetensors"]))
        return self.as_code_file(path)

    def image_bytes(self, folder):
        name = self.random.choice(self.images)
        path = folder / name
        path.write_bytes(self.damaged(self.intact[name]))
        return self.as_image(path)

    def header(self, folder):
        """A safetensors file with a damaged header."""
        name, reader = self.random.choice([
            ("original.safetensors", self.as_checkpoint), ("ours/model.safetensors", self.as_checkpoint),
            ("codes.safetensors", self.as_code_file),
        ])  # fmt: skip
        header, tensors = split_header(self.intact[name])
        header = damage_json(self.random, header).encode("utf-8", "surrogatepass")
        declared = self.random.choice([len(header)] * 8 + [self.random.choice(NUMBERS) % 2**64])
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", declared) + header + tensors)
        return reader(path)

    def config(self, folder):
        """Intact weights with a damaged config."""
        text = damage_json(self.random, self.model.config)
        try:
            save_file(self.state, folder / "model.safetensors", metadata={CONFIG_KEY: text})
        except UnicodeEncodeError:
            save_file(self.state, folder / "model.safetensors", metadata={CONFIG_KEY: ascii(text)})
        return self.as_checkpoint(folder)

    def entries(self, folder):
        """A checkpoint with unusual tensors, or other objects, among its entries."""
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
        wrapped = self.random.choice([
            state, {"state_dict": state}, {"model." + name: x for name, x in state.items()},
            {"model": state, "callback": ForeignCall(self.trace)},
        ])  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(wrapped, path)
        return self.as_checkpoint(path)

    def entry(self, like):
        return self.random.choice([
            lambda: torch.zeros(1).expand(10**6, 10**6), lambda: torch.zeros(1).expand(like.shape),
            lambda: torch.zeros(like.shape, device="meta"), lambda: torch.zeros(10**9, 10**3, device="meta"),
            lambda: like.to_sparse(), lambda: like.to(torch.complex64), lambda: like.long(), lambda: like.double(),
            lambda: like.bool(), lambda: like.to(torch.float8_e4m3fn), lambda: torch.nn.Parameter(like), lambda: like[..., :0],
            lambda: torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8),
            lambda: like.t() if like.dim() == 2 else like[None], lambda: torch.full_like(like, float("nan")), lambda: None,
            lambda: "text", lambda: {}, lambda: nested([], 150), lambda: 10**30, lambda: collections.OrderedDict(a=like),
            lambda: {1, 2}, lambda: bytearray(5), lambda: torch.Size([1]),
            lambda: like.flip(0).T if like.dim() == 2 else like,
        ])()  # fmt: skip

    def pickle(self, folder):
        """A pickle of code or other objects, or with invalid opcodes, in place of a checkpoint."""
        path = folder / self.random.choice(["movq.ckpt", "movq.pt", "movq.pth", "movq.bin"])
        protocol = self.random.randrange(6)
        value = self.random.choice([
            Code(self.trace), {"state_dict": Code(self.trace)}, {"a": [Code(self.trace)]}, [], {}, {1: 2}, nested([], 200),
            10**300, None, collections.Counter("abc"), bytearray(9), {"state_dict": {"a": 1}}, "x" * 10**5,
        ])  # fmt: skip
        if self.random.random() < 0.3:
            torch.save(value, path, _use_new_zipfile_serialization=self.random.random() < 0.5, pickle_protocol=protocol)
        elif self.random.random() < 0.5:
            path.write_bytes(pickle.dumps(value, protocol))
        else:
            path.write_bytes(crafted_pickle(self.random, self.trace))
        return self.as_checkpoint(path)

    def archive(self, folder):
        """A zip checkpoint with a damaged pickle, damaged or repeated members, or compression."""
        path = folder / "movq.ckpt"
        compression = self.random.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
        with (
            zipfile.ZipFile(io.BytesIO(self.intact["zip.ckpt"])) as old,
            zipfile.ZipFile(path, "w", compression) as new,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # about repeated names
            victim = self.random.choice(old.namelist())
            for name in old.namelist():
                data = old.read(name)
                if name.endswith("data.pkl") and self.random.random() < 0.7:
                    data = change_numbers(self.random, data) if self.random.random() < 0.5 else self.damaged(data)
                elif name == victim:
                    data = self.random.choice([b"", self.damaged(data), bytes(32 << 20) if compression else data, data * 2])
                for _ in range(self.random.choice([1] * 20 + [0, 2])):
                    new.writestr(name, data)
        if self.random.random() < 0.2:
            path.write_bytes(self.damaged(path.read_bytes()))
        return self.as_checkpoint(path)

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
        return self.as_code_file(folder / "codes.safetensors")

    def diffusers(self, folder):
        """A diffusers folder with a damaged config.json or renamed entries."""
        config = damage_json(self.random, DIFFUSERS).encode("utf-8", "surrogatepass")
        (folder / "config.json").write_bytes(self.random.choice([config] * 4 + [self.damaged(json.dumps(DIFFUSERS).encode())]))
        names = self.random.choice([
            {}, {"decoder.up.0.": "decoder.up_blocks.0."}, {"decoder.up.0.": "decoder.up_blocks." + "9" * 5000 + "."},
            {".q.": ".attentions.0.to_q.", ".k.": ".attentions.0.query."},
        ])  # fmt: skip
        state = {}
        for name, tensor in self.state.items():
            for old, new in names.items():
                name = name.replace(old, new)
            state[name] = tensor
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        return self.as_checkpoint(folder)

    def png(self, folder):
        """A PNG with unusual chunks and correct checksums."""
        size = [self.random.choice([1, 2, 1000, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 0]) for _ in range(2)]
        depth, color = self.random.choice([1, 2, 4, 8, 16, 9]), self.random.choice([0, 2, 3, 4, 6, 5])
        header = struct.pack(">IIBBBBB", *size, depth, color, 0, 0, self.random.choice([0, 1, 7]))
        body = zlib.compress(bytes(self.random.choice([0, 10, 10**4, 10**7])))
        chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
        for _ in range(self.random.randrange(3)):
            kind = self.random.choice(
                [b"iCCP", b"zTXt", b"tEXt", b"iTXt", b"eXIf", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"gAMA", b"pHYs", b"IHDR"]
            )
            data = self.random.choice([
                b"", self.random.randbytes(20), b"name\0\0" + zlib.compress(bytes(10**8 // 2)),
                b"Exif\0\0II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + bytes(50),
            ])  # fmt: skip
            chunks.insert(self.random.randrange(1, len(chunks)), (kind, data))
        content = b"\x89PNG\r\n\x1a\n"
        for kind, data in chunks:
            content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        (folder / "a.png").write_bytes(content)
        return self.as_image(folder / "a.png")

    def no_file(self, folder):
        """A pipe, folder, link, device, file of another kind or nothing in place of the file."""
        names = ["model.safetensors", "config.json", "movq.ckpt", "a.png", os.fsdecode(b"\xff\xfe.safetensors"), "x" * 250]
        path = folder / self.random.choice(names)
        self.random.choice([
            lambda: os.mkfifo(path), path.mkdir, path.touch, lambda: path.symlink_to(path),
            lambda: path.symlink_to(folder / "nothing"), lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to("/dev/null"), lambda: path.symlink_to(folder),
            lambda: path.write_bytes(self.intact[self.random.choice(list(self.intact))]), lambda: None,
        ])()  # fmt: skip
        reader = self.random.choice([self.as_checkpoint, self.as_code_file, self.as_image])
        if reader == self.as_checkpoint and self.random.random() < 0.5:
            return reader(folder)
        return reader(path if self.random.random() < 0.9 else path / "below")
