"""Which encoders and decoders can run in strips."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, Self

from torch import nn

from .fusion import is_plain_group_norm, is_unmodified
from .layers import AttnBlock, Downsample, ResnetBlock, Upsample
from .norms import GroupNorm, SpatialNorm, is_plain_norm

CONV3X3_NAMES = ("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "conv")
NORM_NAMES = ("norm", "norm1", "norm2", "norm_out")


class LayeredNetwork(Protocol):
    """What running in strips requires of a network. `Encoder` and `MOVQDecoder` satisfy it."""

    conv_in: nn.Conv2d
    norm_out: GroupNorm | SpatialNorm
    conv_out: nn.Conv2d

    def layers(self) -> Iterable[nn.Module]:
        """Yield the layers between conv_in and norm_out, in execution order."""
        ...

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]: ...


class LayeredDecoder(LayeredNetwork, Protocol):
    """What decoding in strips requires of a decoder."""

    give_pre_end: bool

    def float(self) -> Self: ...


def check_encoder_layers(encoder: LayeredNetwork) -> None:
    """Raise TypeError unless every layer of the encoder can run in strips."""
    _check_layers("encoder", encoder, (ResnetBlock, AttnBlock, Downsample))


def check_decoder_layers(decoder: LayeredNetwork) -> None:
    """Raise TypeError unless every layer of the decoder can run in strips."""
    _check_layers("decoder", decoder, (ResnetBlock, AttnBlock, Upsample))


def _check_layers(role: str, network: LayeredNetwork, classes: tuple[type[nn.Module], ...]) -> None:
    """Layers must be of these classes, norms group norms, and every 3x3 convolution an ``nn.Conv2d`` padded with zeros."""
    for layer in network.layers():
        if not isinstance(layer, classes):
            *most, last = (allowed.__name__ for allowed in classes)
            raise TypeError(f"{role}'s layers must be {', '.join(most)} or {last}, got {type(layer).__name__}")
    for name, module in network.named_modules():
        where = name or f"the {role}"
        for child_name, child in module.named_children():
            if child_name in CONV3X3_NAMES and not _is_zero_padded_conv3x3(child, halves=isinstance(module, Downsample)):
                raise TypeError(f"{role}'s convolutions must be 3x3 nn.Conv2d padded with zeros, got {child} in {where}")
            if child_name in NORM_NAMES and not (
                is_unmodified(child) if isinstance(child, SpatialNorm) else is_plain_norm(child)
            ):
                raise TypeError(f"{role}'s norms must be unmodified GroupNorm or SpatialNorm, got {child} in {where}")
        if isinstance(module, SpatialNorm) and not is_plain_group_norm(module.norm_layer):
            raise TypeError(f"{role}'s norms must be unmodified nn.GroupNorm, got {module.norm_layer} in {name}")


def has_thread_safe_layers(network: LayeredNetwork) -> bool:
    """True if all layers are PyTorch's or this package's, without hooks or patches, which may not run in two threads at once."""
    return all(
        type(module).__module__.split(".")[0] in ("torch", "movq_ext")
        and is_unmodified(module)
        and not any(map(callable, vars(module).values()))
        for name, module in network.named_modules()
        if name
    )


def check_no_dropout(role: str, network: nn.Module) -> None:
    """Raise ValueError if the network would apply dropout. role is its name in the message."""
    if network.training and any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules()):
        raise ValueError(f"{role} must be in evaluation mode: call {role}.eval() first")


def _is_zero_padded_conv3x3(conv: nn.Module, halves: bool) -> bool:
    """True for a 3x3 convolution that keeps the map's size, or one of stride 2 whose layer pads if ``halves``."""
    if not isinstance(conv, nn.Conv2d):
        return False
    stride, padding = ((2, 2), (0, 0)) if halves else ((1, 1), (1, 1))
    return (conv.kernel_size, conv.stride, conv.padding, conv.padding_mode) == ((3, 3), stride, padding, "zeros")
