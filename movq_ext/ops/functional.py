"""The operators of a MoVQ decoder as functions of tensors: each checks its arguments and chooses a path."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda, native
from .extension import device_reason, warn_once

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_PIXELS = 2**31 - 1 - 2**16  # as csrc/kernels/spatial_norm.h has it
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
    f_bias: Tensor | None = None,
    bordered: bool = False,
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
        f_bias: ``(C,)`` in f's dtype or float32, or None: the norm is of ``f + f_bias[c]``, to the kernels without another pass
            over f and in float32. For the bias of the convolution that made f, in inference: no gradient is recorded.
        bordered: zq_y and zq_b are ``(B, C, 3h, 3w)``: of each of ``h x w`` cells, which are of 2 rows and columns of f at least,
            the first row and column, those between, and the last. For a latent that a 3x3 convolution has seen after its resize;
            in inference.

    Returns:
        ``(B, C, H, W)`` in f's dtype and, from the CUDA kernels, in f's memory format. Under autocast f keeps its dtype, zq_y
        and zq_b may have another, and statistics are float32 as everywhere.

    Raises:
        ValueError: an argument has the wrong rank, size, device or value, or with f_bias or bordered one would need a gradient.
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
    if f_bias is not None:
        _check_channel_bias("f_bias", f_bias, "f", f)
    if bordered and (zq_y is None or not native.is_bordered(zq_y, f)):
        wanted = f"three rows and columns for each cell of 2 or more of f's {tuple(f.shape[2:])}"
        raise ValueError(f"bordered zq_y must have {wanted}, got {None if zq_y is None else tuple(zq_y.shape)}")
    if f_bias is not None or bordered:
        _check_no_gradient(
            f"spatial_norm with {'bordered' if bordered else 'f_bias'}",
            f=f,
            zq_y=zq_y,
            zq_b=zq_b,
            weight=weight,
            bias=bias,
            f_bias=f_bias,
        )

    if not f.is_cuda:
        return native.spatial_norm(f, zq_y, zq_b, weight, bias, groups, eps, activation, f_bias, bordered)
    reason = _reason(f) or _parameter_reason(f, weight=weight, bias=bias)
    if reason:
        warn_once(reason)
        return native.spatial_norm(f, zq_y, zq_b, weight, bias, groups, eps, activation, f_bias, bordered)
    if zq_y is not None and zq_b is not None:
        zq_y, zq_b = zq_y.to(f.dtype), zq_b.to(f.dtype)  # they differ under autocast only
    return cuda.spatial_norm(f, zq_y, zq_b, weight, bias, groups, eps, activation == "silu", f_bias, bordered)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention for heads of up to 512, in memory that grows with the tokens and not with their square.

    ``out = softmax(scale * q @ k^T) @ v`` per image and head (Vaswani et al., arXiv:1706.03762, equation 1).

    Args:
        q: ``(B, heads, queries, C)``, floating point, any strides; no copy is made where the elements of a token are adjacent, C
            is a multiple of 8 and addresses are of 16 bytes.
        k, v: ``(B, heads, keys, C)`` of q's dtype and device.
        scale: factor on the scores; ``C ** -0.5`` if None.

    Returns:
        ``(B, heads, queries, C)`` in q's dtype; under autocast, which casts all three, in its dtype. On a GPU, float32 is as
        exact as the native path (products of three TF32 terms), whatever ``torch.backends.cuda.matmul.allow_tf32`` says, but an
        infinite element makes NaN of all it meets.

    Raises:
        ValueError: an argument has the wrong rank, size or device.
        TypeError: dtypes differ outside autocast, or q is not floating point.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, tensor, "(batch, heads, tokens, head size)")
        _check_values(name, tensor)
        if tensor.shape[:2] != q.shape[:2] or tensor.shape[3] != q.shape[3]:
            raise ValueError(f"{name} must have q's batch, heads and head size {tuple(q.shape)}, got {tuple(tensor.shape)}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have the same tokens, got {k.shape[2]} and {v.shape[2]}")
    _check_same("q", q, k=k, v=v)
    if not q.is_cuda:
        return native.attention(q, k, v, scale)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if reason := _reason(q) or _attention_reason(q):
        warn_once(reason)
        return native.attention(q, k, v, scale)
    return cuda.attention(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)


def spatial_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Single-head `attention` over all positions of a feature map, with head size C.

    Args:
        q, k, v: ``(B, C, H, W)``, one shape, dtype and device, any memory format. channels_last needs no copies.
        scale: factor on the scores; ``C ** -0.5`` if None.

    Returns:
        ``(B, C, H, W)`` in the dtype that `attention` says and, from the CUDA kernels, in q's memory format.

    Raises:
        ValueError: an argument has the wrong rank, size or device.
        TypeError: dtypes differ outside autocast, or q is not floating point.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_map(name, tensor)
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")
    attended = attention(_head(q), _head(k), _head(v), scale)
    # By way of (tokens, C): what it comes with as the stride of a batch of one would keep a convolution from taking it for
    # channels_last.
    out: Tensor = attended.flatten(0, 2).unflatten(0, (q.shape[0], *q.shape[2:])).permute(0, 3, 1, 2)
    return out.contiguous() if q.is_cuda and q.is_contiguous() else out


def _head(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` as ``(B, 1, H * W, C)``."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


def add_bias_residual_(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The epilogue of a convolution, in place and in one pass: ``x = x + bias[c] + residual``.

    Args:
        x: ``(B, C, H, W)``, floating point, dense in NCHW or channels_last; it is overwritten.
        bias: ``(C,)`` in x's dtype or float32, or None.
        residual: ``(B, C, H, W)`` of x's dtype and device in any memory format, or None if there is a bias. x's memory format
            takes no copy. It may be x itself, but must not overlap it in part.

    Returns:
        x. The CUDA kernel adds in float32 and rounds once.

    Raises:
        ValueError: an argument has the wrong rank, shape, strides, device, or would need a gradient: none is recorded.
        TypeError: an argument has the wrong dtype.
    """
    _check_map("x", x)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"x must be dense in NCHW or channels_last, got strides {x.stride()} for shape {tuple(x.shape)}")
    if bias is None and residual is None:
        raise ValueError("bias or residual must be given")
    if bias is not None:
        _check_channel_bias("bias", bias, "x", x)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        if residual.device != x.device:
            raise ValueError(f"residual must be on x's device {x.device}, got {residual.device}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")
    _check_no_gradient("add_bias_residual_", x=x, bias=bias, residual=residual)
    if not x.is_cuda:
        return native.add_bias_residual_(x, bias, residual)
    if reason := _reason(x):
        warn_once(reason)
        return native.add_bias_residual_(x, bias, residual)
    return cuda.add_bias_residual_(x, bias, residual)


def explain(x: Tensor, operator: str = "spatial_norm") -> str:
    """Which path an operator takes for x on its device, ``native`` or ``cuda``, and why.

    Args:
        x: features for ``"spatial_norm"`` and ``"spatial_attention"``; ``(B, heads, tokens, C)`` for ``"attention"``.
        operator: the name of the operator.

    Returns:
        ``native: ...`` or ``cuda: ...``, the reason behind the colon.

    Raises:
        ValueError: there is no such operator.
    """
    size = {"spatial_norm": None, "spatial_attention": 1, "attention": 3}
    if operator not in size:
        raise ValueError(f"operator must be one of {', '.join(size)}, got {operator!r}")
    if not x.is_cuda:
        return f"native: the CUDA kernels do not run on {x.device.type} tensors"
    reason = _reason(x)
    if (dim := size[operator]) is not None:
        reason = reason or _attention_reason(x.movedim(dim, -1))
    return f"native: {reason}" if reason else f"cuda: compiled for {torch.cuda.get_device_name(x.device)}"


def _reason(x: Tensor) -> str | None:
    """Why the kernels cannot take x, which is on a CUDA device, or None if they can."""
    if x.dtype not in KERNEL_DTYPES:
        return f"the CUDA kernels take {', '.join(str(dtype)[6:] for dtype in KERNEL_DTYPES)}, got {str(x.dtype)[6:]}"
    if x.dim() == 4 and x.shape[2] * x.shape[3] > MOST_PIXELS:
        return f"the CUDA kernels take at most {MOST_PIXELS} pixels, got shape {tuple(x.shape)}"
    reason: str | None = device_reason(x.device.index)
    return reason


def _attention_reason(q: Tensor) -> str | None:
    if q.shape[-1] > cuda.MAX_HEAD_SIZE:
        return f"the CUDA kernels of attention take heads of up to {cuda.MAX_HEAD_SIZE}, got {q.shape[-1]}"
    return None


def _parameter_reason(f: Tensor, **parameters: Tensor | None) -> str | None:
    given = {name: p for name, p in parameters.items() if p is not None}
    for name, parameter in given.items():
        if parameter.dtype not in (torch.float32, f.dtype):
            return f"the CUDA kernels take {name} in float32 or f's {f.dtype}, got {parameter.dtype}"
    if len({parameter.dtype for parameter in given.values()}) > 1:
        return "the CUDA kernels take weight and bias of one dtype"
    return None


def _check_map(name: str, x: Tensor) -> None:
    _check_rank(name, x, "(batch, channels, height, width)")
    _check_values(name, x)


def _check_rank(name: str, x: Tensor, dimensions: str) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions {dimensions}, got shape {tuple(x.shape)}")


def _check_values(name: str, x: Tensor) -> None:
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


def _check_channel_bias(name: str, bias: Tensor, first: str, x: Tensor) -> None:
    if bias.shape != (x.shape[1],):
        raise ValueError(f"{name} must have shape ({x.shape[1]},), got {tuple(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"{name} must be on {first}'s device {x.device}, got {bias.device}")
    if bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{name} must be float32 or have {first}'s dtype {x.dtype}, got {bias.dtype}")


def _check_no_gradient(what: str, **tensors: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name} must not require a gradient: {what} records none; call it under torch.no_grad()")
