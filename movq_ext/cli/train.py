"""``movq-ext train``."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import fields
from pathlib import Path

import torch

from .. import MOVQ
from ..io.files import read_json, require_file, wrap_errors
from ..io.tensor_files import CheckpointError
from ..training import SMALL_MODEL_CONFIG, Trainer, TrainingConfig
from .common import add_device, add_threads, set_threads

SUMMARY = "Train a model. Run the same command again to resume from the last checkpoint."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="photographs; subfolders are searched too")
    parser.add_argument("-o", "--out", type=Path, default=Path("training"),
                        help="folder for the checkpoint and the model (default: %(default)s)")  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="JSON", help="file with MOVQ's arguments (default: the shipped model's)")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS",
                        help="steps between checkpoints (default: %(default)s)")  # fmt: skip
    parser.add_argument("--checkpoint-activations", action="store_true",
                        help="use less memory and more time: recompute activations in the backward pass")  # fmt: skip
    for field in fields(TrainingConfig):
        flag, help_text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", help=help_text)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, metavar="N",
                                help=f"{help_text} (default: %(default)s)")  # fmt: skip
    add_threads(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    set_threads(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if "RANK" in os.environ:  # started by torchrun
        on_gpu = args.device.startswith("cuda")
        if on_gpu:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        config = TrainingConfig(**{field.name: getattr(args, field.name) for field in fields(TrainingConfig)})
        torch.manual_seed(config.seed)  # every process starts from the same weights
        device = torch.device(args.device)
        trainer = Trainer(create_model(args.config), args.folder, args.out, config, device, args.checkpoint_activations)
        if trainer.checkpoint.exists():
            trainer.resume()
        trainer.run(args.save_every)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def create_model(config: Path | None) -> MOVQ:
    """Create a model with random weights, from a JSON file of MOVQ's arguments or the shipped model's config."""
    if config is None:
        return MOVQ(**SMALL_MODEL_CONFIG)
    require_file(config)
    with wrap_errors(CheckpointError, f"expected {config} to hold MOVQ's arguments (ddconfig, n_embed, embed_dim)"):
        return MOVQ(**read_json(config))
