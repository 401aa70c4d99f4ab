"""The log of a training run: a CSV file and, if it is installed, TensorBoard."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..io.files import atomic_write, name_in_errors

logger = logging.getLogger(__name__)

COLUMNS = ("step", "loss", "mse", "psnr", "codebook", "perceptual", "adversarial", "adversarial_weight", "discriminator",
           "learning_rate", "validation_psnr")  # fmt: skip


class TrainingLog:
    """Append rows to ``log.csv``, and the same values and the validation pictures to ``tensorboard/``.

    Args:
        folder: where both are.
        step: the step that the run starts from. Rows of later steps, which a killed run logged but did not save, are removed.

    Raises:
        OSError: folder is not writable.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "log.csv"
        rows = _read_rows(path, step) if path.exists() else []
        with atomic_write(path) as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self._file = open(path, "a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._tensorboard = _open_tensorboard(folder / "tensorboard", step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row. Columns without a value stay empty. Raises OSError if the disk is full."""
        with name_in_errors(self._file.name):
            self._writer.writerow({"step": step, **{name: f"{value:.6g}" for name, value in values.items()}})
            self._file.flush()  # so that the file can be tailed, and is complete if the run is killed
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def write_picture(self, step: int, picture: Image.Image) -> None:
        """Show a validation picture in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_image("validation", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered. Raises OSError if the disk is full."""
        with name_in_errors(self._file.name):
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _read_rows(path: Path, last_step: int) -> list[dict[str, str]]:
    """Return the complete rows up to a step. Columns of other versions are dropped."""
    with open(path, newline="", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]  # a last line without a newline was cut off
    complete = [row for row in csv.DictReader(lines) if None not in row.values()]
    rows = [row for row in complete if row.get("step", "").isdecimal() and int(row["step"]) <= last_step]
    return [{name: row.get(name, "") for name in COLUMNS} for row in rows]


def _open_tensorboard(folder: Path, step: int) -> Any:
    """Return a SummaryWriter, or None if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
