"""Winograd convolutions of clips: values, frames before the clip, strips, layouts, and when they are used."""

import pytest
import torch
import torch.nn.functional as F
from spies import record_calls
from tolerances import assert_close

from movq_ext.ops import winograd, winograd_clips
from movq_ext.ops.winograd import WINOGRAD_BYTES, WinogradConvolution, winograd_is_faster
from movq_ext.ops.winograd_clips import clip_winograd_is_faster, convolve_clip

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
F64 = torch.float64


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F64).to(dtype)


def arguments(frames=4, size=(9, 7), channels=3, out_channels=5, batch=1, taps=3, dtype=torch.float32):
    """A clip, weight and bias."""
    weight = draw(out_channels, channels, taps, 3, 3, dtype=dtype) / (9 * taps * channels) ** 0.5
    return draw(batch, channels, frames, *size, dtype=dtype), weight, draw(out_channels, dtype=dtype)


def expected(x, weight, bias, repeats_first_frame=False):
    x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    if repeats_first_frame:
        x = torch.cat([x[:, :, :1]] * (weight.shape[2] - 1) + [x], dim=2)
    return F.conv3d(x, weight, bias, padding=(0, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (3, 2), (1, 1), (14, 33)])
def test_values(size, dtype):
    """Heights and widths that the tiles divide, and others."""
    x, weight, bias = arguments(size=size, dtype=dtype)
    out = convolve_clip(x, weight, bias)
    assert_close(out, expected(x, weight, bias))
    assert out.dtype == dtype and out.shape == (1, 5, 2, *size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_frames_before_the_clip_repeat_its_first(frames, taps, layout):
    x, weight, bias = arguments(frames, batch=2, taps=taps)
    x = x.contiguous(memory_format=layout)
    given = x.clone()
    out = convolve_clip(x, weight, bias, repeats_first_frame=True)
    assert_close(out, expected(x, weight, bias, repeats_first_frame=True))
    assert out.is_contiguous(memory_format=layout) and torch.equal(x, given)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("height", [4, 11, 12])
def test_strips(height, layout, threads, monkeypatch):
    """Of four rows, which read one row of their neighbours, for two clips."""
    monkeypatch.setattr(winograd_clips, "STRIP_BYTES", 1)
    x, weight, bias = arguments(size=(height, 6), batch=2)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        out = convolve_clip(x.contiguous(memory_format=layout), weight, bias)
    assert_close(out, expected(x, weight, bias))


@pytest.mark.parametrize("repeats_first_frame", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 8000], ids=["smallest blocks", "some blocks"])
def test_blocks(block_bytes, repeats_first_frame, monkeypatch):
    """Of a strip that exceeds a block's memory: fewer rows of tiles, then fewer columns."""
    monkeypatch.setattr(winograd, "MAX_BLOCK_BYTES", block_bytes)
    blocks = record_calls(monkeypatch, WinogradConvolution, "_write_block", lambda result, convolution, out, *_: out.shape[:3])
    x, weight, bias = arguments(size=(9, 40), batch=2)
    out = convolve_clip(x, weight, bias, repeats_first_frame)
    assert_close(out, expected(x, weight, bias, repeats_first_frame))
    assert len(blocks) > 6 and {shape[0] for shape in blocks} == {out.shape[2]}


def test_blocks_grow_with_the_factors():
    """With three taps in time, a block reads three times the factors, so it may have three times the pixels."""
    one, three = (WinogradConvolution(draw(4, 4, taps, 3, 3), None, 1 << 30) for taps in (1, 3))
    assert three.block_bytes == 3 * one.block_bytes == 3 * winograd.MAX_BLOCK_BYTES


def test_without_a_bias_and_into_memory_of_a_larger_clip():
    x, weight, _ = arguments()
    memory = torch.zeros(1, 5, 4, 9, 7)
    out = convolve_clip(x, weight, None, out=memory[:, :, 1:3])
    assert_close(memory[:, :, 1:3], expected(x, weight, None))
    assert out.data_ptr() == memory[:, :, 1:3].data_ptr() and not memory[:, :, [0, 3]].any()


def wide(**changes):
    return arguments(**{"frames": 4, "size": (32, 32), "channels": 128, "out_channels": 128, **changes})


def test_wide_clips_are_faster():
    x, weight, bias = wide()
    assert clip_winograd_is_faster(x, weight, bias, 2)
    assert clip_winograd_is_faster(x.double(), weight.double(), bias.double(), 2)
    assert clip_winograd_is_faster(x, weight, None, 2)


def test_frames_share_their_operators():
    """A single image of this size is convolved directly: the operators take longer to start than they save."""
    x, weight, bias = wide(channels=96, out_channels=96, size=(40, 40))
    assert not winograd_is_faster(weight[:, :, 0], [(40, 40)], WINOGRAD_BYTES)
    assert clip_winograd_is_faster(x, weight, bias, 2)


def test_where_conv3d_is_faster_or_needed():
    """Few pixels, narrow clips, gradients, autocast, other types of numbers, and sizes that do not fit."""
    assert not clip_winograd_is_faster(*wide(size=(31, 32)), 2)
    assert not clip_winograd_is_faster(*wide(channels=16, out_channels=16), 2)
    x, weight, bias = wide()
    assert not clip_winograd_is_faster(x, weight.requires_grad_(), bias, 2)
    with torch.no_grad():
        assert clip_winograd_is_faster(x, weight, bias, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert not clip_winograd_is_faster(x, weight, bias, 2)
        assert not clip_winograd_is_faster(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), 2)
        assert not clip_winograd_is_faster(x.double(), weight, bias, 2)
        assert not clip_winograd_is_faster(x[:, :96], weight, bias, 2)
        assert not clip_winograd_is_faster(x, weight[..., :1], bias, 2)
