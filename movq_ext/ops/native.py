"""The operators on PyTorch's own: on every device and in every dtype, differentiable any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def spatial_norm(
    f: Tensor,
    zq_y: Tensor | None,
    zq_b: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    f_bias: Tensor | None = None,
    bordered: bool = False,
) -> Tensor:
    if bordered and zq_y is not None and zq_b is not None:
        zq_y, zq_b = (spread_borders(x, f) for x in (zq_y, zq_b))
    if f_bias is not None:
        f = f + f_bias.to(f.dtype)[:, None, None]
    # torch.group_norm rather than F.group_norm: the latter refuses a single value per group, which has an answer.
    out = torch.group_norm(_centred(f, groups), groups, weight, bias, eps, torch.backends.cudnn.enabled)
    inputs = [x for x in (f, zq_y, zq_b, weight, bias) if x is not None]
    in_place = is_inference(*inputs) and all(x.dtype == out.dtype for x in (out, *inputs[: 3 if zq_y is not None else 1]))
    if zq_y is not None and zq_b is not None:
        out = _modulate(out, zq_y, zq_b, in_place)
    out = F.silu(out, inplace=in_place) if activation == "silu" else out
    return out.to(f.dtype)  # under autocast it was computed in float32


def _centred(f: Tensor, groups: int) -> Tensor:
    """f, less its groups' means where torch computes variances as E[x^2] - E[x]^2: in channels_last on a CPU. Both have
    the same norm and gradient: to these a group's mean is a constant."""
    if forward_ad._current_level >= 0:  # torch's formula for forward mode takes views of it
        return f.contiguous()
    if f.device.type != "cpu" or f.is_contiguous() or f.itemsize < 4 or torch.compiler.is_compiling():
        return f
    with torch.no_grad():
        means: Tensor = f.mean((2, 3)).unflatten(1, (groups, -1)).mean(2).repeat_interleave(f.shape[1] // groups, dim=1)
    return f - means[:, :, None, None]


def add_bias_residual_(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if residual is not None:
        x.add_(residual)  # first, since it may be x itself
    if bias is not None:
        x.add_(bias[:, None, None])
    return x


def is_inference(*tensors: Tensor) -> bool:
    """Whether what was just computed from these plain tensors may be overwritten: nothing records it, eager operators run."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return False
    if forward_ad._current_level >= 0:
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors) and not torch._C._are_functorch_transforms_active()


def _modulate(x: Tensor, y: Tensor, b: Tensor, in_place: bool) -> Tensor:
    """``x * up(y) + up(b)`` with y and b resized to x's grid by torch's nearest rule."""
    if not torch.compiler.is_compiling() and all(
        is_whole_ratio(small, large) for small, large in zip(y.shape[2:], x.shape[2:], strict=True)
    ):
        return scale_by_cells(x, y, b, out=x if in_place else None)
    y, b = (F.interpolate(map_, size=x.shape[2:], mode="nearest") for map_ in (y, b))
    return torch.addcmul(b, x, y, out=x) if in_place else x * y + b


def is_bordered(zq: Tensor, f: Tensor) -> bool:
    """Whether zq has three rows and columns for each cell of two or more of f's."""
    return all(
        small % 3 == 0 and large % (small // 3) == 0 and large // (small // 3) > 1
        for small, large in zip(zq.shape[2:], f.shape[2:], strict=True)
    )


def spread_borders(zq: Tensor, f: Tensor) -> Tensor:
    """A bordered zq on f's grid: of each cell's three rows the first, the second as often as needed, the third; and columns."""
    for dim in (2, 3):
        cell = f.shape[dim] // (zq.shape[dim] // 3)
        place = torch.arange(f.shape[dim], device=zq.device)
        within = place % cell
        zq = zq.index_select(dim, place // cell * 3 + 1 - (within == 0).long() + (within == cell - 1).long())
    return zq


def is_whole_ratio(small: int, large: int) -> bool:
    """Whether each of `small` cells covers as many of `large`, also by torch's nearest rule, which multiplies in float32."""
    ratio, rest = divmod(large, small)
    return rest == 0 and ratio & (ratio - 1) == 0 and ratio > 0


def scale_by_cells(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """``x * up(scale) + up(shift)`` where every cell of scale and shift covers a block of x: broadcast, not written out."""
    rows, columns = (large // small for small, large in zip(scale.shape[2:], x.shape[2:], strict=True))
    blocks: Tensor = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    scale, shift = (t[:, :, :, None, :, None] for t in (scale, shift))
    if out is None:
        return (blocks * scale + shift).flatten(4, 5).flatten(2, 3)
    torch.addcmul(shift, blocks, scale, out=out.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)))
    return out


# Where scaled_dot_product_attention has no fused kernel it makes all scores of its queries at once: ask for no more than these.
MOST_SCORES = 4096**2


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """``(B, heads, tokens, size)`` each."""
    queries = max(1, MOST_SCORES // max(1, k.shape[2]))
    if torch.compiler.is_compiling() or q.shape[2] <= queries:  # a compiled program may have a symbol for the number of tokens
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return torch.cat([F.scaled_dot_product_attention(part, k, v, scale=scale) for part in q.split(queries, dim=2)], dim=2)
