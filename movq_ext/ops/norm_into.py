"""The spatial norm of a clip, in inference, written to memory that the caller chose.

So the result goes where it is needed: over f itself, or behind the padding frames of the next convolution. On a GPU the kernels
do that. On a CPU, PyTorch's group norm would write a map for the modulation to overwrite. Here the statistics come first, and
rstd folds into the modulation's scale, which is small; one pass then reads f and writes the result. It subtracts the mean
before it scales: ``f * scale - mean * scale`` would cancel digits where the mean is large. What the mean lost to rounding is
added to the shift.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import clips, cuda
from .native import is_inference
from .options import NormOptions
from .paths import failed_self_test, why_native

CHUNK_ELEMENTS = 1 << 16  # of f, computed at once: 256 KiB in float32, which stay in the cache


def can_normalise_into(*tensors: Tensor | None) -> bool:
    """True in inference, for plain tensors of one dtype and device, outside autocast. The first is the clip.

    On a CPU in float32 or float64, on a GPU where the kernels run.
    """
    f, *others = (x for x in tensors if x is not None)
    plain = is_inference(f, *others) and not torch.is_autocast_enabled(f.device.type)
    if not plain or any(x.device != f.device or x.dtype != f.dtype for x in others):
        return False
    if f.is_cuda:
        return not (why_native(f) or failed_self_test("spatial_norm", f))
    return f.device.type == "cpu" and f.itemsize >= 4


def spatial_norm_into(out: Tensor, f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions) -> Tensor:
    """Write ``spatial_norm(f, zq_y, zq_b, ...)`` to out and return it. Arguments as can_normalise_into allows; not checked.

    Args:
        out: ``(B, C, T, H, W)`` of f's dtype and memory format, whose frames are adjacent rows: f itself, or memory that does not
            overlap it. It must not overlap zq_y, zq_b, weight or bias either.
        f, zq_y, zq_b, options: as for `spatial_norm` of clips.
    """
    if f.is_cuda:
        return _run_kernels(out, f, zq_y, zq_b, options)
    statistics = group_statistics(f, options.groups, options.eps)
    per_group = f.shape[1] // options.groups
    mean, rest, scale = (x.repeat_interleave(per_group, 1)[:, :, None, None] for x in statistics)  # (B, C, 1, 1)
    # norm(f) = (f - mean) * scale + shift
    scale = scale if options.weight is None else scale * options.weight[:, None, None]
    shift = -rest * scale if options.bias is None else options.bias[:, None, None] - rest * scale
    if zq_y is not None and zq_b is not None:
        y, b = (clips.widen(clips.modulation_map(zq, f, options.split_first_frame), f.shape[4]) for zq in (zq_y, zq_b))
        scale, shift = scale * y, shift * y + b
    else:
        scale, shift = (x.expand(-1, -1, f.shape[2] * f.shape[3], -1) for x in (scale, shift))
    rows = scale.shape[2]
    row_blocks = (*f.shape[:2], rows, -1, f.shape[4])  # each row of scale and shift covers a block of f's rows
    maps = f.reshape(row_blocks), scale.unsqueeze(3), shift.unsqueeze(3), out.view(row_blocks)
    step = max(1, CHUNK_ELEMENTS * torch.get_num_threads() * rows // f.numel())  # every thread has a cache
    for f_rows, scale_rows, shift_rows, out_rows in zip(*(x.split(step, dim=2) for x in maps), strict=True):
        torch.sub(f_rows, mean.unsqueeze(4), out=out_rows)
        torch.addcmul(shift_rows, out_rows, scale_rows, out=out_rows)
        if options.activation == "silu":
            F.silu(out_rows, inplace=True)
    return out


def _run_kernels(out: Tensor, f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions) -> Tensor:
    channels_last = out.stride(1) == 1 and out.shape[1] > 1
    f = f.contiguous(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)
    f_map, zq_y, zq_b, clip = clips.as_maps(f, zq_y, zq_b, options.split_first_frame)
    out_map = out.view(*out.shape[:2], -1, out.shape[4])  # fails where flattening would copy
    cuda.spatial_norm_into(out_map, f_map, zq_y, zq_b, options, clip)
    return out


def group_statistics(f: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, the rest of the mean, and ``(variance + eps) ** -0.5`` of each group of a clip, ``(B, groups)``.

    The exact mean is ``mean + rest``: rest is the mean of the centred values, and the variance that of their squares less
    ``rest ** 2``. To read f twice is faster than torch.var_mean's single pass.
    """
    size = f[0].numel() // groups
    if f.is_contiguous():  # (B * groups, group)
        values = f.view(f.shape[0] * groups, size)
        mean = values.mean(1)
        sums = torch.stack([_centred_sums(*group) for group in zip(values, mean, strict=True)], dim=1)
    else:  # (B, T * H * W, C), where channels vary fastest, summed by channel first
        values = f.permute(0, 2, 3, 4, 1).flatten(1, 3)
        mean = values.mean(1).view(f.shape[0] * groups, -1).mean(1)
        centre = mean.view(f.shape[0], groups).repeat_interleave(f.shape[1] // groups, 1)
        by_channel = torch.stack([_centred_sums(*image) for image in zip(values, centre, strict=True)], dim=1)
        sums = by_channel.view(2, f.shape[0] * groups, -1).sum(2)
    rest, squares = sums / size
    rstd = ((squares - rest.square()).clamp_min(0) + eps).rsqrt()  # rounding may make the difference negative
    shape = (f.shape[0], groups)
    return mean.view(shape), rest.view(shape), rstd.view(shape)


def _centred_sums(values: Tensor, centre: Tensor) -> Tensor:
    """Return the sums over the first dimension of ``values - centre`` and of its squares, a part at a time."""
    sums = []
    for chunk in values.split(max(1, CHUNK_ELEMENTS // values[0].numel())):
        centred = chunk - centre
        sums.append(torch.stack([centred.sum(0), centred.square_().sum(0)]))
    return torch.stack(sums).sum(0)
