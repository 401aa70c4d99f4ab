"""The spatial norm of a clip on a CPU, in inference, written to memory that the caller chose.

In the native path PyTorch's group norm writes a map, which the modulation overwrites. Here the statistics come first and fold
into the modulation's scale and offset, which are small. So one pass reads f and writes the result where it is needed: over f
itself, or behind the padding frames of the next convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import clips
from .native import is_inference
from .options import NormOptions

CHUNK_ELEMENTS = 1 << 16  # of f, centred at once: 256 KiB in float32, which stay in the cache


def can_normalise_into(*tensors: Tensor | None) -> bool:
    """True in inference on a CPU, for plain tensors of one dtype, float32 or float64, outside autocast."""
    given = [x for x in tensors if x is not None]
    plain = is_inference(*given) and not torch.is_autocast_enabled("cpu")
    return plain and all(x.device.type == "cpu" and x.dtype == given[0].dtype and x.itemsize >= 4 for x in given)


def spatial_norm_into(out: Tensor, f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions) -> Tensor:
    """Write ``spatial_norm(f, zq_y, zq_b, ...)`` to out and return it. Arguments as can_normalise_into allows; not checked.

    Args:
        out: ``(B, C, T, H, W)`` of f's dtype, whose frames are adjacent rows: f itself, or memory that does not overlap it.
        f, zq_y, zq_b, options: as for `spatial_norm` of clips.
    """
    mean, rstd = group_statistics(f, options.groups, options.eps)
    per_channel = f.shape[1] // options.groups
    mean, scale = (x.repeat_interleave(per_channel, 1)[:, :, None, None] for x in (mean, rstd))  # (B, C, 1, 1)
    # norm(f) = f * scale + shift
    scale = scale if options.weight is None else scale * options.weight[:, None, None]
    shift = -mean * scale if options.bias is None else options.bias[:, None, None] - mean * scale
    if zq_y is not None and zq_b is not None:
        y, b = (clips.widen(clips.modulation_map(zq, f, options.split_first_frame), f.shape[4]) for zq in (zq_y, zq_b))
        scale, shift = scale * y, shift * y + b
    clips.scale_rows(f, scale, shift, out)
    if options.activation == "silu":
        F.silu(out, inplace=True)
    return out


def group_statistics(f: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and ``(variance + eps) ** -0.5`` of each group of a clip, ``(B, groups)``.

    The variance is the mean square of the centred values. To read f twice is faster than torch.var_mean's single pass.
    """
    size = f[0].numel() // groups
    if f.is_contiguous():  # (B * groups, group)
        values = f.view(f.shape[0] * groups, size)
        mean = values.mean(1)
        squares = torch.stack([_centred_squares(*group) for group in zip(values, mean, strict=True)])
    else:  # (B, T * H * W, C), where channels vary fastest, summed by channel first
        values = f.permute(0, 2, 3, 4, 1).flatten(1, 3)
        mean = values.mean(1).view(f.shape[0] * groups, -1).mean(1)
        centre = mean.view(f.shape[0], groups).repeat_interleave(f.shape[1] // groups, 1)
        by_channel = torch.stack([_centred_squares(*image) for image in zip(values, centre, strict=True)])
        squares = by_channel.view(f.shape[0] * groups, -1).sum(1)
    shape = (f.shape[0], groups)
    return mean.view(shape), (squares / size + eps).rsqrt().view(shape)


def _centred_squares(values: Tensor, centre: Tensor) -> Tensor:
    """Return the sum over the first dimension of ``(values - centre) ** 2``, a part at a time."""
    chunks = values.split(max(1, CHUNK_ELEMENTS // values[0].numel()))
    return torch.stack([(chunk - centre).square_().sum(0) for chunk in chunks]).sum(0)
