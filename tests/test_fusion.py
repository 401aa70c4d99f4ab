"""Which layers may be computed together, and the fused computations against the separate ones."""

import published
import pytest
import torch
from models import draw, offload, quantise, scaled
from spies import record_calls
from tolerances import assert_close, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import movq_ext
from movq_ext.model import fusion
from movq_ext.model.fusion import (
    add_residual,
    conv_deferring_bias,
    is_plain_conv,
    is_plain_conv1x1,
    is_plain_conv3x3,
    is_plain_group_norm,
    is_unmodified,
    plain_weight,
    run_conv1x1,
    run_fused,
    runs_inference,
)


def conv3x3(channels=8, out_channels=8, **changes):
    torch.manual_seed(0)
    return nn.Conv2d(channels, out_channels, 3, **{"padding": 1, **changes}).double()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Pretend that tensors are on a GPU."""
    monkeypatch.setattr(fusion, "runs_kernels", lambda x: True)


def test_plain_convolutions():
    assert is_plain_conv3x3(conv3x3()) and not is_plain_conv1x1(conv3x3())
    assert is_plain_conv1x1(nn.Conv2d(8, 4, 1)) and not is_plain_conv3x3(nn.Conv2d(8, 4, 1))
    assert is_plain_conv(conv3x3(bias=False))


OTHER_CONVOLUTIONS = {
    "5x5": lambda: nn.Conv2d(8, 8, 5, padding=2),
    "1x3": lambda: nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
    "without padding": lambda: conv3x3(padding=0),
    "padding by name": lambda: conv3x3(padding="same"),
    "circular padding": lambda: conv3x3(padding_mode="circular"),
    "stride": lambda: conv3x3(stride=2),
    "dilation": lambda: conv3x3(dilation=2),
    "groups": lambda: conv3x3(groups=2),
    "subclass": lambda: scaled(conv3x3()),
    "linear": lambda: nn.Linear(8, 8),
    "hook": lambda: modified(lambda conv: conv.register_forward_hook(lambda layer, inputs, out: None)),
    "patched forward": lambda: modified(lambda conv: setattr(conv, "forward", lambda x: x)),
    "patched _conv_forward": lambda: modified(lambda conv: setattr(conv, "_conv_forward", lambda x, weight, bias: x)),
    "compiled": lambda: modified(lambda conv: conv.compile(backend="eager")),
    "quantised weight": lambda: quantise(conv3x3()),
    "quantised bias": lambda: modified(lambda conv: setattr(conv, "bias", quantise(nn.GroupNorm(1, 8)).weight)),
}


def modified(change):
    conv = conv3x3()
    change(conv)
    return conv


@pytest.mark.parametrize("name", OTHER_CONVOLUTIONS)
def test_other_convolutions_are_not_plain(name):
    assert not is_plain_conv(OTHER_CONVOLUTIONS[name]())


def test_a_patched_class_is_not_plain(monkeypatch):
    conv = conv3x3()
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: x)
    assert not is_plain_conv(conv)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_modify_a_module(kind):
    norm = nn.GroupNorm(2, 8)
    assert is_unmodified(norm) and is_plain_group_norm(norm)
    handle = getattr(norm, f"register_{kind}_hook")(lambda *_: None)
    assert not is_unmodified(norm) and not is_plain_group_norm(norm)
    handle.remove()
    assert is_unmodified(norm)


def test_global_hooks_modify_every_module():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not is_unmodified(nn.ReLU())
    finally:
        handle.remove()
    assert is_unmodified(nn.ReLU())


def test_observers_do_not_modify_a_module():
    block = movq_ext.ResnetBlock(in_channels=32)
    with movq_ext.annotate(block), FlopCounterMode(display=False):
        assert all(is_unmodified(module) for module in block.modules())


def test_plain_weights_say_what_inputs_a_layer_takes():
    conv = conv3x3()
    assert plain_weight(conv) is conv.weight
    assert plain_weight(nn.Sequential(conv)) is plain_weight(quantise(conv3x3())) is plain_weight(offload(conv3x3())) is None


def test_inference_is_where_nothing_records_a_gradient():
    layer, x = nn.Linear(3, 3), torch.zeros(2, 3)
    assert not runs_inference(layer, x)
    with torch.no_grad():
        assert runs_inference(layer, x) and runs_inference(layer, x, None)
        assert not runs_inference(layer, [1.0])
        assert not torch.compile(lambda: runs_inference(layer, x), backend="eager")()
    layer.requires_grad_(False)
    assert runs_inference(layer, x)
    assert not runs_inference(layer, x, x.clone().requires_grad_())
    assert not runs_inference(layer, [1.0])


def test_run_fused_opens_the_range_of_the_layer():
    block, x = movq_ext.ResnetBlock(in_channels=32), torch.randn(1, 32, 4, 4)
    with torch.no_grad(), movq_ext.annotate(block), torch.profiler.profile() as profiler:
        run_fused(block.norm1, x, None)
    assert sum(event.name == "norm1" for event in profiler.events()) == 1


@torch.no_grad()
def test_a_bias_is_deferred_on_a_gpu_only(monkeypatch):
    conv, x = conv3x3(), draw(2, 8, 4, 5)
    out, bias = conv_deferring_bias(conv, x)
    assert bias is None and torch.equal(out, conv(x))
    monkeypatch.setattr(fusion, "runs_kernels", lambda x: True)
    out, bias = conv_deferring_bias(conv, x)
    assert bias is conv.bias
    assert_close(out + bias[:, None, None], conv(x))


@torch.no_grad()
def test_deferred_biases_add_up(on_a_gpu):
    conv, x, other = conv3x3(), draw(2, 8, 4, 5), draw(8)
    assert torch.equal(conv_deferring_bias(conv, x, other)[1], conv.bias + other)
    assert conv_deferring_bias(conv3x3(bias=False), x, other)[1] is other
    assert conv_deferring_bias(scaled(conv), x, other)[1] is other
    assert conv_deferring_bias(conv3x3(bias=False), x)[1] is None


def test_a_trained_convolution_keeps_its_bias(on_a_gpu):
    conv, x = conv3x3(), draw(2, 8, 4, 5)
    out, bias = conv_deferring_bias(conv, x)
    assert bias is None and out.requires_grad
    assert_close(out, conv(x))


def conv1x1(channels=8, out_channels=6, dtype=torch.bfloat16, **changes):
    torch.manual_seed(0)
    return nn.Conv2d(channels, out_channels, 1, **changes).to(dtype)


@pytest.fixture
def products(monkeypatch):
    """The shape of every map that a matrix product convolves."""
    return record_calls(monkeypatch, fusion, "multiply_pixels", lambda out, x, weight, bias: x.shape)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_1x1_convolution_is_a_matrix_product_on_a_gpu(on_a_gpu, products, dtype, bias):
    conv, x = conv1x1(dtype=dtype, bias=bias), draw(2, 8, 4, 5).to(dtype, memory_format=torch.channels_last)
    out = run_conv1x1(conv, x)
    assert products == [(2, 8, 4, 5)]
    assert out.shape == (2, 6, 4, 5) and out.is_contiguous(memory_format=torch.channels_last)
    biases = conv.bias.double() if bias else torch.zeros(6).double()
    assert_close(out, published.conv1x1(x.double(), conv.weight.double(), biases))


@torch.no_grad()
def test_other_1x1_convolutions_stay_convolutions(on_a_gpu, products, monkeypatch):
    x = draw(2, 8, 4, 5).to(torch.bfloat16, memory_format=torch.channels_last)
    run_conv1x1(conv1x1(dtype=torch.float32), x.float())  # cuDNN convolves in TF32
    run_conv1x1(conv1x1(), x.contiguous())
    run_conv1x1(scaled(conv1x1()), x)
    with torch.enable_grad():
        assert run_conv1x1(conv1x1(), x).requires_grad
    monkeypatch.setattr(fusion, "runs_kernels", lambda x: False)
    run_conv1x1(conv1x1(), x)
    assert products == []


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda **c: movq_ext.ResnetBlock(in_channels=32, out_channels=64, **c),
                                  lambda **c: movq_ext.AttnBlock(32, **c)], ids=["ResnetBlock", "AttnBlock"])  # fmt: skip
def test_blocks_multiply_on_a_gpu(on_a_gpu, products, make):
    """The shortcut; q, k applied to the queries, and v."""
    torch.manual_seed(0)
    block, x, zq = make(zq_ch=4).bfloat16(), draw(1, 32, 6, 8).bfloat16(), draw(1, 4, 3, 4).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    out = block(x, zq=zq)
    assert len(products) == (1 if isinstance(block, movq_ext.ResnetBlock) else 3)
    assert relative_error(out, block.double()(x.double(), zq=zq.double())) < 2e-2


@torch.no_grad()
def test_a_bias_of_another_half_precision_is_added_at_once(on_a_gpu):
    conv, x = conv3x3().half(), draw(2, 8, 4, 5).half()
    with torch.autocast("cpu", torch.bfloat16):
        out, bias = conv_deferring_bias(conv, x, other := torch.zeros(8))
    assert out.dtype == torch.bfloat16 and bias is other
    assert_close(out, conv.double()(x.double()), slack=2)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 8, dtype=torch.float64)], ids=["no bias", "bias"])
def test_add_residual(bias):
    conv, x = conv3x3(), draw(2, 8, 4, 5)
    expected = x + conv(x) + (0 if bias is None else bias[:, None, None])
    assert_close(add_residual(conv(x), bias, x, conv), expected)
    with torch.no_grad():
        h = conv(x)
        assert add_residual(h, bias, x, conv) is h
        assert_close(h, expected)
        h, kept = conv(x), conv(x)
        assert_close(add_residual(h, bias, x, scaled(conv)), expected)  # an adapter may hold h
        assert torch.equal(h, kept)


@torch.no_grad()
def test_add_residual_has_the_dtype_of_its_maps():
    """A deferred float32 bias must not widen half-precision maps."""
    h, x, bias = draw(1, 8, 2, 2).bfloat16(), draw(1, 8, 2, 2).bfloat16(), torch.ones(8)
    for conv in (conv3x3(), scaled(conv3x3())):
        assert add_residual(h.clone(), bias, x, conv).dtype == torch.bfloat16
    assert add_residual(h, bias, x.float(), conv3x3()).dtype == torch.float32
