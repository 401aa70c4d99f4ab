"""Attention with its options, and with other processors, masks and sequences."""

import pytest
import torch
from accelerated_models import Counted, assert_equal, assert_same, kl, outputs, randomised
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor

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
