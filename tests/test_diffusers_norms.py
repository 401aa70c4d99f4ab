"""Group norms, and spatial norms of Kandinsky and KVAE."""

import pytest
import torch
from accelerated_models import Counted, assert_same, diffusers, randomised
from diffusers.models.attention_processor import SpatialNorm
from torch import nn

from movq_ext import accelerate


@torch.no_grad()
def test_kvae():
    torch.manual_seed(0)
    if not hasattr(diffusers, "AutoencoderKLKVAE"):
        pytest.skip("diffusers has no KVAE")
    from diffusers.models.autoencoders.autoencoder_kl_kvae import KVAEDecoderSpatialNorm2D

    for add_conv in (False, True):
        norm = randomised(KVAEDecoderSpatialNorm2D(32, 4, add_conv))
        f, zq = torch.randn(2, 32, 8, 6), torch.randn(2, 4, 4, 3)
        expected = norm(f, zq)
        assert accelerate(norm).replaced == {"KVAEDecoderSpatialNorm2D": ["KVAEDecoderSpatialNorm2D"]}
        with Counted() as counted:
            assert_same([norm(f, zq)], [expected])
        assert counted.calls == (1, 0, 0)
    model = randomised(diffusers.AutoencoderKLKVAE(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 2)))
    z = torch.randn(1, 4, 4, 4)
    expected = model.decode(z).sample
    accelerate(model)
    assert_same([model.decode(z).sample], [expected])


@torch.no_grad()
def test_a_latent_of_another_batch_size_is_left_to_diffusers():
    norm = SpatialNorm(32, 4)
    f, zq = torch.randn(2, 32, 4, 6), torch.randn(1, 4, 2, 3)
    expected = norm(f, zq)
    accelerate(norm)
    assert torch.equal(norm(f, zq), expected)
    assert_same([norm(f[:1], zq)], [expected[:1]])


@torch.no_grad()
def test_only_the_group_norm_before_the_last_convolution_is_replaced():
    model = nn.ModuleDict({"norm": nn.GroupNorm(2, 4), "conv_norm_out": nn.GroupNorm(2, 4)})
    maps = [torch.randn(2, 4, 3, 5), torch.randn(2, 4, 7)]  # a feature map, and tokens
    expected = [model["conv_norm_out"](x) for x in maps]
    assert accelerate(model).replaced == {"GroupNorm": ["conv_norm_out"]}
    with Counted() as counted:
        assert_same([model["conv_norm_out"](x) for x in maps], expected)
    assert counted.calls == (1, 0, 0)
