"""The published formulas in plain tensor arithmetic: the reference for every test."""

import math

import torch
from torch import Tensor


def nearest_index(out_size: int, in_size: int) -> Tensor:
    """Return the source index of each position of a nearest resize: torch's ``floor(dst * (in / out))`` in float32."""
    scale = torch.tensor(in_size, dtype=torch.float32) / torch.tensor(out_size, dtype=torch.float32)
    return (torch.arange(out_size, dtype=torch.float32) * scale).floor().long().clamp(max=in_size - 1)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    return x[:, :, nearest_index(height, x.shape[2])][:, :, :, nearest_index(width, x.shape[3])]


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    batch, channels = x.shape[:2]
    grouped = x.reshape(batch, groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    out = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    if weight is not None:
        out = out * weight.view(1, channels, 1, 1)
    return out if bias is None else out + bias.view(1, channels, 1, 1)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x) + bias.view(1, -1, 1, 1)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def spatial_norm(f, zq_y, zq_b, weight, bias, groups, eps=1e-6, activation=None) -> Tensor:
    out = group_norm(f, groups, weight, bias, eps)
    if zq_y is not None:
        out = out * resize(zq_y, *f.shape[2:]) + resize(zq_b, *f.shape[2:])
    return silu(out) if activation == "silu" else out


def spatial_norm_layer(state: dict[str, Tensor], f: Tensor, zq: Tensor, groups: int = 32, eps: float = 1e-6) -> Tensor:
    """SpatialNorm in its published order: resize first, then convolve at f's size."""
    zq = resize(zq, *f.shape[2:])
    norm_f = group_norm(f, groups, state["norm_layer.weight"], state["norm_layer.bias"], eps)
    return norm_f * conv1x1(zq, state["conv_y.weight"], state["conv_y.bias"]) + conv1x1(
        zq, state["conv_b.weight"], state["conv_b.bias"]
    )


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q_, k_, v_ = (x.flatten(2) for x in (q, k, v))
    scores = torch.einsum("bci,bcj->bij", q_, k_) * (1 / math.sqrt(q.shape[1]) if scale is None else scale)
    weights = torch.exp(scores - scores.amax(2, keepdim=True))
    return torch.einsum("bij,bcj->bci", weights / weights.sum(2, keepdim=True), v_).view(q.shape)
