"""The operators of a MoVQ decoder as functions of tensors: each checks its arguments, then runs the native path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._extension import extension_reason

ACTIVATIONS = (None, "silu")


def spatial_norm(
    f: Tensor,
    zq_y: Tensor | None,
    zq_b: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-6,
    activation: str | None = None,
) -> Tensor:
    """Spatially conditioned group normalisation: ``act(GroupNorm(f) * up(zq_y) + up(zq_b))``.

    ``up`` is torch's nearest resize to f's height and width. In a SpatialNorm layer ``zq_y`` is ``conv_y(zq)`` and
    ``zq_b`` is ``conv_b(zq)``, both at zq's own resolution: a 1x1 convolution commutes with a nearest resize, so
    the result is the published one (MoVQ, arXiv:2209.09002, equation 4) for a fraction of the work. Without ``zq_y``
    and ``zq_b`` it is plain group normalisation.

    Args:
        f: ``(B, C, H, W)``, floating point, any memory format.
        zq_y, zq_b: ``(B, C, h, w)`` multiplier and offset on a grid of any size, or both None.
        weight, bias: ``(C,)`` affine parameters of the group norm, or None.
        groups: number of groups; divides C.
        eps: added to the variance.
        activation: None or ``"silu"``, applied last.

    Returns:
        ``(B, C, H, W)``. The dtype is torch's promotion of the arguments': under autocast float32, otherwise f's.

    Raises:
        ValueError: an argument has the wrong rank, size, device or value.
        TypeError: dtypes differ outside autocast, or f is not floating point.
    """
    _check_map("f", f)
    if groups < 1 or f.shape[1] % groups:
        raise ValueError(f"groups must be a positive divisor of f's channels, got groups={groups} for {f.shape[1]} channels")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if (zq_y is None) != (zq_b is None):
        raise ValueError("zq_y and zq_b must be given together or not at all")
    if zq_y is not None and zq_b is not None:
        for name, zq in (("zq_y", zq_y), ("zq_b", zq_b)):
            _check_map(name, zq)
            if zq.shape[:2] != f.shape[:2]:
                raise ValueError(f"{name} must have f's batch and channels {tuple(f.shape[:2])}, got {tuple(zq.shape)}")
        if zq_y.shape != zq_b.shape:
            raise ValueError(f"zq_y and zq_b must have one shape, got {tuple(zq_y.shape)} and {tuple(zq_b.shape)}")
        _check_same("f", f, zq_y=zq_y, zq_b=zq_b)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (f.shape[1],):
            raise ValueError(f"{name} must have shape ({f.shape[1]},), got {tuple(parameter.shape)}")

    # torch.group_norm rather than F.group_norm: the latter refuses a single value per group, which has an answer.
    out = torch.group_norm(f, groups, weight, bias, eps, torch.backends.cudnn.enabled)
    if zq_y is not None and zq_b is not None:
        out = _modulate(out, zq_y, zq_b)
    return F.silu(out) if activation == "silu" else out


def _modulate(x: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """``x * up(y) + up(b)`` with y and b resized to x's grid by torch's nearest rule."""
    height, width = x.shape[-2:]
    if not torch.compiler.is_compiling():
        (rows, rest_rows), (columns, rest_columns) = divmod(height, y.shape[2]), divmod(width, y.shape[3])
        if not rest_rows and not rest_columns and _is_power_of_two(rows) and _is_power_of_two(columns):
            # Every source cell covers a rows x columns block exactly: broadcast instead of writing the resized maps.
            # Only for powers of two, where torch's float32 index rule is exact.
            blocks = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
            y, b = y[:, :, :, None, :, None], b[:, :, :, None, :, None]
            return (blocks * y + b).flatten(4, 5).flatten(2, 3)
    y, b = (F.interpolate(map_, size=(height, width), mode="nearest") for map_ in (y, b))
    return x * y + b


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def spatial_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Single-head scaled dot-product attention over all positions of a feature map, with head size C.

    ``out[:, :, i] = sum_j softmax_j(scale * q[:, :, i] . k[:, :, j]) v[:, :, j]`` (Vaswani et al., arXiv:1706.03762,
    equation 1), i and j running over the H*W positions.

    Args:
        q, k, v: ``(B, C, H, W)``, one shape, dtype and device, any memory format.
        scale: factor on the scores; ``C ** -0.5`` if None.

    Returns:
        ``(B, C, H, W)`` in q's dtype.

    Raises:
        ValueError: an argument has the wrong rank, size or device.
        TypeError: dtypes differ outside autocast, or q is not floating point.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_map(name, tensor)
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")
    _check_same("q", q, k=k, v=v)
    tokens = (tensor.flatten(2).transpose(1, 2).unsqueeze(1) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(*tokens, scale=scale)
    return out.squeeze(1).transpose(1, 2).unflatten(2, q.shape[2:])


def explain(x: Tensor) -> str:
    """Which path the operators take for a tensor like x, ``native`` or ``cuda``, and why."""
    if not x.is_cuda:
        return f"native: the CUDA kernels do not run on {x.device.type} tensors"
    return f"native: {extension_reason() or 'this version has no CUDA kernel for the operators yet'}"


def _check_map(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions (batch, channels, height, width), got shape {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def _check_same(first: str, x: Tensor, **others: Tensor) -> None:
    """Device and, outside autocast (which casts by itself), dtype of all tensors must be x's."""
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name} must be on {first}'s device {x.device}, got {other.device}")
        if other.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name} must have {first}'s dtype {x.dtype}, got {other.dtype}")
