"""The commands that inject.py attacks: how to run them, what is there before, and what they say afterwards."""

import json
import re
import traceback

import numpy as np
import torch
from models import MODEL, SMALL_MOVQ
from PIL import Image
from shard_files import npy_bytes, write_parquet, write_tar

from movq_ext import MOVQ, from_pretrained, save_pretrained
from movq_ext.bulk.codebook import Codebook
from movq_ext.bulk.find import make_shard
from movq_ext.cli import main

GRIDS = [np.arange(12).reshape(4, 3), np.full((2, 2), 7)]
OTHER_MODEL = {**SMALL_MOVQ, "n_embed": 8}  # its weights have other shapes, so that a mixture cannot be loaded


def write_inputs(folder):
    """Write a model, images and codes for all commands."""
    folder.mkdir()
    torch.manual_seed(0)
    save_pretrained(MOVQ(**SMALL_MOVQ), folder / "model")
    save_pretrained(MOVQ(**OTHER_MODEL), folder / "other_model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "images").mkdir()
    (folder / "photograph").mkdir()
    for i, name in enumerate(["images/0.png", "images/1.png", "images/2.png", "photograph/a.png"]):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3) if i == 3 else (8, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    assert cli(folder, "encode", folder / "images", "-o", folder / "codes.safetensors") == 0
    arrays = [*GRIDS, np.array([[99]])]  # the model has no such code
    write_tar(folder / "codes.tar", [(f"{i}.npy", npy_bytes(grid)) for i, grid in enumerate(arrays)])
    write_parquet(folder / "codes.parquet", [grid.tolist() for grid in GRIDS], name=["a", "b"])
    np.savez(folder / "codes.npz", **{str(i): grid for i, grid in enumerate(GRIDS)})


def cli(inputs, *arguments):
    """Run a command of the command line, and return its exit status."""
    model = () if arguments[0] == "train" else ("--model", inputs / "model")
    return main([*map(str, (*arguments, *model)), "--device", "cpu"])


def counts(verb, output):
    """Return the three numbers of the line that encode and decode end with."""
    return map(int, re.search(rf"^{verb} (\d+), already there (\d+), failed (\d+)$", output, re.M).groups())


class Command:
    """A command that writes into a folder, `out`. `inputs` is a folder that write_inputs has filled.

    `changing` lists files, as patterns, that may have contents other than the first and the last after a fault.
    """

    changing = ()
    status = 0  # of a run that no fault disturbs

    def __init__(self, inputs):
        self.inputs = inputs

    def prepare(self, out):
        """Write what is there before the command runs."""
        out.mkdir()

    def run(self, out):
        """Run the command, and return its exit status."""
        raise NotImplementedError

    def result(self, files, out):
        """Return what must be equal at the end, given the contents of all files by name."""
        return files

    def check_report(self, output):
        """Check what a run says that no fault disturbs."""


class Encode(Command):
    """Encode to a code file that has an image already."""

    changing = ("codes.safetensors",)
    target, options = "codes.safetensors", ()

    def prepare(self, out):
        out.mkdir()
        assert self.encode("images/0.png", out) == 0

    def run(self, out):
        return self.encode("images", out)

    def encode(self, images, out):
        return cli(self.inputs, "encode", self.inputs / images, "-o", out / self.target, *self.options)

    def check_report(self, output):
        encoded, present, failed = counts("encoded", output)
        assert encoded + present == 3 and present >= 1 and failed == 0, output


class EncodeShards(Encode):
    """Encode to a folder that has a shard already. An error ends a shard early, so the next run may write other shards."""

    changing = ("shards/codes-*",)
    target, options = "shards", ("--shard-size", "1")

    def result(self, files, out):
        """Replace the shards by their images."""
        book = Codebook.from_model(from_pretrained(self.inputs / "model"))
        shards = [path for path in sorted(out.glob("shards/codes-*"))]
        samples = [sample for path in shards for sample in make_shard(path, path).samples(book)]
        others = {name: data for name, data in files.items() if not name.startswith("shards/codes-")}
        assert not any(sample.problem for sample in samples)
        return others | {"images": [(sample.name, sample.size, sample.codes.tolist()) for sample in samples]}


class EncodeTar(EncodeShards):
    options = ("--shard-size", "2", "--format", "webdataset")


class EncodeParquet(EncodeShards):
    options = ("--shard-size", "2", "--format", "parquet")


class Decode(Command):
    """Decode a code file to a folder of PNGs."""

    changing = ("*.rejects.jsonl",)  # an error of a whole shard is in its file of rejects
    source = "codes.safetensors"

    def run(self, out):
        options = ("--engine", "process", "--threads", "1")
        return cli(self.inputs, "decode", self.inputs / self.source, "-o", out / "decoded", *options)

    def check_report(self, output):
        decoded, present, failed = counts("decoded", output)
        done = "shards: done 0, already there 1, failed 0" in output
        assert done or decoded + present == (3 if self.source == "codes.safetensors" else len(GRIDS)), output
        assert failed == self.status, output


class DecodeTar(Decode):
    """The last of its samples is rejected."""

    source, status = "codes.tar", 1


class DecodeParquet(Decode):
    source = "codes.parquet"


class DecodeNpz(Decode):
    source = "codes.npz"


class Train(Command):
    """Train for two steps, with a checkpoint after each."""

    changing = ("run/log.csv", "run/training.pt", "run/model/model.safetensors")

    def run(self, out):
        options = {"steps": 2, "save-every": 1, "batch-size": 1, "crop": 8, "continuous-steps": 1, "threads": 1}
        options = [text for name, value in options.items() for text in (f"--{name}", value)]
        photograph = self.inputs / "photograph"
        files = (photograph, "-o", out / "run", "--validation", photograph, "--config", self.inputs / "config.json")
        return cli(self.inputs, "train", *files, *options)

    def check_report(self, output):
        assert re.search(r"^model after 2 steps: ", output, re.M), output


class Save(Command):
    """Save a model over another one."""

    def prepare(self, out):
        save_pretrained(from_pretrained(self.inputs / "other_model"), out)

    def run(self, out):
        try:
            save_pretrained(from_pretrained(self.inputs / "model"), out)
        except OSError as error:
            print(f"error: {error}")
            return 2
        except Exception:
            traceback.print_exc()
            return 99
        return 0


COMMANDS = {
    "encode": Encode, "encode-shards": EncodeShards, "encode-tar": EncodeTar, "encode-parquet": EncodeParquet,
    "decode": Decode, "decode-tar": DecodeTar, "decode-parquet": DecodeParquet, "decode-npz": DecodeNpz,
    "train": Train, "save": Save,
}  # fmt: skip
