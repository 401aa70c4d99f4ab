"""Attention blocks whose normalised input serves as both keys and values."""

import copy
from unittest import mock

import published
import pytest
import torch
from models import draw, latents, make_decoder, randomize, scaled
from spies import record_calls
from tolerances import assert_close, relative_error
from torch import nn

from movq_ext import AttnBlock
from movq_ext.model import layers, strips
from movq_ext.model.fusion import absorb_keys

HALF = [torch.float16, torch.bfloat16]
PARAMETERS = [f"{layer}.{kind}" for layer in ("q", "k", "v", "proj_out") for kind in ("weight", "bias")]


def attention_block(x, block, zq):
    """The published order."""
    norm = block.norm
    n = (
        published.group_norm(x, 32, norm.weight, norm.bias, 1e-6)
        if zq is None
        else published.spatial_norm_layer(dict(norm.named_parameters()), x, zq)
    )
    q, k, v = (published.conv1x1(n, layer.weight, layer.bias) for layer in (block.q, block.k, block.v))
    return x + published.conv1x1(published.attention(q, k, v), block.proj_out.weight, block.proj_out.bias)


@pytest.fixture
def every_dtype(monkeypatch):
    """Let float64 share keys and values too, to compare with the formula in full precision. Lists the calls."""
    monkeypatch.setattr(layers, "SHARED_KV_DTYPES", (torch.float64, *HALF))
    return record_calls(monkeypatch, layers, "spatial_shared_kv_attention", lambda out, q, kv, scale: (q, kv))


@pytest.fixture
def shared_calls(monkeypatch):
    return record_calls(monkeypatch, layers, "spatial_shared_kv_attention", lambda out, q, kv, scale: (q, kv))


@pytest.mark.parametrize("channels", [32, 128])  # with a scale of 2^-2.5 and 2^-3.5
@pytest.mark.parametrize("zq_ch", [None, 4])
def test_it_is_the_published_formula(every_dtype, zq_ch, channels):
    block, x = randomize(AttnBlock(channels, zq_ch).double()), draw(2, channels, 5, 3)
    zq = None if zq_ch is None else draw(2, zq_ch, 2, 3)
    expected = attention_block(x, block, zq)
    assert_close(block(x, zq), expected)
    with torch.no_grad():
        assert_close(block(x, zq), expected)
    assert len(every_dtype) == 2


def test_gradients_are_those_of_the_published_formula(every_dtype):
    block, x, zq = randomize(AttnBlock(32, 4).double()), draw(2, 32, 5, 3).requires_grad_(), draw(2, 4, 2, 3).requires_grad_()
    inputs, dout = [x, zq, *block.parameters()], draw(2, 32, 5, 3, seed=1)
    names = ["x", "zq", *(name for name, _ in block.named_parameters())]
    expected = torch.autograd.grad(attention_block(x, block, zq), inputs, dout)
    actual = torch.autograd.grad(block(x, zq), inputs, dout)
    assert every_dtype and set(PARAMETERS) < set(names)
    for name, grad, want in zip(names, actual, expected, strict=True):
        if name == "k.bias":  # it adds the same to all scores of a query
            assert torch.equal(grad, torch.zeros(32)) and want.abs().max() < 1e-12
        else:
            assert_close(grad, want, slack=10)


def test_the_bias_of_frozen_keys_gets_no_gradient(every_dtype):
    block = randomize(AttnBlock(32).double())
    block.k.requires_grad_(False)
    block(draw(1, 32, 3, 5)).sum().backward()
    assert block.k.bias.grad is None and block.q.bias.grad is not None


@pytest.mark.parametrize("dtype", HALF)
def test_16_bit_types_share_keys_and_values(shared_calls, dtype):
    block, x = AttnBlock(32).to(dtype), draw(1, 32, 3, 5).to(dtype)
    block(x)
    with torch.inference_mode():
        block(x)
    assert [(q.dtype, kv.dtype) for q, kv in shared_calls] == [(dtype, dtype)] * 2


def test_float32_does_not():
    with mock.patch.object(layers, "spatial_shared_kv_attention") as shared:
        AttnBlock(32)(draw(1, 32, 3, 5).float())
    assert not shared.called


def test_autocast_decides_and_casts_once(shared_calls):
    block, x = randomize(AttnBlock(32)), draw(2, 32, 3, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    ((q, kv),) = shared_calls
    assert q.dtype == kv.dtype == torch.bfloat16
    assert relative_error(out, block(x)) < 2e-2
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in block.parameters())


@pytest.mark.parametrize("name", ["q", "k", "v", "proj_out"])
@pytest.mark.parametrize("change", ["hook", "adapter"])
def test_layers_that_are_not_plain_are_called(every_dtype, name, change):
    """k and v are needed in the published order. q and proj_out are called in both."""
    block, x, seen = randomize(AttnBlock(32).double()), draw(1, 32, 3, 5), []
    if change == "adapter":
        setattr(block, name, scaled(getattr(block, name)))
        twin = copy.deepcopy(block)
        setattr(twin, name, layer := nn.Conv2d(32, 32, 1).double())
        layer.load_state_dict({key: 2 * value for key, value in getattr(block, name).state_dict().items()})
    else:
        twin = block
        getattr(block, name).register_forward_hook(lambda layer, inputs, out: seen.append((layer, inputs[0], out)))
    assert_close(block(x), attention_block(x, twin, None), slack=10)
    assert len(every_dtype) == (name in ("q", "proj_out"))
    assert len(seen) == (change == "hook")
    for layer, given, out in seen:
        assert_close(out, published.conv1x1(given, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", HALF)
def test_it_is_as_accurate_as_the_published_order(monkeypatch, dtype):
    """Geometric mean of the ratio of the errors against float64, as in benchmarks/accuracy.py."""
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        block, x = AttnBlock(64, 4).to(dtype), torch.randn(1, 64, 16, 16).to(dtype)
        zq = torch.randn(1, 4, 8, 8).to(dtype)
        with torch.no_grad():
            exact = attention_block(x.double(), copy.deepcopy(block).double(), zq.double())
            shared = relative_error(block(x, zq), exact)
            with mock.patch.object(layers, "SHARED_KV_DTYPES", ()):
                ratios.append(shared / relative_error(block(x, zq), exact))
    assert 0.9 < torch.tensor(ratios).log().mean().exp() < 1.05


@pytest.mark.parametrize("channels, exponent", [(32, -3), (256, -4), (512, -5)])
def test_the_scale_does_not_round_the_weights(channels, exponent):
    weight = 1 + torch.rand(channels, channels, 1, 1).half()  # subnormal values would be rounded
    projection, scale = absorb_keys(weight, None, torch.float16)
    assert torch.equal(projection.float(), weight.transpose(0, 1).float() * 2.0**exponent)
    assert scale == pytest.approx(channels**-0.5 / 2.0**exponent)


def test_bfloat16_needs_no_scaled_weights():
    """It has the range of float32, so the projection is a view of the weight."""
    weight = torch.randn(32, 32, 1, 1).bfloat16()
    projection, scale = absorb_keys(weight, None, torch.bfloat16)
    assert projection.data_ptr() == weight.data_ptr() and torch.equal(projection, weight.transpose(0, 1))
    assert scale == 32**-0.5


def test_float16_holds_the_queries_of_large_weights(shared_calls):
    """Without the scale they would overflow."""
    torch.manual_seed(0)
    block, x = AttnBlock(64), draw(1, 64, 8, 8)
    for layer in (block.q, block.k):
        nn.init.normal_(layer.weight, std=15)
    with torch.no_grad():
        n = block.norm(x.float())
        q = block.q(n)
        unscaled = nn.functional.conv2d(q, block.k.weight.transpose(0, 1))
        assert q.abs().max() < 65504 < unscaled.abs().max()
        block, x = block.half(), x.half()
        out = block(x)
        exact = attention_block(x.double(), copy.deepcopy(block).double(), None)
    ((queries, _),) = shared_calls
    assert queries.isfinite().all()
    assert relative_error(out, exact) < 2e-2


@torch.no_grad()
def test_strips_keep_one_tensor_and_normalise_once(monkeypatch):
    decoder = make_decoder().bfloat16()
    z, zq = latents((6, 4), 1, torch.bfloat16)
    stored = record_calls(monkeypatch, strips.Strips, "all_tokens", lambda tokens, *_: [x.dtype for x in tokens])
    norms = record_calls(monkeypatch, strips.NormalisedRows, "write_rows", lambda result, rows, first, last, out: rows.norm)
    out = strips.decode_in_strips(decoder, z, zq)
    assert stored == [[torch.bfloat16]] * 3 and norms.count(decoder.mid.attn_1.norm) == 1
    with mock.patch.object(layers, "SHARED_KV_DTYPES", ()):
        published_order = strips.decode_in_strips(decoder, z, zq)
    assert stored[3:] == [[torch.bfloat16] * 2] * 3
    exact = copy.deepcopy(decoder).double()(z.double(), zq.double())
    assert relative_error(out, exact) < 1.1 * relative_error(published_order, exact)
