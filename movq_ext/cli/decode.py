"""``movq-ext decode``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from ..bulk import ray_engine
from ..bulk.batches import Settings
from ..bulk.find import find_shards
from ..bulk.run import Report, run_in_process
from ..bulk.shards import FieldNames, Shard
from ..io.files import remove_partial_files
from .common import DTYPES, add_max_pixels, add_model, memory_size, print_error, thread_count
from .interruption import resumable

SUMMARY = "Decode codes to images, shard by shard. Images that already exist are skipped."
MAX_COUNTED_SHARDS = 1000  # opened at the start to count their images for the progress bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("codes", nargs="+", type=Path,
                        help="files of codes from encode, Parquet files, WebDatasets (.tar, .tar.gz, .tgz), .npz files, and "
                        "folders of them")  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, default=Path("decoded"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--column", default=FieldNames.column, metavar="NAME",
                        help="column of the codes in Parquet files, or array in .npz files (default: %(default)s)")  # fmt: skip
    parser.add_argument("--key", default=FieldNames.key, metavar="SUFFIX",
                        help="suffix of the codes in WebDatasets, such as codes.npy (default: %(default)s)")  # fmt: skip
    parser.add_argument("--image-column", default=FieldNames.image_column, metavar="NAME",
                        help="column to write the images to in Parquet files (default: %(default)s)")  # fmt: skip
    parser.add_argument("--image-key", default=FieldNames.image_key, metavar="SUFFIX",
                        help="suffix of the images in WebDatasets, such as decoded.png (default: %(default)s)")  # fmt: skip
    parser.add_argument("--engine", choices=["auto", "ray", "process"], default="auto",
                        help="decode with Ray Data or in this process; auto uses Ray Data if it is installed and there are "
                        "several shards (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-memory", type=memory_size, metavar="SIZE",
                        help="memory for one batch besides the weights and the images, such as 500M or 8G (default: 80%% of "
                        "the free GPU memory; on a CPU, of each worker's share of the machine's memory)")  # fmt: skip
    add_max_pixels(parser)
    parser.add_argument("--threads", type=thread_count, help="CPU threads per worker (default: 4 with Ray Data, otherwise all)")
    add_model(parser)
    parser.set_defaults(device=None)  # each worker chooses its own GPU


def run(args: argparse.Namespace) -> int:
    unreadable: list[OSError] = []
    shards = find_shards(args.codes, args.out, field_names(args), unreadable.append)
    for error in unreadable:
        print_error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    done = {shard for shard in shards if shard.is_done()}
    remove_partial_files(shard.target for shard in done)  # of runs that were killed after they wrote the output
    pending = [shard for shard in shards if shard not in done]
    settings = Settings(args.model, args.device, DTYPES[args.dtype], args.max_memory, args.max_pixels, args.threads)
    use_ray = args.engine == "ray" or (args.engine == "auto" and len(pending) > 1 and find_spec("ray") is not None)
    start = time.monotonic()
    with resumable():
        reports = decode_shards(pending, settings, use_ray) if pending else []
    seconds = time.monotonic() - start

    decoded = sum(report.decoded for report in reports)
    present = sum(report.present for report in reports)
    rejected = sum(report.rejected for report in reports) + sum(shard.count_rejects() for shard in done)  # by earlier runs
    failed_shards = sum(bool(report.error) for report in reports)
    print(f"decoded {decoded}, already there {present}, failed {rejected}")
    if len(shards) > 1 or not pending:
        print(f"shards: done {len(reports) - failed_shards}, already there {len(done)}, failed {failed_shards}")
    print(f"{seconds:.1f} s, {decoded / max(seconds, 1e-9):.2f} images/s, {'Ray' if use_ray else 'in one process'}")
    if rejected or failed_shards:
        print(f"failed samples and the reasons: {args.out}/**/*.rejects.jsonl")
    if failed_shards == len(shards):
        return 2
    return 1 if rejected or failed_shards or unreadable else 0


def field_names(args: argparse.Namespace) -> FieldNames:
    """Return the names that the options give. The message of a ValueError starts with the option."""
    try:
        return FieldNames(args.column, args.key.lstrip("."), args.image_column, args.image_key.lstrip("."))
    except ValueError as error:
        name, _, problem = str(error).partition(":")
        raise ValueError(f"--{name.replace('_', '-')}:{problem}") from None


def decode_shards(shards: Sequence[Shard], settings: Settings, use_ray: bool) -> list[Report]:
    """Decode shards, showing a progress bar and every error as it happens."""
    engine = ray_engine.run_with_ray if use_ray else run_in_process
    reports: list[Report] = []
    with tqdm(total=count_images(shards), unit="image", file=sys.stderr) as bar:
        for report in engine(shards, settings, bar.update):
            reports.append(report)
            bar.set_postfix_str(f"{len(reports)} of {len(shards)} shards", refresh=False)
            for reason in report.reasons:
                print_error(f"{report.source}: {reason}")
            if report.rejected > len(report.reasons):
                print_error(f"{report.source}: {report.rejected - len(report.reasons)} more")
            if report.error:
                print_error(report.error)
    return reports


def count_images(shards: Sequence[Shard]) -> int | None:
    """Count the images of all shards, or return None if that would take too long."""
    if len(shards) > MAX_COUNTED_SHARDS:
        return None
    counts = [shard.count_samples() for shard in shards]
    return None if None in counts else sum(count for count in counts if count is not None)
