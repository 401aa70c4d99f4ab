"""Argument checks. Each error names the argument, what was expected and what was given."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

MAX_CHANNELS = 1 << 16  # more is a mistake: one 3x3 convolution of so many has 154 GB of weights in float32
MAX_CODES = 2**31 - 1  # code files hold int32
MAX_NUMBER = sys.float_info.max


def check_groups(channels: int, groups: int | None) -> None:
    """A group norm's groups must divide its channels."""
    if groups is None or groups < 1:
        raise ValueError(f"num_groups must be a positive integer, got {groups}")
    if channels % groups:
        raise ValueError(f"channels must be divisible by the {groups} groups of the norm, got {channels} channels")


def check_levels(ch_mult: Sequence[int], num_res_blocks: int) -> None:
    """There must be at least one level, each with channels, and a non-negative number of blocks."""
    if not _is_sequence(ch_mult) or not ch_mult or not all(_is_integer(multiplier, 1) for multiplier in ch_mult):
        raise ValueError(f"ch_mult must be a non-empty sequence of positive integers, got {ch_mult!r}")
    if not _is_integer(num_res_blocks):
        raise ValueError(f"num_res_blocks must be an integer, got {num_res_blocks!r}")
    if num_res_blocks < 0:
        raise ValueError(f"num_res_blocks must not be negative, got {num_res_blocks}")


def check_level_channels(ch: int, ch_mult: Sequence[int], groups: int) -> None:
    """Every level's channels must be divisible by the norm's groups and not exceed MAX_CHANNELS."""
    for channels in (ch * multiplier for multiplier in ch_mult):
        given = f"got {channels} channels (ch={ch}, ch_mult={ch_mult!r})"
        if channels % groups:
            raise ValueError(f"ch: channels must be divisible by the {groups} groups of the norm, {given}")
        if channels > MAX_CHANNELS:
            raise ValueError(f"ch * ch_mult must be at most {MAX_CHANNELS}, {given}")


def check_attention_levels(resolution: int, attn_resolutions: Sequence[int]) -> None:
    """The image's size must be positive, and the sizes with attention a sequence of integers."""
    check_positive(resolution=resolution)
    if not _is_sequence(attn_resolutions) or not all(_is_integer(size, 0) for size in attn_resolutions):
        raise ValueError(f"attn_resolutions must be a sequence of non-negative integers, got {attn_resolutions!r}")


def check_positive(**sizes: int) -> None:
    """Every size must be a positive integer."""
    for name, size in sizes.items():
        if not _is_integer(size, 1):
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def check_channels(**sizes: int) -> None:
    """Every number of channels must be a positive integer of at most MAX_CHANNELS."""
    check_positive(**sizes)
    for name, size in sizes.items():
        if size > MAX_CHANNELS:
            raise ValueError(f"{name} must be at most {MAX_CHANNELS}, got {size}")


def check_count(name: str, count: int, limit: int = MAX_CODES) -> None:
    """The count must be an integer from 0 to limit."""
    if not _is_integer(count, 0) or count > limit:
        raise ValueError(f"{name} must be an integer from 0 to {limit}, got {count!r}")


def check_flags(**flags: bool) -> None:
    """Every flag must be True or False; 1 and 0 count as such."""
    for name, flag in flags.items():
        if not isinstance(flag, (Real, np.bool_)) or flag not in (0, 1):
            raise ValueError(f"{name} must be True or False, got {flag!r}")


def check_number(name: str, value: float, low: float, high: float) -> None:
    """The value must be a number from low to high."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:  # also true of NaN
        limits = f"at least {low} and finite" if high == MAX_NUMBER else f"from {low} to {high}"
        raise ValueError(f"{name} must be a number {limits}, got {value!r}")


def _is_integer(value: object, low: int | None = None) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and (low is None or int(value) >= low)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


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
    first, *others = tensors.values()
    for other in others:
        if other.shape[0] != first.shape[0]:
            sizes = ", ".join(f"{name} has {x.shape[0]}" for name, x in tensors.items())
            raise ValueError(f"{' and '.join(tensors)} must have the same batch size: {sizes}")
