"""Group norms, and spatial norms of Kandinsky and KVAE."""

import math

import pytest
import torch
from accelerated_models import Counted, assert_same, diffusers, randomised
from diffusers.models.attention_processor import SpatialNorm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Elements(TorchDispatchMode):
    """Counts the elements that operators read and write."""

    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.count += sum(map(distinct_elements, tensors))
        return out


def distinct_elements(x):
    """Number of elements in memory: an expanded dimension counts once."""
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add_conv", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 4])
@torch.no_grad()
def test_a_spatial_norm_moves_fewer_elements_than_in_diffusers_or_is_left_to_it(layout, dtype, add_conv, ratio):
    kvae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_kvae")
    torch.manual_seed(0)
    norm = randomised(kvae.KVAEDecoderSpatialNorm2D(64, 4, add_conv)).to(dtype).to(memory_format=layout)
    maps = [torch.randn(1, c, s, s, dtype=dtype).to(memory_format=layout) for c, s in ((64, 16), (4, 16 // ratio))]
    with Elements() as theirs:
        expected = norm(*maps)
    report = accelerate(norm)
    with Elements() as ours:
        actual = norm(*maps)
    assert_same([actual], [expected])
    served = report.calls()["KVAEDecoderSpatialNorm2D"].accelerated
    assert ours.count < theirs.count if served else ours.count == theirs.count
    assert served or (dtype == torch.float32 and layout == torch.channels_last and (ratio == 1 or add_conv))


@torch.no_grad()
def test_modulations_have_the_layout_of_the_map():
    """An operator over maps of different layouts is slow on a CPU."""
    norm, f, zq = SpatialNorm(32, 4), torch.randn(2, 32, 8, 6), torch.randn(2, 4, 4, 3)
    accelerate(norm)
    for layout in (torch.contiguous_format, torch.channels_last):
        with Counted() as counted:
            norm(f.contiguous(memory_format=layout), zq)
        ((_, y, b, _),) = [call.args for call in counted.norms[0].call_args_list]
        assert y.is_contiguous(memory_format=layout) and b.is_contiguous(memory_format=layout)
