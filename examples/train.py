"""Train a small MoVQ model on a folder of photographs, from Python.

    python examples/train.py photos/ training/ --steps 20000
    torchrun --nproc-per-node 2 examples/train.py photos/ training/     # data parallel

Run it again with the same arguments to resume from the last checkpoint. `movq-ext train` does the same from the command line.
"""

import argparse
import os
from pathlib import Path

import torch

import movq_ext
from movq_ext.training import SMALL_MODEL_CONFIG, Trainer, TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photographs")
    parser.add_argument("out", type=Path, help="folder for the checkpoint and the averaged model")
    parser.add_argument("--steps", type=int, default=20_000, help="optimiser steps (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="crops for each step and process (%(default)s)")
    parser.add_argument("--crop", type=int, default=128, help="height and width of a crop in pixels (%(default)s)")
    args = parser.parse_args()

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if "RANK" in os.environ:  # started by torchrun
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)  # every process must start from the same weights
    model = movq_ext.MOVQ(**SMALL_MODEL_CONFIG)
    config = TrainingConfig(steps=args.steps, batch_size=args.batch_size, crop=args.crop)
    trainer = Trainer(model, args.photos, args.out, config, device)
    if trainer.checkpoint.exists():
        trainer.resume()
    trainer.run()
    print(f"trained to step {trainer.step}; load it with movq_ext.from_pretrained({str(args.out / 'model')!r})")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
