"""What the published decoder has to compute and to move, by kind of layer: counted, on tensors without data."""

from __future__ import annotations

from typing import Any

import torch
from published_decoder import published
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import movq_ext

NORM_OPERATIONS = 12  # an element: mean 1, variance 2, normalise 2, weight and bias 2, y and b 2, SiLU 3
Work = dict[str, dict[str, int]]


def work(decoder: movq_ext.MOVQDecoder, size: int) -> Work:
    """``operations`` and ``elements`` of an image of ``size`` by ``size``, by kind: "convolution", "attention" and "norm".

    Elements are those that a layer must read and write, if no layer keeps anything for the next: input, output and weights; of a
    norm its map twice and once, without the latent's. Attention has its 1x1 convolutions; conv_y and conv_b are convolutions.
    The decoder goes to the meta device.
    """
    found = {kind: {"operations": 0, "elements": 0} for kind in ("convolution", "attention", "norm")}
    decoder = published(decoder.to("meta"))
    for name, module in decoder.named_modules():
        if isinstance(module, movq_ext.SpatialNorm):
            module.register_forward_hook(_norm(found["norm"]))
        elif isinstance(module, nn.Conv2d):
            in_attention = name.rpartition(".")[2] in ("q", "k", "v", "proj_out")
            modulates = name.rpartition(".")[2] in ("conv_y", "conv_b")
            module.register_forward_hook(_convolution(found["attention" if in_attention else "convolution"], not modulates))
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


def _convolution(kind: dict[str, int], moves: bool) -> Any:
    def count(module: nn.Conv2d, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        kind["operations"] += 2 * out.numel() * module.weight[0].numel()
        kind["elements"] += moves * (inputs[0].numel() + out.numel() + module.weight.numel())

    return count


def _attention(kind: dict[str, int]) -> Any:
    def count(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        kind["operations"] += 4 * out.shape[2] ** 2 * out.shape[3] ** 2 * out.shape[1]
        kind["elements"] += 4 * out.numel()

    return count
