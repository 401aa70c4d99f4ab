"""Decode shards of codes (Parquet, WebDataset, NumPy or safetensors) and say how each went.

    python examples/bulk_decode.py shards/ decoded/ --model path/to/weights

Run it again after an interruption: finished images are skipped.
`movq-ext decode` does the same from the command line, and spreads the shards over a cluster with Ray Data.
"""

import argparse
from pathlib import Path

from movq_ext.bulk.batches import Settings
from movq_ext.bulk.find import find_shards
from movq_ext.bulk.run import run_in_process
from movq_ext.demo import SMALL_MODEL_PATH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", type=Path, nargs="+", help="shards, and folders of shards")
    parser.add_argument("out", type=Path, help="folder for the images")
    parser.add_argument("--model", type=Path, default=SMALL_MODEL_PATH, help="weights; the shipped model by default")
    parser.add_argument("--max-memory", type=int, help="bytes for one decode; most of the free memory by default")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    shards = [shard for shard in find_shards(args.codes, args.out) if not shard.is_done()]
    settings = Settings(args.model, max_memory=args.max_memory)
    decoded = 0

    def show_progress(images: int) -> None:
        nonlocal decoded
        decoded += images
        print(f"\r{decoded} images", end="", flush=True)

    for report in run_in_process(shards, settings, show_progress):
        counts = f"decoded {report.decoded}, already there {report.present}, rejected {report.rejected}"
        print(f"\r{report.source}: {counts}", report.error)


if __name__ == "__main__":
    main()
