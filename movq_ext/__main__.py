"""The command line: ``python -m movq_ext {demo,encode,decode,train,export,info}``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import MOVQ, ExportError, build_info, explain, export_decoder, from_pretrained
from .checkpoint import CheckpointError
from .codes import CodeFile, codebook_id, decode_image, encode_image
from .demo import PHOTOS, SMALL_MODEL, round_trip
from .files import printable, read_json, refusing, require_file
from .images import find_images, load_image, save_image
from .training import SMALL_MODEL as SMALL_MODEL_CONFIG
from .training import Trainer, TrainingConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAVE_SECONDS = 60.0  # how much work of ``encode`` an interruption may cost


class Failures:
    """Files that could not be done: each is reported when it happens, and counted at the end."""

    def __init__(self) -> None:
        self.count = 0

    def attempt(self, name: object, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever one file does must not stop the rest
            self.count += 1
            tqdm.write(f"error: {printable(f'{name}: {error}')}", file=sys.stderr)

    def exit_code(self, done: int, skipped: int, verb: str) -> int:
        print(f"{verb} {done}, already there {skipped}, failed {self.count}")
        return 1 if self.count else 0


def demo(args: argparse.Namespace) -> int:
    model = load_model(args)
    photo = PHOTOS.get(args.photo, Path(args.photo))
    result = round_trip(model, photo, args.out)
    print(f"photograph  {photo.name} ({'shipped, held out of training' if args.photo in PHOTOS else photo})")
    detail = f"{result.distinct_codes} distinct, {result.bits_per_pixel:.3f} bit/pixel"
    print(f"codes       {result.codes} of {model.quantize.n_e} ({detail})")
    print(f"quality     PSNR {result.quality.psnr:.2f} dB, SSIM {result.quality.ssim:.4f}")
    print(f"time        encode {result.encode_seconds:.3f} s, decode {result.decode_seconds:.3f} s")
    print(f"device      {args.device}, {args.dtype}")
    print(f"path        {explain(model.quant_conv.weight)}")
    print(f"written     {args.out}: codes.safetensors, decoded.png, side_by_side.png")
    return 0


def encode(args: argparse.Namespace) -> int:
    model = load_model(args)
    file = CodeFile(codebook_id(model))
    if args.out.exists():
        file = CodeFile.load(args.out)
        require_codebook(file, model, args.out)
    failures, done, skipped, saved = Failures(), 0, 0, time.monotonic()
    seen: set[str] = set()

    def one(path: Path, name: str) -> None:
        if name in seen:
            raise ValueError("another picture of this call has the same name")
        seen.add(name)
        if name in file.codes:
            nonlocal skipped
            skipped += 1
            return
        image = load_image(path)
        file.add(name, encode_image(model, image), (image.height, image.width))
        nonlocal done
        done += 1

    try:
        for path, relative in progress(list(find_images(args.images))):
            failures.attempt(path, partial(one, path, relative.as_posix()))
            if time.monotonic() - saved > SAVE_SECONDS:
                file.save(args.out)
                saved = time.monotonic()
    finally:
        if done or not args.out.exists():
            file.save(args.out)
    return failures.exit_code(done, skipped, "encoded")


def decode(args: argparse.Namespace) -> int:
    model = load_model(args)
    file = CodeFile.load(args.codes)
    require_codebook(file, model, args.codes)
    failures, done, skipped = Failures(), 0, 0
    args.out.mkdir(parents=True, exist_ok=True)

    def one(name: str, png: Path) -> None:
        nonlocal done, skipped
        if png.exists():
            skipped += 1
            return
        image = decode_image(model, file.codes[name], file.sizes[name])
        png.parent.mkdir(parents=True, exist_ok=True)
        save_image(image, png)
        done += 1

    for name, png in progress(list(file.png_names().items())):
        failures.attempt(name, partial(one, name, args.out / png))
    return failures.exit_code(done, skipped, "decoded")


def train(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if "RANK" in os.environ:  # under torchrun
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    try:
        config = TrainingConfig(**{field.name: getattr(args, field.name) for field in fields(TrainingConfig)})
        torch.manual_seed(config.seed)  # every process starts from the same weights
        if args.config:
            require_file(args.config)
        with refusing(CheckpointError, f"{args.config} does not hold MOVQ's keywords (ddconfig, n_embed, embed_dim)"):
            model = MOVQ(**(read_json(args.config) if args.config else SMALL_MODEL_CONFIG))
        device = torch.device(args.device)
        trainer = Trainer(model, args.folder, args.out, config, device, args.checkpoint_activations)
        if trainer.checkpoint.exists():
            trainer.resume()
        trainer.run(args.save_every)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def export(args: argparse.Namespace) -> int:
    model = load_model(args)

    def cells(pixels: tuple[int, int]) -> tuple[int, int]:
        if any(size % model.downsampling for size in pixels):
            raise ValueError(f"size must be a multiple of the model's {model.downsampling} pixels a latent cell, got {pixels}")
        return pixels[0] // model.downsampling, pixels[1] // model.downsampling

    start = time.monotonic()
    export_decoder(model, args.out, height=cells(args.size), width=cells(args.width or args.size), batch=args.batch)
    print(f"device   {args.device}, {args.dtype}")
    print(f"written  {args.out}: {args.out.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
    return 0


def info(args: argparse.Namespace) -> int:
    report: dict[str, Any] = build_info()
    report["path"] = explain(torch.empty(0, device=args.device))
    model = load_model(args)
    report["model"] = {
        "path": str(args.model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "downsampling": model.downsampling,
        "codebook": codebook_id(model),
        **model.config,
    }
    print(json.dumps(report, indent=2, default=str))
    return 0


def usable_device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say no such device, or a build without it
        raise argparse.ArgumentTypeError(f"cannot use {name!r}: {str(error).splitlines()[0]}") from error
    return name


def size_range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    return int(least), int(most or least)


def load_model(args: argparse.Namespace) -> MOVQ:
    return from_pretrained(args.model, device=args.device, dtype=DTYPES[args.dtype])


def require_codebook(file: CodeFile, model: MOVQ, path: Path) -> None:
    if file.codebook != codebook_id(model):
        raise ValueError(f"{path} was made with codebook {file.codebook}, the model has {codebook_id(model)}")


def progress(items: list[Any]) -> Iterable[Any]:
    return tqdm(items, unit="image", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m movq_ext", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="{demo,encode,decode,train,export,info}")

    def command(run: Callable[[argparse.Namespace], int], summary: str, model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=summary, description=summary)
        sub.set_defaults(run=run)
        sub.add_argument(
            "--device",
            type=usable_device,
            default="cuda" if torch.cuda.is_available() else "cpu",
            help="torch device (%(default)s)",
        )
        if model:
            sub.add_argument("--model", type=Path, default=SMALL_MODEL, help="weights, see from_pretrained (the shipped model)")
            sub.add_argument("--dtype", choices=DTYPES, default="float32")
        return sub

    sub = command(demo, "Encode a photograph, decode its codes, and show what came back.")
    sub.add_argument("out", type=Path, help="folder to write to")
    sub.add_argument("--photo", default="china", help=f"a shipped photograph ({', '.join(PHOTOS)}) or a file (%(default)s)")

    sub = command(encode, "Pictures to codes; what the file already holds is skipped.")
    sub.add_argument("images", nargs="+", type=Path, help="pictures and folders of pictures")
    sub.add_argument("-o", "--out", type=Path, default=Path("codes.safetensors"), help="file to write (%(default)s)")

    sub = command(decode, "Codes to PNG pictures; those already there are skipped.")
    sub.add_argument("codes", type=Path, help="file that encode wrote")
    sub.add_argument("-o", "--out", type=Path, default=Path("decoded"), help="folder to write to (%(default)s)")

    sub = command(train, "Train a model; run it again to go on from the last checkpoint.", model=False)
    sub.add_argument("folder", type=Path, help="photographs, searched to the bottom")
    sub.add_argument("-o", "--out", type=Path, default=Path("training"), help="folder for checkpoint and model (%(default)s)")
    sub.add_argument("--config", type=Path, help="JSON file with the keywords of MOVQ (default: the shipped model's)")
    sub.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")
    sub.add_argument("--checkpoint-activations", action="store_true", help="less memory, more time, the same steps")
    for field in fields(TrainingConfig):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            sub.add_argument(flag, action="store_true", help="bfloat16 autocast")
        else:
            sub.add_argument(flag, type=type(field.default), default=field.default, help="(%(default)s)")

    sub = command(export, "Compile the decoder, for latents of the codes, into a file that runs without movq_ext.")
    sub.add_argument("-o", "--out", type=Path, default=Path("decoder.pt2"), help="file to write (%(default)s)")
    sub.add_argument("--size", type=size_range, default="256", help="height of the image in pixels, or LEAST:MOST (%(default)s)")
    sub.add_argument("--width", type=size_range, help="its width, alike (as --size)")
    sub.add_argument("--batch", type=size_range, default="1", help="images at once, alike (%(default)s)")

    command(info, "How the package was built, which path runs here, and what the model is.")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except (OSError, ValueError, TypeError, FloatingPointError, ExportError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
