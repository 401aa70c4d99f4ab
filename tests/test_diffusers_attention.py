"""Attention with its options, and with other processors, masks and sequences."""

import copy

import pytest
import torch
from accelerated_models import Counted, assert_equal, assert_same, kl, outputs, randomised
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor
from tolerances import assert_close, relative_error
from torch import nn

from movq_ext import accelerate


@torch.no_grad()
def test_attention_processors():
    model = kl()
    accelerate(model)
    expected, processors = outputs(model), model.attn_processors
    with Counted() as counted:
        model.set_attn_processor(SlicedAttnProcessor(1))
        assert_same(outputs(model), expected)
        assert counted.calls[1] == 0
        model.set_default_attn_processor()
        assert {type(processor) for processor in model.attn_processors.values()} == {AttnProcessor}
        assert_same(outputs(model), expected)
        assert counted.calls[1] == 2
        model.set_attn_processor(dict(processors))
        model.fuse_qkv_projections()
        assert_same(outputs(model), expected)
        assert counted.calls[1] == 2
        model.unfuse_qkv_projections()
        assert_same(outputs(model), expected)
        assert counted.calls[1] == 4
    model.set_attn_processor(SlicedAttnProcessor(1))
    assert set(accelerate(model).skipped.values()) == {"its processor is SlicedAttnProcessor"}


@torch.no_grad()
def test_masks_and_other_sequences_are_left_to_diffusers():
    torch.manual_seed(0)
    attention = Attention(32, heads=1, dim_head=32, bias=True).eval()
    x = torch.randn(2, 32, 3, 5)
    others = dict(encoder_hidden_states=torch.randn(2, 7, 32)), dict(attention_mask=torch.zeros(2, 1, 15).bernoulli_() * -1e4)
    expected = [attention(x, **other) for other in others] + [attention(x.flatten(2).mT)]
    plain = attention(x)
    accelerate(attention)
    assert_equal([attention(x, **other) for other in others] + [attention(x.flatten(2).mT)], expected)
    assert_same([attention(x)], [plain])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_options_of_attention(bias, residual):
    torch.manual_seed(0)
    options = dict(norm_num_groups=8, spatial_norm_dim=4, rescale_output_factor=2.0, residual_connection=residual, bias=bias)
    attention = randomised(Attention(32, heads=1, dim_head=32, **options))
    x, zq = torch.randn(2, 32, 4, 6), torch.randn(2, 4, 2, 3)
    expected = attention(x, temb=zq)
    accelerate(attention)
    with Counted() as counted:
        assert_same([attention(x, temb=zq)], [expected])
    assert counted.calls == (2, 1, 0)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("replaced", [None, "to_q", "to_k", "to_v"])
@torch.no_grad()
def test_bfloat16_shares_keys_and_values(replaced, bias):
    """Unless to_k or to_v is not plain."""
    torch.manual_seed(0)
    options = dict(norm_num_groups=8, residual_connection=True, bias=bias)
    attention = randomised(Attention(32, heads=1, dim_head=32, **options)).bfloat16()
    x = torch.randn(2, 32, 16, 16).bfloat16()
    if replaced:
        getattr(attention, replaced).__class__ = Doubled
    exact = copy.deepcopy(attention).double()(x.double())
    theirs = attention(x)
    accelerate(attention)
    with Counted() as counted:
        ours = attention(x)
    assert [op.call_count for op in counted.attention] == ([1, 0] if replaced in ("to_k", "to_v") else [0, 1])
    assert relative_error(ours, exact) < 1.1 * relative_error(theirs, exact)


def test_gradients_of_shared_keys_and_values(monkeypatch):
    torch.manual_seed(0)
    attention = randomised(Attention(32, heads=1, dim_head=32, bias=True, norm_num_groups=8)).double()
    x, parameters = torch.randn(2, 32, 4, 6, dtype=torch.float64, requires_grad=True), dict(attention.named_parameters())
    expected = torch.autograd.grad(attention(x).sin().sum(), [x, *parameters.values()])
    accelerate(attention)
    monkeypatch.setattr("movq_ext.diffusers.attention.SHARED_KV_DTYPES", (torch.float64,))
    with Counted() as counted:
        actual = torch.autograd.grad(attention(x).sin().sum(), [x, *parameters.values()])
    assert [op.call_count for op in counted.attention] == [0, 1]
    for name, grad, want in zip(["x", *parameters], actual, expected, strict=True):
        if name == "to_k.bias":  # it adds the same to all scores of a query
            assert torch.equal(grad, torch.zeros(32, dtype=torch.float64)) and want.abs().max() < 1e-12
        else:
            assert_close(grad, want, slack=10)
