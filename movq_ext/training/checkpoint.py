"""The checkpoint of a training run, and the lock on its folder."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..io.files import atomic_write, require_file, wrap_errors
from .config import TrainingConfig

CHECKPOINT_NAME = "training.pt"
KEYS = ("config", "model_config", "step", "processes", "model", "average", "optimizer", "usage", "adversary",
        "perceptual_network")  # fmt: skip


logger = logging.getLogger(__name__)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a training folder. Raises OSError if another process holds it."""
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is training in {folder}") from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("cannot lock %s (%s): do not let two processes train in it", folder, error.strerror)
        yield


def write_checkpoint(path: Path, config: TrainingConfig, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically. Raises OSError if it cannot be written, because the disk is full, say."""
    state = {"config": asdict(config), **state}
    with atomic_write(path) as partial:
        try:
            with open(partial, "wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # torch.save hides the file's error behind its own
            if isinstance(error.__context__, OSError):
                raise OSError(f"cannot write {path}: {error.__context__}") from error
            raise


def read_checkpoint(path: Path, device: torch.device | str) -> tuple[TrainingConfig, dict[str, Any]]:
    """Return the options of the run and the rest of its checkpoint. On the device "meta" tensors are not read.

    Raises FileNotFoundError, OSError if the file is unreadable, and ValueError if it is damaged or lacks an entry.
    """
    require_file(path)
    with wrap_errors(ValueError, f"{path} is damaged"):
        state = dict(torch.load(path, map_location=device, weights_only=True))
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: expected a checkpoint that movq-ext train wrote")
    with wrap_errors(ValueError, f"{path} has options of another version of movq_ext"):
        config = TrainingConfig(**state.pop("config"))
    return config, state


def require_same_model(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint's model has other arguments than the one that is to resume."""
    with wrap_errors(ValueError, f"{path} is damaged"):
        before, now = _flatten(saved), _flatten(own)
    if changed := [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]:
        listed = "; ".join(f"{name}={before.get(name)}, now {now.get(name)}" for name in changed)
        raise ValueError(f"{path} has a model with {listed}")


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return MOVQ's arguments and those of ddconfig in one dictionary. Tuples become lists, as in a JSON file."""
    plain = json.loads(json.dumps(config))
    return {**plain.pop("ddconfig"), **plain}
