"""Hostile weights: safetensors, `torch.save` in both layouts, and diffusers folders."""

import collections
import functools
import io
import json
import pickle
import warnings
import zipfile

import forged_checkpoints as forged
import torch
from safetensors.torch import save_file

from attacks.cases import Cases, join_header, sort_header, split_header
from attacks.mutations import NUMBERS, Code, ForeignCall, change_numbers, change_opcodes, crafted_pickle, damage_json, nested
from movq_ext import MOVQ, CheckpointError, from_pretrained, save_pretrained
from movq_ext.io.weights import CONFIG_KEY

DDCONFIG = dict(ch=32, out_ch=3, ch_mult=[1], num_res_blocks=0, attn_resolutions=[], in_channels=3, resolution=256, z_channels=4)
DIFFUSERS = {
    "_class_name": "VQModel", "norm_type": "spatial", "block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "in_channels": 3, "out_channels": 3, "latent_channels": 4, "num_vq_embeddings": 8,
    "layers_per_block": 0, "norm_num_groups": 32, "vq_embed_dim": 4,
}  # fmt: skip
WEIGHTS = ["ours/model.safetensors", "original.safetensors", "zip.ckpt", "legacy.pt"]


class WeightCases(Cases):
    kinds = ("damaged_weights", "header", "config", "entries", "pickle", "opcodes", "archive", "directories", "diffusers")

    def __init__(self, folder):
        torch.manual_seed(0)
        self.model = MOVQ(DDCONFIG, 8, 4)
        self.state = dict(self.model.state_dict())
        super().__init__(folder)

    def write_intact_files(self, folder):
        save_pretrained(self.model, folder / "ours")
        save_file(self.state, folder / "original.safetensors")
        torch.save(self.state, folder / "zip.ckpt")
        torch.save({"state_dict": self.state}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
        for path in folder.rglob("*.safetensors"):
            sort_header(path)

    def reading(self, path):
        def read():
            model = from_pretrained(path)
            assert all(p.dtype == torch.float32 and type(p) is torch.nn.Parameter for p in model.parameters())
            same_names = model.state_dict().keys() == self.state.keys()
            assert same_names or path.is_dir() or sum(p.numel() for p in model.parameters()) < 10**7

        return read, (CheckpointError, OSError)

    def damaged_weights(self, folder):
        """Intact weights with damaged bytes."""
        name = self.random.choice(WEIGHTS)
        path = folder / name.rpartition("/")[2]
        path.write_bytes(self.damaged(self.intact[name]))
        return self.reading(path)

    def header(self, folder):
        """A safetensors file with a damaged header."""
        header, tensors = split_header(self.intact[self.random.choice(WEIGHTS[:2])])
        header = damage_json(self.random, header).encode("utf-8", "surrogatepass")
        declared = self.random.choice([len(header)] * 8 + [self.random.choice(NUMBERS) % 2**64])
        path = folder / "model.safetensors"
        path.write_bytes(join_header(header, tensors, declared))
        return self.reading(path)

    def config(self, folder):
        """Intact weights with a damaged config."""
        text = damage_json(self.random, self.model.config)
        try:
            save_file(self.state, folder / "model.safetensors", metadata={CONFIG_KEY: text})
        except UnicodeEncodeError:
            save_file(self.state, folder / "model.safetensors", metadata={CONFIG_KEY: ascii(text)})
        return self.reading(folder)

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
        return self.reading(path)

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
            lambda: self.state["decoder.norm_out.conv_y.bias"].detach(), lambda: torch.eye(3).to_sparse_csc(),
            lambda: like.to(torch.complex64).conj(), lambda: like.to(torch.complex64).conj().imag,
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
        return self.reading(path)

    def opcodes(self, folder):
        """A pickle of calls that torch.load allows, with some opcodes changed, in either layout."""
        path = folder / "movq.ckpt"
        values = [*forged.ALLOCATING_PICKLES.values(), forged.scalar(), forged.scalar(view=b"N")]
        value = forged.dictionary(a=self.random.choice(values), b=self.random.choice(values))
        value = change_opcodes(self.random, value if self.random.random() < 0.3 else change_numbers(self.random, value))
        self.random.choice([forged.write_archive, forged.write_legacy])(path, value)
        return self.reading(path)

    def directories(self, folder):
        """A zip archive with two directories: zipfile reads one, and torch the other. One may hold a bomb."""
        path = folder / "movq.ckpt"
        contents = [bytes(4), bytes(0), bytes(64 << 20)]
        writers = [
            functools.partial(forged.write_archive, value=forged.dictionary(a=forged.scalar()),
                              storages=[self.random.choice(contents)], compression=zipfile.ZIP_DEFLATED)
            for _ in range(2)
        ]  # fmt: skip
        forged.write_two_directories(path, *writers)
        if self.random.random() < 0.5:
            path.write_bytes(self.damaged(path.read_bytes()))
        return self.reading(path)

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
        return self.reading(path)

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
        return self.reading(folder)
