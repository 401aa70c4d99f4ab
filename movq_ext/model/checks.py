"""Argument checks. Each error names the argument, what was expected and what was given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_groups(channels: int, groups: int | None) -> None:
    """A group norm's groups must divide its channels."""
    if groups is None or groups < 1:
        raise ValueError(f"num_groups must be a positive integer, got {groups}")
    if channels % groups:
        raise ValueError(f"channels must be divisible by the {groups} groups of the norm, got {channels} channels")


def check_levels(ch_mult: Sequence[int], num_res_blocks: int) -> None:
    """There must be at least one level, each with channels, and a non-negative number of blocks."""
    if not ch_mult or min(ch_mult) < 1:
        raise ValueError(f"ch_mult must be a non-empty sequence of positive integers, got {ch_mult!r}")
    if num_res_blocks < 0:
        raise ValueError(f"num_res_blocks must not be negative, got {num_res_blocks}")


def check_positive(**sizes: int) -> None:
    """Every size must be a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def check_latent(name: str, x: Tensor | None, channels: int, weight: Tensor | None) -> None:
    """x must be a non-empty ``(B, channels, h, w)`` tensor on weight's device, in weight's dtype unless autocast is on.

    If weight is None, device and dtype are not checked.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} must have shape (batch, {channels}, height, width), got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    if weight is None:
        return
    if x.device != weight.device:
        raise ValueError(f"{name} must be on the model's device {weight.device}, got {x.device}")
    if x.dtype != weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"{name} must have the model's dtype {weight.dtype}, got {x.dtype}")


def check_batch(**tensors: Tensor) -> None:
    """All tensors must have the same batch size."""
    first, *others = (x.shape[0] for x in tensors.values())
    if any(batch != first for batch in others):
        sizes = ", ".join(f"{name} has {x.shape[0]}" for name, x in tensors.items())
        raise ValueError(f"{' and '.join(tensors)} must have the same batch size: {sizes}")
