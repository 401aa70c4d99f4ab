"""The operators built from PyTorch's own: for every device and dtype, differentiable any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .moments import Moments
from .options import NormOptions

# Without a fused kernel, scaled_dot_product_attention materialises the scores of all its queries: this bounds them per call.
MAX_SCORE_ELEMENTS = 4096**2
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
LARGE_MEAN = 16.0  # in deviations: the rounding of a larger one in float32 costs a norm more than its own


def spatial_norm(f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions) -> Tensor:
    """``act(group_norm(f + f_bias) * up(zq_y) + up(zq_b))``."""
    if options.bordered and zq_y is not None and zq_b is not None:
        zq_y, zq_b = (spread_borders(zq, f) for zq in (zq_y, zq_b))
    if options.f_bias is not None:
        f = f + options.f_bias.to(f.dtype)[:, None, None]
    maps = [f] if zq_y is None or zq_b is None else [f, zq_y, zq_b]
    inputs = [*maps, *(x for x in (options.weight, options.bias) if x is not None)]
    in_inference = is_inference(*inputs)
    if in_inference and f.itemsize >= 4 and _is_channels_last_on_cpu(f) and all(x.dtype == f.dtype for x in inputs):
        return _affine_norm(f, zq_y, zq_b, options)
    out = _group_norm(f, options)
    in_place = in_inference and all(x.dtype == out.dtype for x in maps)
    if zq_y is not None and zq_b is not None:
        out = _modulate(out, zq_y, zq_b, in_place)
    out = F.silu(out, inplace=in_place) if options.activation == "silu" else out
    return out.to(f.dtype)  # autocast computes it in float32


def _affine_norm(f: Tensor, zq_y: Tensor | None, zq_b: Tensor | None, options: NormOptions) -> Tensor:
    """Compute `spatial_norm` as one affine map of the centred f, in channels_last: torch's group norm would write a map more.

    A modulation on a smaller grid is combined with the norm there.
    """
    mean, scale = _channel_statistics(f, options)
    out = f - mean.to(f.dtype)
    rest = torch.zeros_like(mean)
    if (mean.abs() * scale).max() > LARGE_MEAN:  # measure again without it
        rest, scale = _channel_statistics(out, options)
    scale = scale if options.weight is None else scale * options.weight[:, None, None]
    shift = -rest * scale if options.bias is None else options.bias[:, None, None] - rest * scale
    scale, shift = scale.to(f.dtype), shift.to(f.dtype)
    if zq_y is not None and zq_b is not None and zq_y.numel() < f.numel():
        out = _modulate(out, zq_y * scale, torch.addcmul(zq_b, zq_y, shift), in_place=True)
    else:
        torch.addcmul(shift, out, scale, out=out)
        out = out if zq_y is None or zq_b is None else _modulate(out, zq_y, zq_b, in_place=True)
    return F.silu(out, inplace=True) if options.activation == "silu" else out


def _channel_statistics(f: Tensor, options: NormOptions) -> tuple[Tensor, Tensor]:
    """Return the mean and ``1 / sqrt(variance + eps)`` of each channel's group, ``(B, C, 1, 1)`` in float64."""
    statistics = []
    for image in f.split(1):
        moments = Moments()
        moments.add(image)
        statistics.append(torch.stack(moments.group_statistics(options.groups, options.eps)))
    mean, rstd = torch.stack(statistics, 1)[..., None, None]
    return mean, rstd


def _group_norm(f: Tensor, options: NormOptions) -> Tensor:
    weight, bias = options.weight, options.bias
    is_recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (weight, bias))
    in_contiguous = is_recorded and _is_channels_last_on_cpu(f)
    # In channels_last on a CPU, torch's backward crashes if only the parameters need gradients.
    f = f.clone(memory_format=torch.contiguous_format) if in_contiguous else _subtract_group_means(f, options.groups)
    # torch.group_norm rather than F.group_norm: the latter refuses groups of one value, whose norm is well defined (zero).
    out = torch.group_norm(f, options.groups, weight, bias, options.eps, torch.backends.cudnn.enabled)
    return out.contiguous(memory_format=torch.channels_last) if in_contiguous else out


def _is_channels_last_on_cpu(f: Tensor) -> bool:
    """True if torch's group norm may take f as channels_last. A contiguous map of one channel or one pixel is both."""
    if f.device.type != "cpu" or _jit_traces() or torch.compiler.is_compiling():
        return False
    return not f.is_contiguous() or f.shape[1] == 1 or f.shape[2:].numel() == 1


def _subtract_group_means(f: Tensor, groups: int) -> Tensor:
    """Subtract each group's mean where torch would lose accuracy to it, without changing the norm.

    On a CPU in channels_last, torch computes a variance as E[x^2] - E[x]^2, which cancels when the mean is large. The gradient is
    unchanged too: a norm does not depend on its groups' means, so they count as constants.
    """
    # torch's forward-mode formula takes views of f as contiguous. A traced program may be given any layout.
    if forward_ad._current_level >= 0 or _jit_traces():
        return f.contiguous()
    if f.itemsize < 4 or not _is_channels_last_on_cpu(f):
        return f
    with torch.no_grad():
        means: Tensor = f.mean((2, 3)).unflatten(1, (groups, -1)).mean(2).repeat_interleave(f.shape[1] // groups, dim=1)
    return f - means[:, :, None, None]


def add_bias_residual_(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """``x += bias[:, None, None] + residual``, in place."""
    if residual is not None:
        x.add_(residual)  # first, since it may be x itself
    if bias is not None:
        x.add_(bias[:, None, None])
    return x


def is_tracing() -> bool:
    """True while torch.compile, torch.export, torch.jit.trace or torch.onnx.export traces a program.

    The program must work for other sizes than the example's, so nothing may depend on them. Nor may it write in place.
    """
    return torch.compiler.is_compiling() or _jit_traces()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Return torch.compiler.is_exporting, which torch.compile in torch 2.11 takes to be always true."""
    return torch.compiler.is_exporting()


def traces_plain_operators() -> bool:
    """True while a program is traced that may call only PyTorch's operators, by torch.jit.trace or torch.onnx.export."""
    return _jit_traces() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def _jit_traces() -> bool:
    return torch._C._get_tracing_state() is not None  # torch.jit.is_tracing has no annotations


def is_transformed() -> bool:
    """True inside torch.func's vmap and jvp, and other forward-mode differentiation: the kernels have no rules for them."""
    if is_tracing():
        return False
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    reverse_mode = torch._C._functorch.TransformType.Grad
    return any(level.key() != reverse_mode for level in levels)


def is_inference(*tensors: Tensor) -> bool:
    """True if a result computed from these tensors may be modified in place.

    They are plain tensors, operators run eagerly, and neither autograd, forward-mode AD nor a functorch transform records them.
    """
    if is_tracing() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    records = torch.is_grad_enabled()
    for x in tensors:  # not all(...): this runs several times per layer, while a GPU may wait
        if type(x) not in PLAIN_TENSORS or (records and x.requires_grad):
            return False
    return True


def multiply_pixels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``F.conv2d(x, weight, bias)`` for a 1x1 kernel, as one matrix product with the bias, in channels_last."""
    # A matrix: of four strided dimensions F.linear takes many small products, and adds the bias to their rounded results.
    pixels: Tensor = F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), weight.flatten(1), bias)
    out: Tensor = pixels.unflatten(0, (x.shape[0], *x.shape[2:])).permute(0, 3, 1, 2)
    return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which convolutions and attention take x: autocast's, or its own."""
    kind = x.device.type
    autocasts = x.dtype != torch.float64 and _autocast_is_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocasts else x.dtype


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _autocast_is_available(kind: str) -> bool:
    """Return torch.amp.is_autocast_available, which torch.compile cannot trace in torch 2.11."""
    return torch.amp.is_autocast_available(kind)


def _modulate(x: Tensor, y: Tensor, b: Tensor, in_place: bool) -> Tensor:
    """``x * up(y) + up(b)``, with y and b resized to x's grid by torch's nearest rule."""
    if not is_tracing() and all(
        is_power_of_two_ratio(small, large) for small, large in zip(y.shape[2:], x.shape[2:], strict=True)
    ):
        return scale_by_cells(x, y, b, out=x if in_place else None)
    y, b = (F.interpolate(zq, size=x.shape[2:], mode="nearest") for zq in (y, b))
    return torch.addcmul(b, x, y, out=x) if in_place else x * y + b


def is_power_of_two_ratio(small: int, large: int) -> bool:
    """True if ``large / small`` is 1, 2, 4, ...: the sizes at which a nearest resize repeats each of `small` cells exactly.

    Other integer ratios are not safe: torch multiplies indices by ``small / large`` in float32, and at a ratio of 41, say, that
    assigns pixel 41 to cell 0.
    """
    ratio, remainder = divmod(large, small)
    return remainder == 0 and ratio & (ratio - 1) == 0


def scale_by_cells(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """``x * up(scale) + up(shift)`` where each cell of scale and shift covers an equal block of x.

    Broadcasts each cell over its block instead of materialising the resized maps.
    """
    height, width = scale.shape[2:]
    block_shape = (*x.shape[:2], height, x.shape[2] // height, width, x.shape[3] // width)
    blocks, (scale, shift) = x.view(block_shape), (cells.view(*cells.shape[:3], 1, width, 1) for cells in (scale, shift))
    if out is None:
        return (blocks * scale + shift).flatten(4, 5).flatten(2, 3)
    torch.addcmul(shift, blocks, scale, out=out.view(block_shape))
    return out


def is_bordered(zq: Tensor, f: Tensor) -> bool:
    """True if zq has three rows and columns for each cell of at least 2x2 pixels of f."""
    return all(
        small % 3 == 0 and large % (small // 3) == 0 and large // (small // 3) > 1
        for small, large in zip(zq.shape[2:], f.shape[2:], strict=True)
    )


def spread_borders(zq: Tensor, f: Tensor) -> Tensor:
    """Expand a bordered zq to f's grid.

    Of a cell's three rows, the first and the last appear once and the middle one fills the rows between; columns alike.
    """
    for dim in (2, 3):
        cell_size = f.shape[dim] // (zq.shape[dim] // 3)
        pixel = torch.arange(f.shape[dim], device=zq.device)
        cell, offset = pixel // cell_size, pixel % cell_size
        row_of_cell = 1 - (offset == 0).long() + (offset == cell_size - 1).long()  # 0, 1, ..., 1, 2
        zq = zq.index_select(dim, 3 * cell + row_of_cell)
    return zq


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """``softmax(scale * q @ k.mT) @ v`` of ``(B, heads, tokens, C)``, with at most MAX_SCORE_ELEMENTS scores per head at once."""
    queries = max(1, MAX_SCORE_ELEMENTS // max(1, k.shape[2]))
    if is_tracing() or q.shape[2] <= queries:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return torch.cat([F.scaled_dot_product_attention(part, k, v, scale=scale) for part in q.split(queries, dim=2)], dim=2)


def shared_kv_attention(q: Tensor, kv: Tensor, scale: float | None) -> Tensor:
    """``softmax(scale * q @ kv.mT) @ kv``: `attention` whose keys are also its values."""
    return attention(q, kv, kv, scale)
