"""The command line: ``python -m movq_ext {demo,encode,decode,train,export,info}``."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import MOVQ, ExportError, build_info, explain, export_decoder, from_pretrained
from .bulk.batches import Settings
from .bulk.codebook import Codebook
from .bulk.find import find_shards
from .bulk.run import run_in_process
from .demo import PHOTOS, SMALL_MODEL, round_trip
from .io.codes import CodeFile, codebook_id, encode_image
from .io.files import printable, read_json, require_file, wrap_errors
from .io.images import find_images, load_image
from .io.tensor_files import CheckpointError
from .training import SMALL_MODEL_CONFIG, Trainer, TrainingConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_THREADS = 1024
MOST_COUNTED = 1000  # shards that are opened at the start to know how many pictures there are
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

    def exit_code(self, done: int, skipped: int) -> int:
        print(f"encoded {done}, already there {skipped}, failed {self.count}")
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
        Codebook.of(model).require(file.codebook, args.out)
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
    return failures.exit_code(done, skipped)


def decode(args: argparse.Namespace) -> int:
    shards = find_shards(args.codes, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    waiting = [shard for shard in shards if not shard.is_done()]
    settings = Settings(args.model, args.device, DTYPES[args.dtype], args.max_memory, args.threads)
    several = len(waiting) > 1
    with_ray = args.engine == "ray" or (args.engine == "auto" and several and find_spec("ray") is not None)
    if with_ray:
        from .bulk.ray_engine import run_with_ray as run
    else:
        run = run_in_process
    counts = [shard.count_samples() for shard in waiting[:MOST_COUNTED]]
    known = [count for count in counts if count is not None]
    total = sum(known) if len(known) == len(waiting) else None
    reports, start = [], time.monotonic()
    with tqdm(total=total, unit="image", file=sys.stderr) as bar:
        for report in run(waiting, settings, bar.update) if waiting else ():
            reports.append(report)
            bar.set_postfix_str(f"{len(reports)} of {len(waiting)} shards", refresh=False)
            for reason in report.reasons:
                tqdm.write(f"error: {printable(f'{report.source}: {reason}')}", file=sys.stderr)
            if report.rejected > len(report.reasons):
                tqdm.write(f"error: {printable(report.source)}: {report.rejected - len(report.reasons)} more", file=sys.stderr)
            if report.error:
                tqdm.write(f"error: {printable(report.error)}", file=sys.stderr)
    decoded, present, rejected = (
        sum(getattr(report, field) for report in reports) for field in ("decoded", "present", "rejected")
    )
    rejected += sum(shard.count_rejects() for shard in set(shards).difference(waiting))  # by an earlier run
    failed, seconds = sum(bool(report.error) for report in reports), time.monotonic() - start
    print(f"decoded {decoded}, already there {present}, failed {rejected}")
    if len(shards) > 1 or not waiting:
        print(f"shards: done {len(reports) - failed}, already there {len(shards) - len(waiting)}, failed {failed}")
    print(f"{seconds:.1f} s, {decoded / max(seconds, 1e-9):.2f} images/s, {'Ray' if with_ray else 'in one process'}")
    if rejected or failed:
        print(f"what could not be decoded, and why: {args.out}/**/*.rejects.jsonl")
    if failed and failed == len(waiting):
        return 2
    return 1 if rejected or failed else 0


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
        with wrap_errors(CheckpointError, f"{args.config} does not hold MOVQ's keywords (ddconfig, n_embed, embed_dim)"):
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
        torch.zeros(1, device=name).item()  # which meta cannot
    except (RuntimeError, AssertionError) as error:  # torch's ways to say no such device, or a build without it
        raise argparse.ArgumentTypeError(f"cannot use {name!r}: {str(error).splitlines()[0]}") from error
    return name


def size_range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    return int(least), int(most or least)


def memory_size(text: str) -> int:
    """Bytes: a number, and K, M, G or T for powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size <= 0:
        raise ValueError(text)  # which argparse words
    return size


def thread_count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= MOST_THREADS):
        raise argparse.ArgumentTypeError(f"must be 1 to {MOST_THREADS}, got {text}")
    return int(text)


def load_model(args: argparse.Namespace) -> MOVQ:
    return from_pretrained(args.model, device=args.device, dtype=DTYPES[args.dtype])


def documented_fields(config: type) -> dict[str, str]:
    """What a dataclass's docstring says of each field. Python -OO has none."""
    return dict(re.findall(r"^ {4}(\w+): (.+?)\.?$", inspect.getdoc(config) or "", re.MULTILINE))


def progress(items: list[Any]) -> Iterable[Any]:
    return tqdm(items, unit="image", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m movq_ext", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="{demo,encode,decode,train,export,info}")

    def command(run: Callable[[argparse.Namespace], int], summary: str, model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=summary, description=summary)
        sub.set_defaults(run=run)
        sub.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
                         help="torch device (a GPU if there is one)")  # fmt: skip
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

    sub = command(decode, "Codes to pictures, shard by shard; what is already there is skipped.")
    sub.set_defaults(device=None)
    sub.add_argument("codes", nargs="+", type=Path, help="files that encode wrote, Parquet, WebDatasets (.tar), folders of these")
    sub.add_argument("-o", "--out", type=Path, default=Path("decoded"), help="folder to write to (%(default)s)")
    sub.add_argument("--engine", choices=["auto", "ray", "process"], default="auto",
                     help="Ray Data, this process, or Ray if installed and there are several shards (%(default)s)")  # fmt: skip
    sub.add_argument("--max-memory", type=memory_size, metavar="BYTES",
                     help="of a decode, such as 500M (most of what a GPU has free, or of the machine's for a CPU)")  # fmt: skip
    sub.add_argument("--threads", type=thread_count, help="of each worker (4 with Ray, else all)")

    sub = command(train, "Train a model; run it again to go on from the last checkpoint.", model=False)
    sub.add_argument("folder", type=Path, help="photographs, searched to the bottom")
    sub.add_argument("-o", "--out", type=Path, default=Path("training"), help="folder for checkpoint and model (%(default)s)")
    sub.add_argument("--config", type=Path, help="JSON file with the keywords of MOVQ (default: the shipped model's)")
    sub.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")
    sub.add_argument("--checkpoint-activations", action="store_true", help="less memory, more time, the same steps")
    meaning = documented_fields(TrainingConfig)
    for field in fields(TrainingConfig):
        flag, what = "--" + field.name.replace("_", "-"), meaning.get(field.name, "")
        if isinstance(field.default, bool):
            sub.add_argument(flag, action="store_true", help=what)
        else:
            sub.add_argument(flag, type=type(field.default), default=field.default, help=f"{what} (%(default)s)")

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
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is there", file=sys.stderr)
        return 130  # as shells have it: 128 and SIGINT
