"""Accumulating convolutions of strips, with weights packed for oneDNN and without."""

import pytest
import torch
import torch.nn.functional as F
from models import QuantisedWeight
from tolerances import assert_close
from torch.utils.flop_counter import FlopCounterMode

from movq_ext.ops.onednn import Convolution

HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_BF16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
PADDINGS = {(3, 3): (1, 1), (3, 1): (1, 0), (1, 1): (0, 0), (2, 2): (0, 1), (3, 4): (0, 2)}


def draw(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def arguments(kernel=(3, 3), dtype=torch.float32, bias=True, size=(9, 7)):
    """Weight, bias, padding, input and accumulator of a convolution of one image."""
    weight, padding = draw(6, 4, *kernel, dtype=dtype) / 4, PADDINGS[kernel]
    x = draw(1, 4, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    out = draw(1, 6, *F.conv2d(x.float(), weight.float(), padding=padding).shape[2:], dtype=dtype)
    return weight, draw(6, dtype=dtype) if bias else None, padding, x, out.contiguous(memory_format=torch.channels_last)


def expected_sum(weight, bias, padding, x, out):
    return out.double() + F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", PADDINGS)
def test_the_convolution_is_added_to_the_output(kernel, dtype, bias, onednn):
    weight, bias, padding, x, out = arguments(kernel, dtype, bias)
    expected, strides = expected_sum(weight, bias, padding, x, out), out.stride()
    with torch.backends.mkldnn.flags(enabled=onednn):
        Convolution(weight, bias, padding, x.shape).add_to(out, x)
    assert_close(out, expected)
    assert out.dtype == dtype and out.stride() == strides


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_only_the_dtypes_of_onednn_are_packed(dtype):
    weight, bias, padding, x, _ = arguments(dtype=dtype)
    packed = Convolution(weight, bias, padding, x.shape).packed is not None
    assert packed == {torch.float32: HAS_ONEDNN, torch.bfloat16: HAS_BF16}.get(dtype, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_packed_weight_is_freed_on_request(dtype):
    weight, bias, padding, x, out = arguments(dtype=dtype)
    expected = expected_sum(weight, bias, padding, x, out)
    convolution = Convolution(weight, bias, padding, x.shape, keep_weight=False)
    assert (convolution.weight is None) == (convolution.packed is not None)
    convolution.add_to(out, x)
    assert_close(out, expected)


def test_nothing_is_packed_where_onednn_is_off():
    weight, bias, padding, x, _ = arguments()
    with torch.backends.mkldnn.flags(enabled=False):
        assert Convolution(weight, bias, padding, x.shape).packed is None


def test_nothing_is_packed_without_the_operators(monkeypatch):
    class Without:
        """A PyTorch without Inductor's operators."""

    weight, bias, padding, x, out = arguments()
    expected = expected_sum(weight, bias, padding, x, out)
    monkeypatch.setattr(torch.ops, "mkldnn", Without())
    convolution = Convolution(weight, bias, padding, x.shape)
    convolution.add_to(out, x)
    assert convolution.packed is None
    assert_close(out, expected)


def test_a_quantised_weight_is_not_packed():
    weight, bias, padding, x, out = arguments()
    convolution = Convolution(weight.as_subclass(QuantisedWeight), bias, padding, x.shape)
    expected = expected_sum(2 * weight, bias, padding, x, out)
    convolution.add_to(out, x)
    assert convolution.packed is None
    assert_close(out, expected)


def test_nothing_is_packed_on_other_devices():
    weight, bias, padding, x, out = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments())
    convolution = Convolution(weight, bias, padding, x.shape)
    convolution.add_to(out, x)
    assert convolution.packed is None


@pytest.mark.parametrize("size", [(1, 7), (33, 40), (4, 1)])
def test_inputs_of_other_sizes_than_the_weight_was_packed_for(size):
    weight, bias, padding, x, out = arguments(size=size)
    expected = expected_sum(weight, bias, padding, x, out)
    Convolution(weight, bias, padding, (1, 4, 9, 7)).add_to(out, x)
    assert_close(out, expected)


def test_one_convolution_serves_many_strips():
    weight, bias, padding, x, out = arguments()
    convolution = Convolution(weight, bias, padding, x.shape)
    expected = expected_sum(weight, bias, padding, x, expected_sum(weight, bias, padding, x, out))
    for _ in range(2):
        convolution.add_to(out, x)
    assert_close(out, expected)


def test_an_output_with_gaps_between_rows():
    """A strip's rows of a larger map."""
    weight, bias, padding, x, _ = arguments()
    large = draw(1, 6, 20, 11).contiguous(memory_format=torch.channels_last)
    before, rows = large.clone(), large[:, :, 3:12, 2:9]
    expected = expected_sum(weight, bias, padding, x, rows)
    Convolution(weight, bias, padding, x.shape).add_to(rows, x)
    assert_close(rows, expected)
    before[:, :, 3:12, 2:9] = large[:, :, 3:12, 2:9]
    assert torch.equal(large, before)


def test_autocast_casts_a_weight_of_another_dtype():
    weight, bias, padding, x, out = arguments()
    expected = expected_sum(weight, bias, padding, x, out)
    convolution = Convolution(weight, bias, padding, x.shape)
    half = out.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        convolution.add_to(half, x.bfloat16())
    assert_close(half, expected)
    with pytest.raises(RuntimeError, match="type"):
        convolution.add_to(out.bfloat16(), x.bfloat16())


def test_channels_that_do_not_match_are_refused():
    weight, bias, padding, x, out = arguments()
    with pytest.raises(RuntimeError):
        Convolution(weight, bias, padding, x.shape).add_to(out, x[:, :3])


@pytest.mark.parametrize("onednn", [True, False])
def test_flops_are_counted(onednn):
    weight, bias, padding, x, out = arguments()
    with torch.backends.mkldnn.flags(enabled=onednn):
        convolution = Convolution(weight, bias, padding, x.shape)
        with FlopCounterMode(display=False) as counter:
            convolution.add_to(out, x)
    assert counter.get_total_flops() == 2 * out.numel() * weight[0].numel()
