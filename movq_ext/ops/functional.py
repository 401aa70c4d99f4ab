"""The operators of a MoVQ decoder as functions of tensors: each checks its arguments and chooses a path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import clips, cuda, native, upsampling
from .argument_checks import (
    check_add_bias_residual,
    check_attention,
    check_shared_kv_attention,
    check_spatial_attention,
    check_spatial_norm,
    check_upsample_conv,
)
from .cpu_upsampling import prepare_upsample_conv
from .extension import warn_once
from .options import NormOptions
from .paths import attention_backend, failed_self_test, upsampling_method, why_native, why_native_parameters
from .self_test import self_test_failure
from .statistics import MeasuredMap


def spatial_norm(
    f: Tensor,
    zq_y: Tensor | None,
    zq_b: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-6,
    activation: str | None = None,
    split_first_frame: bool = False,
) -> Tensor:
    """Spatially conditioned group normalisation: ``act(GroupNorm(f) * up(zq_y) + up(zq_b))``.

    Equivalent to this, without the intermediate maps::

        y, b = (F.interpolate(zq, f.shape[2:], mode="nearest") for zq in (zq_y, zq_b))
        out = F.group_norm(f, groups, weight, bias, eps) * y + b
        out = F.silu(out) if activation == "silu" else out

    In a SpatialNorm layer ``zq_y`` is ``conv_y(zq)`` and ``zq_b`` is ``conv_b(zq)``, both at zq's own resolution: a 1x1
    convolution commutes with a nearest resize, so the result is the published one (MoVQ, arXiv:2209.09002, equation 4) for a
    fraction of the work. Without ``zq_y`` and ``zq_b`` this is plain group normalisation.

    For a clip, the statistics span all frames, and zq is resized along time too. The video autoencoders treat the first frame of
    a clip apart, since it stands for itself and every later one for several: ``split_first_frame``.

    Args:
        f: ``(B, C, H, W)``, or a clip ``(B, C, T, H, W)``, floating point, any memory format.
        zq_y, zq_b: ``(B, C, h, w)`` multiplier and offset on a grid of any size, or both None. ``(B, C, t, h, w)`` for a clip.
        weight, bias: ``(C,)`` affine parameters of the group norm, or None.
        groups: number of groups; divides C.
        eps: added to the variance.
        activation: None or ``"silu"``, applied last.
        split_first_frame: the first frame of a clip takes zq's first; the other T - 1 take zq's other t - 1 by nearest, or its
            only one.

    Returns:
        f's shape in f's dtype and, from the CUDA kernels, in f's memory format. Statistics are computed in float32 or
        better. Under autocast zq_y and zq_b may differ from f in dtype; the result still has f's.

    Raises:
        ValueError: an argument has the wrong rank, size, device or value.
        TypeError: dtypes differ outside autocast, or f is not floating point.
    """
    return fused_spatial_norm(
        f, zq_y, zq_b, NormOptions(weight, bias, groups, eps, activation, split_first_frame=split_first_frame)
    )


def fused_spatial_norm(f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions) -> Tensor:
    """`spatial_norm` with the steps that layers fuse with it, see `NormOptions`.

    Raises what `spatial_norm` raises, and ValueError if f_bias or bordered is given and a tensor requires a gradient.
    """
    check_spatial_norm(f, zq_y, zq_b, options)
    if f.dim() == 4:
        return _spatial_norm_of_map(f, zq_y, zq_b, options, clips.IMAGE)
    f, zq_y, zq_b, clip = clips.as_maps(f, zq_y, zq_b, options.split_first_frame)
    return clips.as_clip(_spatial_norm_of_map(f, zq_y, zq_b, options, clip), clip.frames)


def _spatial_norm_of_map(
    f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions, clip: clips.ClipShape
) -> Tensor:
    if not f.is_cuda:
        return clips.native_spatial_norm(f, zq_y, zq_b, options, clip)
    if reason := why_native(f) or why_native_parameters(f, options) or failed_self_test("spatial_norm", f):
        warn_once(reason)
        return clips.native_spatial_norm(f, zq_y, zq_b, options, clip)
    if zq_y is not None and zq_b is not None and not zq_y.dtype == zq_b.dtype == f.dtype:
        zq_y, zq_b = zq_y.to(f.dtype), zq_b.to(f.dtype)  # under autocast
    return cuda.spatial_norm(f, zq_y, zq_b, options, clip)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention for heads of up to 512, in memory linear in the number of tokens.

    Equivalent to ``F.scaled_dot_product_attention(q, k, v, scale=scale)``: ``softmax(scale * q @ k.mT) @ v`` for each image and
    head (Vaswani et al., arXiv:1706.03762, equation 1).

    Args:
        q: ``(B, heads, queries, C)``, floating point, any strides. It is not copied if each token's elements are adjacent, C is a
            multiple of 8 and addresses are multiples of 16 bytes.
        k, v: ``(B, heads, keys, C)`` of q's dtype and device.
        scale: factor on the scores; ``C ** -0.5`` if None.

    Returns:
        ``(B, heads, queries, C)`` in q's dtype, or in autocast's, which casts all three. In float32, the CUDA kernels are as
        accurate as the native path (products of three TF32 terms) whatever ``torch.backends.cuda.matmul.allow_tf32`` says, but an
        infinite element turns every result that depends on it into NaN.

    Raises:
        ValueError: an argument has the wrong rank, size or device.
        TypeError: dtypes differ outside autocast, or q is not floating point.
    """
    check_attention(q, k, v)
    if not q.is_cuda:
        return native.attention(q, k, v, scale)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if (backend := attention_backend(q, k, v)) == "native":
        return native.attention(q, k, v, scale)
    return cuda.attention(q, k, v, q.shape[3] ** -0.5 if scale is None else scale, backend)


def shared_kv_attention(q: Tensor, kv: Tensor, scale: float | None = None) -> Tensor:
    """`attention` with one tensor for keys and values: ``softmax(scale * q @ kv.mT) @ kv``.

    Equivalent to ``attention(q, kv, kv, scale)``. Backward adds the gradients of the keys and of the values into one.

    Self-attention has this form for any projections of its input h: ``softmax(scale * (h @ Q) @ (h @ K).mT) @ (h @ V)`` equals
    ``shared_kv_attention(h @ Q @ K.mT, h, scale) @ V`` (DeepSeek-V2, arXiv:2405.04434, section 2.1.2, calls this absorption).

    Args:
        q: ``(B, heads, queries, C)``, floating point, any strides; see `attention`.
        kv: ``(B, heads, keys, C)`` of q's dtype and device.
        scale: factor on the scores; ``C ** -0.5`` if None.

    Returns:
        ``(B, heads, queries, C)`` in the dtype and with the accuracy of `attention`.

    Raises:
        ValueError: an argument has the wrong rank, size or device.
        TypeError: dtypes differ outside autocast, or q is not floating point.
    """
    check_shared_kv_attention(q, kv)
    if not q.is_cuda:
        return native.shared_kv_attention(q, kv, scale)
    if torch.is_autocast_enabled("cuda"):
        q, kv = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, kv))
    if (backend := attention_backend(q, kv)) == "native":
        return native.shared_kv_attention(q, kv, scale)
    return cuda.shared_kv_attention(q, kv, q.shape[3] ** -0.5 if scale is None else scale, backend)


def spatial_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Single-head `attention` over all positions of a feature map, with head size C.

    Equivalent to::

        q, k, v = (x.flatten(2).mT.unsqueeze(1) for x in (q, k, v))  # (B, C, H, W) -> (B, 1, H * W, C)
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        out = out.squeeze(1).mT.unflatten(2, (H, W))

    Args:
        q, k, v: ``(B, C, H, W)``, one shape, dtype and device, any memory format. channels_last needs no copies.
        scale: factor on the scores; ``C ** -0.5`` if None.

    Returns:
        ``(B, C, H, W)`` in the dtype that `attention` returns and, from the CUDA kernels, in q's memory format.

    Raises:
        ValueError: an argument has the wrong rank, size or device.
        TypeError: dtypes differ outside autocast, or q is not floating point.
    """
    check_spatial_attention(q, k=k, v=v)
    return _as_map(attention(_as_one_head(q), _as_one_head(k), _as_one_head(v), scale), q)


def spatial_shared_kv_attention(q: Tensor, kv: Tensor, scale: float | None = None) -> Tensor:
    """Single-head `shared_kv_attention` over all positions of a feature map: ``spatial_attention(q, kv, kv, scale)``.

    Takes ``(B, C, H, W)``, and returns and raises what `spatial_attention` does.
    """
    check_spatial_attention(q, kv=kv)
    return _as_map(shared_kv_attention(_as_one_head(q), _as_one_head(kv), scale), q)


def _as_one_head(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` as ``(B, 1, H * W, C)``."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


def _as_map(attended: Tensor, q: Tensor) -> Tensor:
    """``(B, 1, H * W, C)`` as ``(B, C, H, W)``, on a GPU in q's memory format."""
    # Not squeeze(1).mT: for a batch of one, attended's batch stride would hide from convolutions that this is channels_last.
    out: Tensor = attended.flatten(0, 2).unflatten(0, (q.shape[0], *q.shape[2:])).permute(0, 3, 1, 2)
    return out.contiguous() if q.is_cuda and q.is_contiguous() else out


def add_bias_residual_(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Add a convolution's bias and a residual in place, in one pass: ``x += bias[:, None, None] + residual``.

    Args:
        x: ``(B, C, H, W)``, floating point, dense in NCHW or channels_last; overwritten.
        bias: ``(C,)`` in x's dtype or float32, or None.
        residual: ``(B, C, H, W)`` of x's dtype and device, or None if there is a bias. Any memory format; x's avoids a copy. It
            may be x itself, but must not partially overlap it.

    Returns:
        x. The CUDA kernel adds in float32 and rounds once.

    Raises:
        ValueError: an argument has the wrong rank, shape, strides or device, or requires a gradient: none is recorded.
        TypeError: an argument has the wrong dtype.
    """
    return add_bias_residual_with_statistics_(x, bias, residual, 0).values


def add_bias_residual_with_statistics_(x: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int) -> MeasuredMap:
    """`add_bias_residual_` which also leaves the statistics of the sum for a norm of `groups` groups.

    Returns:
        x and its statistics, which are None with groups of 0, on the native path, and where they would not pay: for maps that
        the norm reads once anyhow, and for sizes or addresses that rule out accesses of 16 bytes.
    """
    check_add_bias_residual(x, bias, residual)
    if not x.is_cuda:
        return MeasuredMap(native.add_bias_residual_(x, bias, residual))
    if reason := why_native(x) or failed_self_test("add_bias_residual_", x):
        warn_once(reason)
        return MeasuredMap(native.add_bias_residual_(x, bias, residual))
    return cuda.add_bias_residual_with_statistics_(x, bias, residual, groups)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, method: str | None = None) -> Tensor:
    """Nearest 2x upsampling and a 3x3 convolution: ``F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)``.

    Args:
        x: ``(B, C, H, W)``, floating point, any memory format.
        weight: ``(out, C, 3, 3)``.
        bias: ``(out,)``, or None.
        method: one of `upsampling.METHODS`. None takes the one that costs least in counted operations and bytes on a GPU, and
            ``"transposed"`` in traced programs. On a CPU it takes ``"transposed"``, or for few pixels ``"direct"``; without
            gradients, in float32 and float64 and with at least 128 channels, it takes nine products for four pixels
            (`winograd_upsampling`).
            ``"windows"`` is for inference: its gradient has no kernels. With kernels it takes at most 65535 images of 32767 rows,
            and is never the automatic choice.

    Returns:
        ``(B, out, 2 * H, 2 * W)`` in x's dtype, or in autocast's; on a GPU in channels_last, except by ``"direct"`` and where
        ``"windows"`` runs without its kernels. The kernels add weights in float32 and round once.

    Raises:
        ValueError: an argument has the wrong rank, shape or device, or the method is unknown.
        TypeError: dtypes differ outside autocast, or x is not floating point.
    """
    return upsample_conv_with_statistics(x, weight, bias, 0, method).values


def upsample_conv_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, method: str | None = None
) -> MeasuredMap:
    """`upsample_conv` which also leaves the statistics of its result for a norm of `groups` groups.

    Returns:
        The map and its statistics, which are None if the last kernel is not this package's (with gradients, say, or without a
        bias unless the method is ``"windows"``), and where `add_bias_residual_with_statistics_` leaves none.
    """
    check_upsample_conv(x, weight, bias, method)
    in_inference = native.is_inference(*(tensor for tensor in (x, weight, bias) if tensor is not None))
    if not x.is_cuda and method is None and in_inference:
        prepared = prepare_upsample_conv(weight, bias, native.compute_dtype(x), x.numel() // x.shape[1])
        return MeasuredMap(prepared(x))
    if not x.is_cuda:
        return MeasuredMap(upsampling.upsample_conv(x, weight, bias, method or upsampling.cpu_method(x)))
    if method is None:
        method = upsampling_method(x, weight.shape[0], bias is not None, in_inference, weight.dtype)
    if reason := why_native(weight) or failed_self_test("upsample_conv", weight):
        warn_once(reason)
        return MeasuredMap(upsampling.upsample_conv(x, weight, bias, method))
    if not in_inference:
        if method == "transposed":
            return MeasuredMap(F.conv_transpose2d(x, cuda.fold_upsampling(weight), bias, stride=2, padding=1))
        return MeasuredMap(upsampling.upsample_conv(x, weight, bias, method))
    dtype = native.compute_dtype(x)  # of the windows too
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(dtype)
    if method == "windows":
        if reason := self_test_failure("upsample_conv", x.device, dtype, True):
            warn_once(reason)
            return MeasuredMap(upsampling.upsample_conv(x, weight, bias, method))
        return cuda.upsample_by_windows(x, weight, bias, groups)
    if method == "transposed":
        out = F.conv_transpose2d(x, cuda.fold_upsampling(weight), stride=2, padding=1)
    else:
        out = upsampling.upsample_conv(x, weight, None, method)
    # Not by the convolution: PyTorch adds its bias in channels_last in a pass of single elements.
    return MeasuredMap(out) if bias is None else add_bias_residual_with_statistics_(out, bias, None, groups)
