"""Options of a training run, and the config of the shipped model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..io.images import DEFAULT_MAX_PIXELS

MAX_SEED = 1 << 31  # the seeds of all steps then fit in 64 bits

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


class OptionError(ValueError):
    """An option is out of range.

    Args:
        option: the name of the field.
        problem: what was expected and what was given.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option} {problem}")
        self.option, self.problem = option, problem


def option(default: T, help: str, *, metavar: str = "N", may_change: bool = False) -> T:
    """Return a dataclass field. The command line shows ``help``; ``may_change`` if a resumed run may have another value."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "may_change": may_change})


@dataclass
class TrainingConfig:
    """Options of a run. They are saved in its checkpoint.

    A run resumes under the same options. perceptual_network (the same weights in another place), validation, log_every,
    save_every and checkpoint_activations may change, because they do not affect the weights. steps may change too, but it
    affects the weights: the learning rate reaches zero at the new last step, and restarts of unused codes stop at 90% of it.

    Args:
        steps: optimiser steps.
        batch_size: crops per step in each process.
        crop: height and width of a crop in pixels; a multiple of the model's downsampling factor.
        max_pixels: largest photograph, in pixels; larger ones are skipped and counted in the log.
        learning_rate: peak learning rate of AdamW; decays to zero along a half cosine.
        warmup_steps: steps of linear learning-rate warm-up.
        continuous_steps: steps before quantisation starts.
        keep_codebook: keep the model's codebook when quantisation starts, rather than fill it with latents.
        restart_every: steps between restarts of unused codes.
        codebook_weight: weight of the codebook loss; the mean squared error has weight 1.
        perceptual_network: files with VGG16's weights, for a perceptual loss; LPIPS's linear weights are used if given.
        perceptual_weight: weight of the perceptual loss.
        adversarial_weight: weight of the adversarial loss; 0 trains without a discriminator.
        adaptive_weight: multiply adversarial_weight by the ratio of the other losses' gradient to the adversarial one's.
        adversarial_start: steps before the discriminator and the adversarial loss start.
        discriminator_layers: strided convolutions of the discriminator; each doubles the size of its patches.
        discriminator_channels: channels of the discriminator's first convolution.
        ema_decay: EMA decay per step.
        amp: use bfloat16 autocast.
        seed: random seed.
        validation: folder of photographs for validation; the shipped ones if empty.
        log_every: steps between rows of the log.
        save_every: steps between checkpoints and validations.
        checkpoint_activations: recompute activations in the backward pass: less memory, more time.

    Raises:
        OptionError: a number is out of range. This is a ValueError.
    """

    steps: int = option(20_000, "optimiser steps", may_change=True)
    batch_size: int = option(8, "crops per step in each process")
    crop: int = option(128, "height and width of a crop in pixels; a multiple of the model's downsampling factor")
    max_pixels: int = option(DEFAULT_MAX_PIXELS, "largest photograph, in pixels; larger ones are skipped and counted in the log")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW; decays to zero along a half cosine")
    warmup_steps: int = option(100, "steps of linear learning-rate warm-up")
    continuous_steps: int = option(500, "steps before quantisation starts")
    keep_codebook: bool = option(False, "keep the model's codebook when quantisation starts, rather than fill it with latents")
    restart_every: int = option(100, "steps between restarts of unused codes")
    codebook_weight: float = option(0.25, "weight of the codebook loss; the mean squared error has weight 1")
    perceptual_network: tuple[str, ...] = option(
        (), "files with VGG16's weights, for a perceptual loss; LPIPS's linear weights are used if given",
        metavar="FILE", may_change=True,
    )  # fmt: skip
    perceptual_weight: float = option(0.1, "weight of the perceptual loss")
    adversarial_weight: float = option(0.0, "weight of the adversarial loss; 0 trains without a discriminator")
    adaptive_weight: bool = option(
        False, "multiply adversarial_weight by the ratio of the other losses' gradient to the adversarial one's"
    )
    adversarial_start: int = option(2000, "steps before the discriminator and the adversarial loss start")
    discriminator_layers: int = option(3, "strided convolutions of the discriminator; each doubles the size of its patches")
    discriminator_channels: int = option(64, "channels of the discriminator's first convolution")
    ema_decay: float = option(0.999, "EMA decay per step")
    amp: bool = option(False, "use bfloat16 autocast")
    seed: int = option(0, "random seed")
    validation: str = option(
        "", "folder of photographs for validation; the shipped ones if empty", metavar="FOLDER", may_change=True
    )
    log_every: int = option(10, "steps between rows of the log", may_change=True)
    save_every: int = option(500, "steps between checkpoints and validations", may_change=True)
    checkpoint_activations: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", may_change=True
    )

    def __post_init__(self) -> None:
        # A checkpoint with a Path in it cannot be read with weights_only=True.
        self.perceptual_network = tuple(map(str, self.perceptual_network))
        if self.validation is not None:
            self.validation = str(self.validation)
        positive = ("steps", "batch_size", "crop", "max_pixels", "restart_every", "learning_rate", "log_every", "save_every",
                    "discriminator_layers", "discriminator_channels")  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:  # also true of NaN
                raise OptionError(name, f"must be positive, got {getattr(self, name)}")
        not_negative = ("warmup_steps", "continuous_steps", "codebook_weight", "perceptual_weight", "adversarial_weight",
                        "adversarial_start")  # fmt: skip
        for name in not_negative:
            if not getattr(self, name) >= 0:
                raise OptionError(name, f"must not be negative, got {getattr(self, name)}")
        if abs(self.seed) > MAX_SEED:
            raise OptionError("seed", f"must be between {-MAX_SEED} and {MAX_SEED}, got {self.seed}")
        if not 0 <= self.ema_decay < 1:
            raise OptionError("ema_decay", f"must be in [0, 1), got {self.ema_decay}")
        if self.adversarial_weight and self.adversarial_start >= self.steps:
            raise OptionError("adversarial_start", f"must be less than steps ({self.steps}), got {self.adversarial_start}")


def changed_options(saved: TrainingConfig, given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (saved, given) value of every option in ``given`` that differs and that a resumed run must not change."""
    fixed = [field.name for field in fields(saved) if not field.metadata["may_change"] and field.name in given]
    return {name: (getattr(saved, name), given[name]) for name in fixed if given[name] != getattr(saved, name)}
