"""Hyperparameters of a training run, and the config of the shipped model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

#: Keyword arguments of MOVQ for the shipped model (8x downsampling, 4 latent channels, 3.1 million parameters).
SMALL_MODEL_CONFIG: dict[str, Any] = {
    "ddconfig": {
        "ch": 32,
        "out_ch": 3,
        "ch_mult": (1, 1, 2, 4),
        "num_res_blocks": 1,
        "attn_resolutions": (32,),
        "in_channels": 3,
        "resolution": 256,
        "z_channels": 4,
    },
    "n_embed": 16384,
    "embed_dim": 4,
}


def option(default: T, help: str) -> T:
    """Return a dataclass field. The command line shows its ``metadata["help"]``."""
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingConfig:
    """Hyperparameters of a run. A checkpoint resumes only under the config it was saved with, except that ``steps`` may grow.

    Args:
        steps: optimiser steps.
        batch_size: crops per step in each process.
        crop: height and width of a crop in pixels; a multiple of the model's downsampling factor.
        learning_rate: peak learning rate of AdamW; decays to zero along a half cosine.
        warmup_steps: steps of linear learning-rate warm-up.
        continuous_steps: steps before quantisation starts.
        restart_every: steps between restarts of unused codes.
        codebook_weight: weight of the codebook loss; the mean squared error has weight 1.
        ema_decay: EMA decay per step.
        amp: use bfloat16 autocast.
        seed: random seed.

    Raises:
        ValueError: a number is out of range.
    """

    steps: int = option(20_000, "optimiser steps")
    batch_size: int = option(8, "crops per step in each process")
    crop: int = option(128, "height and width of a crop in pixels; a multiple of the model's downsampling factor")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW; decays to zero along a half cosine")
    warmup_steps: int = option(100, "steps of linear learning-rate warm-up")
    continuous_steps: int = option(500, "steps before quantisation starts")
    restart_every: int = option(100, "steps between restarts of unused codes")
    codebook_weight: float = option(0.25, "weight of the codebook loss; the mean squared error has weight 1")
    ema_decay: float = option(0.999, "EMA decay per step")
    amp: bool = option(False, "use bfloat16 autocast")
    seed: int = option(0, "random seed")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "crop", "restart_every", "learning_rate"):
            if not getattr(self, name) > 0:  # also true of NaN
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "continuous_steps", "codebook_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
