"""Residual blocks with a time embedding, and their biases. test_acceleration.py runs blocks in models."""

from unittest import mock

import pytest
import torch
from accelerated_models import assert_same, randomised
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D

from movq_ext import accelerate
from movq_ext.model import fusion


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("skip_time_act", [False, True])
def test_blocks_with_a_time_embedding(scale_shift, skip_time_act):
    torch.manual_seed(0)
    block = randomised(ResnetBlock2D(
        in_channels=32, out_channels=64, temb_channels=8, skip_time_act=skip_time_act, output_scale_factor=2.0,
        time_embedding_norm="scale_shift" if scale_shift else "default",
    ))  # fmt: skip
    x, temb = torch.randn(2, 32, 6, 5), torch.randn(2, 8)
    results = []
    for _ in range(2):
        with torch.no_grad():
            out = block(x, temb)
        leaves = [x.clone().requires_grad_(), temb.clone().requires_grad_()]
        results.append([out, *torch.autograd.grad(block(*leaves).square().sum(), leaves)])
        accelerate(block)
    assert_same(results[1], results[0])
    with pytest.raises((TypeError, ValueError, AttributeError)):
        block(x, None)  # the error of diffusers


@torch.no_grad()
def test_an_embedding_without_a_projection_is_left_to_diffusers():
    """It is added without one."""
    block = randomised(ResnetBlock2D(in_channels=32, temb_channels=None))
    x, temb = torch.randn(2, 32, 6, 5), torch.randn(2, 32, 1, 1)
    expected, plain = block(x, temb), block(x, None)
    accelerate(block)
    assert torch.equal(block(x, temb), expected)
    assert_same([block(x, None)], [plain])


@pytest.mark.parametrize("out_channels", [32, 64])
@pytest.mark.parametrize("norm", [ResnetBlock2D, ResnetBlockCondNorm2D])
@torch.no_grad()
def test_every_bias_is_added_once(norm, out_channels, monkeypatch):
    """As on a GPU, where later kernels add the biases of conv1, conv2 and the shortcut."""
    torch.manual_seed(0)
    spatial = norm is ResnetBlockCondNorm2D
    kind = dict(time_embedding_norm="spatial", temb_channels=4) if spatial else dict(temb_channels=None)
    block = randomised(norm(in_channels=32, out_channels=out_channels, output_scale_factor=3.0, **kind))
    x, zq = torch.randn(2, 32, 6, 4), torch.randn(2, 4, 3, 2) if spatial else None
    expected = block(x, zq)
    accelerate(block)
    monkeypatch.setattr(fusion, "runs_kernels", lambda x: True)
    with mock.patch.object(fusion, "add_bias_residual_", wraps=fusion.add_bias_residual_) as added:
        assert_same([block(x, zq)], [expected])
    ((_, bias, _),) = [call.args for call in added.call_args_list]
    shortcut = 0 if block.conv_shortcut is None else block.conv_shortcut.bias
    assert torch.equal(bias, block.conv2.bias + shortcut)


@torch.no_grad()
def test_the_shortcut_keeps_its_bias_where_conv2_keeps_its_own(monkeypatch):
    block = randomised(ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=None))
    accelerate(block)
    block.conv2.register_forward_hook(lambda layer, inputs, out: None)
    monkeypatch.setattr(fusion, "runs_kernels", lambda x: True)
    with torch.profiler.profile(record_shapes=True) as profile:
        block(torch.randn(2, 32, 6, 4), None)
    biases = [event.input_shapes[2] for event in profile.events() if event.name == "aten::conv2d"]
    assert biases == [[], [64], [64]]  # conv1, conv2, conv_shortcut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_blocks_with_an_embedding_are_left_to_diffusers_where_ours_take_more_passes(layout, dtype):
    block = randomised(ResnetBlock2D(in_channels=32, temb_channels=8)).to(dtype)
    report = accelerate(block)
    block(torch.randn(1, 32, 6, 5, dtype=dtype).contiguous(memory_format=layout), torch.randn(1, 8, dtype=dtype))
    served = dtype == torch.bfloat16 or layout == torch.contiguous_format
    assert (report.calls()["ResnetBlock2D"].accelerated, report.calls()["ResnetBlock2D"].original) == (served, not served)


@torch.no_grad()
def test_a_block_without_a_norm_to_fuse_is_left_to_diffusers():
    block = randomised(ResnetBlock2D(in_channels=32, temb_channels=None))
    report = accelerate(block)
    handles = [norm.register_forward_hook(lambda *_: None) for norm in (block.norm1, block.norm2)]
    block(torch.randn(1, 32, 6, 5), None)
    handles[0].remove()
    block(torch.randn(1, 32, 6, 5), None)
    assert (report.calls()["ResnetBlock2D"].accelerated, report.calls()["ResnetBlock2D"].original) == (1, 1)


@torch.no_grad()
@pytest.mark.parametrize("hooked", [["norm1"], ["norm1", "norm2"]])
def test_a_block_without_norms_of_ours_counts_as_original(hooked):
    block = randomised(ResnetBlockCondNorm2D(in_channels=32, time_embedding_norm="spatial", temb_channels=4))
    report = accelerate(block)
    for norm in hooked:
        getattr(block, norm).conv_y.register_forward_hook(lambda layer, inputs, out: None)
    block(torch.randn(2, 32, 6, 4), torch.randn(2, 4, 3, 2))
    calls = report.calls()["ResnetBlockCondNorm2D"]
    assert (calls.accelerated, calls.original) == ((1, 0) if len(hooked) == 1 else (0, 1))
