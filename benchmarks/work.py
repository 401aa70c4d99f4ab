"""Operations and memory traffic of the published decoder by kind of layer, counted on meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from published_decoder import published
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import movq_ext

NORM_OPERATIONS = 12  # per element: mean 1, variance 2, normalise 2, weight and bias 2, y and b 2, SiLU 3
Work = dict[str, dict[str, int]]


def work(decoder: movq_ext.MOVQDecoder, size: int) -> Work:
    """Count ``operations`` and ``elements`` for an image of ``size`` by ``size``, by kind: "convolution", "attention" and "norm".

    Elements are what a layer must read and write if nothing stays on chip between layers: input, output and weights. A norm reads
    its map twice and writes it once; the latent's maps do not count. Attention includes its 1x1 convolutions, while conv_y and
    conv_b count as convolutions. The decoder is moved to the meta device.
    """
    found = {kind: {"operations": 0, "elements": 0} for kind in ("convolution", "attention", "norm")}
    decoder = published(decoder.to("meta"))
    for name, module in decoder.named_modules():
        if isinstance(module, movq_ext.SpatialNorm):
            module.register_forward_hook(_norm(found["norm"]))
        elif isinstance(module, nn.Conv2d):
            in_attention = name.rpartition(".")[2] in ("q", "k", "v", "proj_out")
            is_modulation = name.rpartition(".")[2] in ("conv_y", "conv_b")
            module.register_forward_hook(_convolution(found["attention" if in_attention else "convolution"], not is_modulation))
        elif isinstance(module, movq_ext.AttnBlock):
            module.register_forward_hook(_attention(found["attention"]))
    z = torch.empty(1, decoder.z_channels, size // 8, size // 8, device="meta")
    with FlopCounterMode(display=False) as flops:
        decoder(z, z)
    counted = sum(found[kind]["operations"] for kind in ("convolution", "attention"))
    assert counted == flops.get_total_flops(), (counted, flops.get_total_flops())
    return found


def _norm(kind: dict[str, int]) -> Any:
    def count(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        kind["operations"] += NORM_OPERATIONS * out.numel()
        kind["elements"] += 3 * out.numel()

    return count


def _convolution(kind: dict[str, int], counts_elements: bool) -> Any:
    def count(module: nn.Conv2d, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        kind["operations"] += 2 * out.numel() * module.weight[0].numel()
        kind["elements"] += counts_elements * (inputs[0].numel() + out.numel() + module.weight.numel())

    return count


def _attention(kind: dict[str, int]) -> Any:
    def count(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        kind["operations"] += 4 * out.shape[2] ** 2 * out.shape[3] ** 2 * out.shape[1]
        kind["elements"] += 4 * out.numel()

    return count
