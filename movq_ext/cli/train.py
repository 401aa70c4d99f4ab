"""``movq-ext train``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from .. import MOVQ, from_pretrained
from ..io.files import read_json, require_file, wrap_errors
from ..io.tensor_files import CheckpointError
from ..training import SMALL_MODEL_CONFIG, Trainer, TrainingConfig
from ..training.checkpoint import CHECKPOINT_NAME, read_checkpoint, require_same_model
from ..training.config import OptionError, changed_options
from .common import add_device, add_threads, raise_pillow_limit, set_threads
from .interruption import CONTINUE, Interruption

SUMMARY = "Train a model. Run it again with the same --out to resume from the last checkpoint."
OPTIONS = fields(TrainingConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="photographs; subfolders are searched too")
    parser.add_argument("-o", "--out", type=Path, default=Path("training"),
                        help="folder for the checkpoint, the model, the log and validation pictures; a run that is already there "
                        "resumes with its own options (default: %(default)s)")  # fmt: skip
    parser.add_argument("--init", type=Path, metavar="MODEL",
                        help="start from weights that from_pretrained reads, rather than random ones; their codebook is kept and "
                        "quantisation starts at once, unless --continuous-steps is given")  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="JSON", help="file with MOVQ's arguments (default: the shipped model's)")
    for option in OPTIONS:
        # None stands for an option that is not given: a new run takes the default, a resumed one its own.
        add_option(parser, option)
    add_threads(parser)
    add_device(parser)


def add_option(parser: argparse.ArgumentParser, option: Field[Any]) -> None:
    """Add the flag of a field of TrainingConfig."""
    help_text, metavar = option.metadata["help"], option.metadata["metavar"]
    if isinstance(option.default, bool):
        parser.add_argument(flag(option.name), action="store_true", default=None, help=help_text)
    elif isinstance(option.default, tuple):
        parser.add_argument(flag(option.name), nargs="+", type=existing_path, metavar=metavar, help=help_text)
    elif isinstance(option.default, str):
        parser.add_argument(flag(option.name), type=existing_path, metavar=metavar, help=help_text)
    else:
        parser.add_argument(flag(option.name), type=type(option.default), metavar=metavar,
                            help=f"{help_text} (default: {option.default})")  # fmt: skip


def flag(name: str) -> str:
    """Return the flag of a field of TrainingConfig."""
    return "--" + name.replace("_", "-")


def existing_path(text: str) -> str:
    """Return an absolute path, so that a run can be resumed from another folder."""
    path = Path(text).absolute()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"no such file or folder: {text}")
    return str(path)


def run(args: argparse.Namespace) -> int:
    set_threads(args)
    is_first_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_first_process else logging.ERROR, format="%(message)s")
    if "RANK" in os.environ:  # started by torchrun
        on_gpu = args.device.startswith("cuda")
        if on_gpu:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        return train(args, is_first_process)  # frees the trainer: DDP's reducer must not outlive the process group
    except OptionError as error:
        raise ValueError(f"{flag(error.option)} {error.problem}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def train(args: argparse.Namespace, is_first_process: bool) -> int:
    """Train until the last step or an interruption, and return the exit status."""
    with logging_redirect_tqdm(), Interruption("stopping after this step; interrupt again to stop at once") as interruption:
        trainer = create_trainer(args)
        first_step = trainer.step
        try:
            trainer.run(interruption.requested)
        except KeyboardInterrupt as error:  # the second one
            saved = trainer.checkpoint.exists()
            problem = f"not saved; {CONTINUE} from the last checkpoint" if saved else "nothing is saved yet"
            raise KeyboardInterrupt(problem) from error
    if trainer.step < trainer.config.steps:  # interrupted
        if is_first_process:
            print(f"interrupted and saved at step {trainer.step}; {CONTINUE}", file=sys.stderr)
        return 128 + (interruption.signal_number or signal.SIGTERM)  # as shells report it; 0 if another process got the signal
    if is_first_process:
        print_result(trainer, first_step)
    return 0


def print_result(trainer: Trainer, first_step: int) -> None:
    """Say what was trained and where it is."""
    out, steps = trainer.out, trainer.config.steps
    if first_step >= steps:
        print(f"nothing to do: already trained for {first_step} steps; --steps can be raised")
    print(f"losses: {out / 'log.csv'}; validation pictures: {out / 'validation'}")
    print(f"model after {trainer.step} steps: {out / 'model'}")


def create_trainer(args: argparse.Namespace) -> Trainer:
    """Return a Trainer that has resumed from the checkpoint, if there is one."""
    given = {option.name: value for option in OPTIONS if (value := getattr(args, option.name)) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    device, checkpoint = torch.device(args.device), args.out / CHECKPOINT_NAME
    if not checkpoint.exists():
        if args.init is not None and "continuous_steps" not in given:
            given |= {"continuous_steps": 0, "keep_codebook": True}
        config = TrainingConfig(**given)
        raise_pillow_limit(config.max_pixels)
        torch.manual_seed(config.seed)  # every process starts from the same weights
        return Trainer(create_model(args.config, args.init), args.folder, args.out, config, device)
    if args.init is not None:
        logging.info("--init is not used: %s has the run's own weights", checkpoint)
    config, state = read_checkpoint(checkpoint, "meta")
    raise_pillow_limit(config.max_pixels)
    require_same_options(checkpoint, config, given)
    if args.config is not None:
        require_same_model(checkpoint, state["model_config"], create_model(args.config, None).config)
    with wrap_errors(ValueError, f"{checkpoint} is damaged"):
        model = MOVQ(**state["model_config"])
    trainer = Trainer(model, args.folder, args.out, replace(config, **given), device)
    trainer.resume()
    return trainer


def require_same_options(checkpoint: Path, config: TrainingConfig, given: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the flags, if one that was given would change the steps of a run."""
    if changes := changed_options(config, given):
        listed = "; ".join(f"{flag(name)}: was {show(old)}, now {show(new)}" for name, (old, new) in changes.items())
        raise ValueError(f"{checkpoint} was saved with other options ({listed}); leave out these flags, or choose another --out")


def show(value: Any) -> str:
    """Format the value of an option."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def create_model(config: Path | None, weights: Path | None) -> MOVQ:
    """Create a model from weights, or with random weights from a JSON file of MOVQ's arguments or the shipped model's config.

    Weights without arguments of their own (original checkpoints) take them from the JSON file.
    """
    if config is None:
        return MOVQ(**SMALL_MODEL_CONFIG) if weights is None else from_pretrained(weights)
    require_file(config)
    with wrap_errors(CheckpointError, f"expected {config} to hold MOVQ's arguments (ddconfig, n_embed, embed_dim)"):
        arguments = read_json(config)
        if weights is None:
            return MOVQ(**arguments)
    return from_pretrained(weights, config=arguments)
