"""CogVideoX's causal convolution over time, without the copy that its padding costs diffusers.

The frames before a clip are its cache, the last frames of the clip before; or its first frame, repeated. diffusers concatenates
them with the clip, which copies it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.native import compute_dtype, is_inference, is_tracing
from ..ops.winograd_clips import clip_winograd_is_faster, convolve_clip
from .accelerated import Accelerated, can_compute, count_call, is_plain_conv3d, original_class

# Of 27 T multiplications per weight and pixel of a frame, folding saves 27. It reads or writes each weight about four times: the
# limit is that of upsampling.py. On a GPU it is not measured, and used only for images, where it saves the most.
MIN_PIXELS = 512
MIN_MULTIPLICATIONS = 2**25  # of a convolution whose frames are convolved: smaller ones take less time than the calls
MIN_PART_PIXELS = 2048  # of the frames that are convolved at once: below that packing the weights again takes time
MIN_PART_CHANNELS = 64  # of its result: below that copying the frames that two parts share takes 1.1 to 1.7 times as long
MAX_NARROW = 20480  # C * T * H of a clip that PyTorch convolves without oneDNN
MAX_ELEMENTS = 2**30  # of a clip: diffusers' classes split larger ones, see `is_plain_conv3d`


class CausalConv3d(Accelerated):
    """``conv(cat([cache or repeated first frame, inputs]))``, and the last frames of that concatenation as the next cache."""

    ranks = (5,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return "it repeats the border in space too" if module.pad_mode == "replicate" else None

    def forward(self: Any, inputs: Tensor, conv_cache: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.pad_mode == "replicate" or not can_compute(self, inputs):
            count_call(self, False)
            return original_class(self).forward(self, inputs, conv_cache, *args, **kwargs)
        return causal_convolution(self, inputs, conv_cache)


def causal_convolution(
    module: Any, x: Tensor, cache: Tensor | None, padded: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return what CogVideoXCausalConv3d's forward returns: the convolution and the next cache. Counts a call of the module.

    Args:
        module: with zero padding in space.
        x: ``(B, C, T, H, W)``.
        cache: the frames before x, or None to repeat its first frame.
        padded: from `room_for_padding`, with x as its last frames; then x is not copied.
    """
    count_call(module, True)
    padding = module.time_kernel_size - 1
    if padding == 0:
        return module.conv(x), None  # diffusers returns a copy of x, which its next call ignores
    if padded is None and can_fold_padding(module, x, cache):
        conv = module.conv
        return convolve_folding_padding(conv.weight, conv.bias, conv.padding, x), last_frames(x, padding).clone()
    before = repeated_first_frame(x, padding) if cache is None else cache
    if padded is None:
        padded = torch.cat([before, x], dim=2)
    else:
        padded[:, :, :padding] = before
    conv = module.conv
    plain = is_plain_conv3d(conv) and padded.numel() <= MAX_ELEMENTS
    out = convolve(padded, conv.weight, conv.bias, conv.padding) if plain else conv(padded)
    return out, padded[:, :, -padding:].clone()


def repeated_first_frame(x: Tensor, count: int) -> Tensor:
    return x[:, :, :1].expand(-1, -1, count, -1, -1)


def without_border(x: Tensor, height: int, width: int) -> Tensor:
    """Return frames without the rows and columns that pad them."""
    return x[..., height : x.shape[3] - height, width : x.shape[4] - width]


def last_frames(x: Tensor, count: int) -> Tensor:
    """Return the last frames, the first repeated if there are too few."""
    if (missing := count - x.shape[2]) > 0:
        x = torch.cat([repeated_first_frame(x, missing), x], dim=2)
    return x[:, :, x.shape[2] - count :]


def room_for_padding(module: Any, x: Tensor, cache: Tensor | None) -> Tensor | None:
    """Return uninitialised memory ``(B, C, padding + T, H, W)`` for the input of the convolution.

    None if it needs no padding, or if the cache does not fit the padding: concatenation handles it as diffusers does.

    Args:
        module: the convolution.
        x: a clip of the shape and layout of its input.
        cache: see `causal_convolution`.
    """
    padding = module.time_kernel_size - 1
    if padding == 0 or can_fold_padding(module, x, cache):
        return None
    batch, channels, frames, height, width = x.shape
    if cache is not None and cache.shape != (batch, channels, padding, height, width):
        return None
    shape = (batch, channels, padding + frames, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=clip_format(x))


def clip_format(x: Tensor) -> torch.memory_format:
    """Return the layout of a clip: channels_last_3d if its channels vary fastest."""
    return torch.channels_last_3d if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format


def can_fold_padding(module: Any, x: Tensor, cache: Tensor | None) -> bool:
    """True if x starts a clip, its frames are large enough for folding to pay, and the weights may be read.

    Not in 16 bits, where the sums of taps would be rounded: the result would be less exact than diffusers'.
    """
    if cache is not None or module.time_kernel_size == 1 or not is_plain_conv3d(module.conv) or compute_dtype(x).itemsize < 4:
        return False
    return has_pixels_to_fold(x) and x.numel() <= MAX_ELEMENTS and not is_tracing()


def has_pixels_to_fold(x: Tensor) -> bool:
    """True if `convolve_folding_padding` of x is faster than a convolution of its repeated first frame."""
    return x.shape[0] * x.shape[3] * x.shape[4] >= MIN_PIXELS and (x.shape[2] == 1 or not x.is_cuda)


def convolve_folding_padding(weight: Tensor, bias: Tensor | None, padding: Any, x: Tensor) -> Tensor:
    """Return the convolution of x after repetitions of its first frame, without computing with them.

    The taps that fall on repetitions of a frame add up to one tap. So the first frame of the result takes one and the second two,
    where the published order takes three each.

    Args:
        weight, bias: ``(out, C, taps, 3, 3)`` and ``(out,)``.
        padding: zeros in time (none), height and width.
        x: ``(B, C, T, H, W)``.
    """
    taps, frames = weight.shape[2], x.shape[2]
    if frames > 1 and _winograd_is_faster(x, weight, bias, padding, frames):
        return convolve_clip(x, weight, bias, repeats_first_frame=True)
    out = _room_for_result(x, weight, bias, padding)
    parts = []
    for frame in range(min(taps - 1, frames)):
        folded = fold_repeated_frame(weight, frame)
        parts.append(convolve(x[:, :, : frame + 1], folded, bias, padding, None if out is None else out[:, :, frame : frame + 1]))
    if frames >= taps:
        parts.append(convolve(x, weight, bias, padding, None if out is None else out[:, :, taps - 1 :]))
    if out is not None:
        return out
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def fold_repeated_frame(weight: Tensor, frame: int) -> Tensor:
    """Return the weight ``(out, C, frame + 1, 3, 3)`` of an early frame of the result, for frames 0 to ``frame`` of the clip.

    The frames before the clip repeat its frame 0, so the taps that fall on them and on frame 0 add up to one.
    """
    repeated = weight.shape[2] - frame
    return torch.cat([weight[:, :, :repeated].sum(2, keepdim=True), weight[:, :, repeated:]], dim=2)


def _room_for_result(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor | None:
    """Return memory for a convolution of as many frames as x has, or None if its parts are to be concatenated."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if torch.is_autocast_enabled(x.device.type) or not is_inference(*tensors) or any(t.dtype != x.dtype for t in tensors):
        return None
    size = (length + 2 * pad - taps + 1 for length, pad, taps in zip(x.shape[3:], padding[1:], weight.shape[3:], strict=True))
    shape = (x.shape[0], weight.shape[0], x.shape[2], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=clip_format(x))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, out: Tensor | None = None) -> Tensor:
    """Return ``conv3d(x, weight, bias, padding=padding)`` of a clip, without padding in time. out: memory for it, in inference.

    On a CPU without gradients it is a Winograd convolution where that is faster by count.

    On a CPU PyTorch convolves one narrow clip (``C * T * H`` up to 20480) in float32 without oneDNN. That takes up to eight
    times as long as convolutions of its frames with oneDNN, one for each tap in time.
    """
    if _winograd_is_faster(x, weight, bias, padding, x.shape[2] - weight.shape[2] + 1):
        return convolve_clip(x, weight, bias, out=out)
    if not is_slow_as_conv3d(x, weight, padding):
        return _convolve_in_parts(x, weight, bias, padding, out)
    frames, count = x.transpose(1, 2).contiguous(), x.shape[2] - weight.shape[2] + 1
    total: Any = None
    for tap, weight_2d in enumerate(weight.unbind(2)):
        part = F.conv2d(frames[:, tap : tap + count].flatten(0, 1), weight_2d, bias if tap == 0 else None, padding=padding[1:])
        total = part if total is None else total.add_(part)
    clip: Tensor = total.unflatten(0, (x.shape[0], count)).transpose(1, 2)
    return clip.contiguous(memory_format=clip_format(x)) if out is None else out.copy_(clip)


def _convolve_in_parts(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, out: Tensor | None) -> Tensor:
    """`convolve`, in float32 inference on a CPU some frames at a time.

    oneDNN copies its input and its result to layouts of its own: for parts of the clip they are small. It packs the weights for
    each part.
    """
    taps, frames = weight.shape[2], x.shape[2] - weight.shape[2] + 1
    # Fewest frames of a part's result. Its input has taps - 1 more, and must not be narrow.
    fewest = max(MAX_NARROW // (x.shape[1] * x.shape[3]) + 2 - taps, frames_with_pixels(x, MIN_PART_PIXELS))
    divides = frames >= 2 * fewest and weight.shape[0] >= MIN_PART_CHANNELS
    if x.device.type != "cpu" or x.dtype != torch.float32 or not divides or not is_inference(x, weight):
        whole = F.conv3d(x, weight, bias, padding=padding)
        return whole if out is None else out.copy_(whole)
    for first, end in equal_parts(frames, fewest):
        part = F.conv3d(x[:, :, first : end + taps - 1], weight, bias, padding=padding)
        if out is None:
            shape = (*part.shape[:2], frames, *part.shape[3:])
            out = torch.empty(shape, dtype=part.dtype, device=x.device, memory_format=clip_format(x))
        out[:, :, first:end] = part
    assert out is not None
    return out


def _winograd_is_faster(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, frames: int) -> bool:
    return tuple(padding) == (0, 1, 1) and clip_winograd_is_faster(x, weight, bias, frames)


def frames_with_pixels(x: Tensor, pixels: int) -> int:
    """Return the fewest frames of a clip ``(B, C, T, H, W)`` that have so many pixels, in all images of the batch."""
    return -(-pixels // (x.shape[0] * x.shape[3] * x.shape[4]))


def equal_parts(frames: int, fewest: int) -> list[tuple[int, int]]:
    """Divide frames into as many equal parts as possible, of at least ``fewest`` frames: the first frame and the end of each.

    They differ by one frame at most. Fewer frames than that are one part.
    """
    count = max(1, frames // fewest)
    ends = [frames * part // count for part in range(count + 1)]
    return list(pairwise(ends))


def is_slow_as_conv3d(x: Tensor, weight: Tensor, padding: Any) -> bool:
    """True if PyTorch would convolve the clip without oneDNN, and its frames with it, and they are not tiny."""
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or x.shape[2] < weight.shape[2]:
        return False
    if is_tracing() or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        return False
    if weight.numel() * x[0, 0].numel() < MIN_MULTIPLICATIONS:
        return False
    internal: Any = torch._C
    backend = internal._select_conv_backend(x, weight, None, [1] * 3, list(padding), [1] * 3, False, [0] * 3, 1)
    return bool(backend == internal._ConvBackend.Slow3d)
