"""Train a MoVQ autoencoder on a folder of photographs."""

from .config import SMALL_MODEL_CONFIG, OptionError, TrainingConfig
from .losses import StepLosses
from .photographs import Photographs
from .trainer import Trainer

__all__ = ["SMALL_MODEL_CONFIG", "OptionError", "Photographs", "StepLosses", "Trainer", "TrainingConfig"]
