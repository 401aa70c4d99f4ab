"""Which decoders can run in strips."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, Self

from torch import nn

from .fusion import is_plain_group_norm
from .layers import AttnBlock, ResnetBlock, Upsample
from .norms import GroupNorm, SpatialNorm

CONV3X3_NAMES = ("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "conv")


class Step(Protocol):
    """One layer of a decoder."""

    @property
    def layer(self) -> nn.Module: ...


class LayeredDecoder(Protocol):
    """What decoding in strips requires of a decoder. `MOVQDecoder` satisfies it."""

    conv_in: nn.Conv2d
    norm_out: GroupNorm | SpatialNorm
    conv_out: nn.Conv2d
    give_pre_end: bool

    def steps(self) -> Iterable[Step]:
        """Yield the layers between conv_in and norm_out, in execution order."""
        ...

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]: ...

    def float(self) -> Self: ...


def check_layers(decoder: LayeredDecoder) -> None:
    """Raise TypeError unless every layer is of a known class and every 3x3 convolution is an ``nn.Conv2d`` padded with zeros."""
    for step in decoder.steps():
        if not isinstance(step.layer, (ResnetBlock, AttnBlock, Upsample)):
            raise TypeError(f"decoder's layers must be ResnetBlock, AttnBlock or Upsample, got {type(step.layer).__name__}")
    for name, module in decoder.named_modules():
        for child_name, child in module.named_children():
            if child_name in CONV3X3_NAMES and not _is_zero_padded_conv3x3(child):
                where = name or "the decoder"
                raise TypeError(f"decoder's convolutions must be 3x3 nn.Conv2d padded with zeros, got {child} in {where}")
        if isinstance(module, SpatialNorm) and not is_plain_group_norm(module.norm_layer):
            raise TypeError(f"decoder's norms must be unmodified nn.GroupNorm, got {module.norm_layer} in {name}")


def check_no_dropout(decoder: nn.Module) -> None:
    """Raise ValueError if the decoder would apply dropout."""
    if decoder.training and any(isinstance(module, nn.Dropout) and module.p > 0 for module in decoder.modules()):
        raise ValueError("decoder must be in evaluation mode: call decoder.eval() first")


def _is_zero_padded_conv3x3(conv: nn.Module) -> bool:
    if not isinstance(conv, nn.Conv2d):
        return False
    return (conv.kernel_size, conv.stride, conv.padding, conv.padding_mode) == ((3, 3), (1, 1), (1, 1), "zeros")
