"""Upsampling on a CPU without gradients: which way it takes, for one map and for several."""

import pytest
import torch
import torch.nn.functional as F
from models import draw
from spies import record_calls
from tolerances import assert_close

from movq_ext.ops import cpu_upsampling, upsampling
from movq_ext.ops.cpu_upsampling import prepare_upsample_conv
from movq_ext.ops.functional import upsample_conv
from movq_ext.ops.thread_pool import run_in_threads
from movq_ext.ops.winograd_upsampling import WinogradUpsampling

pytestmark = pytest.mark.usefixtures("few_channels")


@pytest.fixture
def prepared(monkeypatch):
    """Return a list that grows with each `WinogradUpsampling`."""
    return record_calls(monkeypatch, WinogradUpsampling, "__init__", lambda *_: True)


def arguments(images=2, height=5, width=3, dtype=torch.float32):
    x, weight, bias = draw(images, 4, height, width), draw(6, 4, 3, 3), draw(6)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def doubled_convolution(x, weight, bias):
    return F.conv2d(
        F.interpolate(x.double(), scale_factor=2.0), weight.double(), None if bias is None else bias.double(), padding=1
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images, height", [(1, 5), (2, 1), (3, 8)])
def test_nine_products_in_threads(prepared, images, height, layout, threads):
    torch.set_num_threads(threads)
    x, weight, bias = arguments(images, height)
    x = x.contiguous(memory_format=layout)
    for maybe_bias in (bias, None):
        out = upsample_conv(x, weight, maybe_bias)
        assert_close(out, doubled_convolution(x, weight, maybe_bias))
        assert out.is_contiguous(memory_format=layout)
    assert len(prepared) == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_slices_keep_their_layout(prepared, layout):
    """The result has the layout that a PyTorch convolution would give it."""
    x, weight, bias = arguments(height=8, width=6)
    for part in (slice(None), (..., slice(5), slice(None)), (..., slice(1, 4)), (slice(1), ...)):
        rows = x.contiguous(memory_format=layout)[part]
        out = upsample_conv(rows, weight, bias)
        assert_close(out, doubled_convolution(rows, weight, bias))
        assert out.is_contiguous(memory_format=layout)
    assert len(prepared) == 4


@pytest.mark.parametrize("case", ["gradients", "bfloat16", "autocast"])
def test_folded_weights(monkeypatch, prepared, case):
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS", 2)
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS_BFLOAT16", 2)
    module = upsampling if case == "gradients" else cpu_upsampling
    folded = record_calls(monkeypatch, module, "fold_upsampling", lambda *_: True)
    x, weight, bias = arguments(dtype=torch.bfloat16 if case == "bfloat16" else torch.float32)
    weight.requires_grad_(case == "gradients")
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        out = upsample_conv(x, weight, bias)
    assert_close(out, doubled_convolution(x, weight, bias), slack=2)
    assert out.dtype == (torch.float32 if case == "gradients" else torch.bfloat16)
    assert folded and not prepared


def test_a_method_on_request(prepared):
    x, weight, bias = arguments()
    for method in ("transposed", "windows", "direct"):
        assert_close(upsample_conv(x, weight, bias, method), doubled_convolution(x, weight, bias))
    assert not prepared


@pytest.mark.parametrize(
    "dtype, pixels, expected", [("float32", 1, "products"), ("bfloat16", 2, "folded"), ("bfloat16", 1, "direct")]
)
def test_several_maps_share_the_factors(monkeypatch, prepared, dtype, pixels, expected):
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS_BFLOAT16", 2)
    folded = record_calls(monkeypatch, cpu_upsampling, "fold_upsampling", lambda *_: True)
    x, weight, bias = arguments(dtype=getattr(torch, dtype))
    upsample = prepare_upsample_conv(weight, bias, x.dtype, pixels)
    for part in (x[:1], x[:, :, :2], x):
        assert_close(upsample(part), doubled_convolution(part, weight, bias), slack=2)
    assert (len(prepared), len(folded)) == (expected == "products", expected == "folded")


def test_within_a_task_of_a_thread():
    """Tasks share the factors, and no task waits for another."""
    torch.set_num_threads(2)
    x, weight, bias = arguments(4)
    upsample = prepare_upsample_conv(weight, bias, x.dtype, x.numel())
    out = torch.cat(run_in_threads(upsample, x.split(1)))
    assert_close(out, doubled_convolution(x, weight, bias))
