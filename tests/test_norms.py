"""The norms against the published layers and torch's own."""

import published
import pytest
import torch
import torch.nn.functional as F
from models import draw, randomize
from spies import record_calls
from tolerances import assert_close
from torch import nn

from movq_ext import GroupNorm, SpatialNorm
from movq_ext.model.modulation import Modulations
from movq_ext.model.norms import is_plain_norm


@pytest.mark.parametrize("zq_grid", [(2, 2), (3, 5), (8, 6)])
def test_spatial_norm_is_the_published_layer(zq_grid):
    layer = randomize(SpatialNorm(64, 4, num_groups=32, eps=1e-6).double())
    f, zq = draw(2, 64, 8, 6), draw(2, 4, *zq_grid, seed=1)
    assert_close(layer(f, zq), published.spatial_norm_layer(layer.state_dict(), f, zq))
    assert_close(layer(f, zq, activation="silu"), published.silu(published.spatial_norm_layer(layer.state_dict(), f, zq)))


def test_add_conv_convolves_the_resized_latent():
    layer = randomize(SpatialNorm(64, 4, add_conv=True, num_groups=32, eps=1e-6).double())
    f, zq = draw(2, 64, 8, 6), draw(2, 4, 4, 3, seed=1)
    convolved = F.conv2d(published.resize(zq, 8, 6), layer.conv.weight, layer.conv.bias, padding=1)
    assert_close(layer(f, zq), published.spatial_norm_layer(layer.state_dict(), f, convolved))
    assert set(layer.state_dict()) == {
        f"{name}.{kind}" for name in ("norm_layer", "conv", "conv_y", "conv_b") for kind in ("weight", "bias")
    }


@pytest.fixture
def resizes(monkeypatch):
    """The channels of every map that is resized."""
    return record_calls(monkeypatch, F, "interpolate", lambda result, x, *args, **kwargs: x.shape[1])


@pytest.mark.parametrize(
    "grid, cell", [((4, 3), (4, 4)), ((1, 2), (8, 4)), ((3, 1), (16, 8)), ((4, 3), (2, 4)), ((4, 3), (1, 1)), ((4, 3), (3, 5))]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_add_conv_convolves_cells_of_the_latent_in_inference(resizes, grid, cell, layout):
    """If the sides of cells are powers of two and at least 4, the latent is never resized."""
    layer = randomize(SpatialNorm(64, 4, add_conv=True, num_groups=32, eps=1e-6).double())
    f = draw(2, 64, *(cells * size for cells, size in zip(grid, cell, strict=True))).contiguous(memory_format=layout)
    zq = draw(2, 4, *grid, seed=1).contiguous(memory_format=layout)
    wanted = layer(f, zq, "silu")
    assert 4 in resizes
    resizes.clear()
    with torch.no_grad():
        assert_close(layer(f, zq, "silu"), wanted)
    assert (resizes == []) == (min(cell) >= 4 and cell != (3, 5))


def test_norm_layer_parameters_reach_the_norm():
    layer = randomize(SpatialNorm(6, 3, num_groups=2, eps=0.5, affine=False).double())
    assert layer.norm_layer.weight is None
    f, zq = draw(1, 6, 4, 4), draw(1, 3, 2, 2)
    y, b = layer.conv_y(zq), layer.conv_b(zq)
    assert_close(layer(f, zq), published.spatial_norm(f, y, b, None, None, 2, 0.5))


class BatchNorm(nn.BatchNorm2d):
    def __init__(self, num_channels, **parameters):
        super().__init__(num_channels, **parameters)


def test_any_norm_layer():
    layer = randomize(SpatialNorm(6, 3, norm_layer=BatchNorm, momentum=1.0).double())
    f, zq = draw(2, 6, 4, 4), draw(2, 3, 2, 2)
    up = F.interpolate(zq, size=(4, 4), mode="nearest")
    normalised = F.batch_norm(f, None, None, layer.norm_layer.weight, layer.norm_layer.bias, training=True)
    expected = normalised * layer.conv_y(up) + layer.conv_b(up)
    assert_close(layer(f, zq), expected)
    assert_close(layer(f, zq, activation="silu"), F.silu(expected))


def test_frozen_norm_layer_does_not_train():
    layer = SpatialNorm(6, 3, norm_layer=BatchNorm, freeze_norm_layer=True).train()
    before = {name: value.clone() for name, value in layer.norm_layer.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
    layer(torch.randn(2, 6, 4, 4), torch.randn(2, 3, 2, 2)).square().sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in layer.norm_layer.parameters())
    assert all(p.grad is not None for p in (layer.conv_y.weight, layer.conv_b.weight))
    assert all(torch.equal(value, before[name]) for name, value in layer.norm_layer.state_dict().items())


def test_group_norm_matches_torch():
    ours, theirs = randomize(GroupNorm(4, 8, 1e-6).double()), nn.GroupNorm(4, 8, 1e-6).double()
    theirs.load_state_dict(ours.state_dict())
    x = draw(2, 8, 5, 3)
    assert_close(ours(x), theirs(x))
    assert_close(ours(x, activation="silu"), F.silu(theirs(x)))


NORMS = {
    "group norm": lambda: GroupNorm(32, 64, 1e-6),
    "spatial norm": lambda: SpatialNorm(64, 4, num_groups=32, eps=1e-6),
    "add_conv": lambda: SpatialNorm(64, 4, add_conv=True, num_groups=32, eps=1e-6),
}


@pytest.mark.parametrize("grid", [(2, 3), (3, 2)], ids=["cells of 4x4", "cells of 8/3 x 6"])
@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_fused_forward_adds_the_bias_first(name, grid):
    norm, f, zq, bias = randomize(NORMS[name]().double()), draw(2, 64, 8, 12), draw(2, 4, *grid, seed=1), draw(64, seed=2)
    fused = norm._forward_fused(f, Modulations(zq), "silu", bias)
    assert_close(fused, norm(f + bias[:, None, None], zq, "silu"))


def test_plain_norms():
    assert all(is_plain_norm(make()) for make in NORMS.values())
    assert not is_plain_norm(nn.GroupNorm(32, 64))
    assert not is_plain_norm(SpatialNorm(6, 3, norm_layer=BatchNorm))
    for make in NORMS.values():
        hooked = make()
        hooked.register_forward_hook(lambda layer, inputs, out: None)
        assert not is_plain_norm(hooked)
    inner = NORMS["spatial norm"]()
    inner.norm_layer.register_forward_hook(lambda layer, inputs, out: None)
    assert not is_plain_norm(inner)


LAYER = SpatialNorm(64, 4, num_groups=32)
F_, ZQ = torch.randn(2, 64, 4, 4), torch.randn(2, 4, 2, 2)
BAD = {
    "no latent": (TypeError, "zq must be a tensor, got NoneType", (F_, None)),
    "rank": (ValueError, r"f must have shape \(batch, 64, height, width\), got \(64, 4, 4\)", (F_[0], ZQ)),
    "channels": (ValueError, r"zq must have shape \(batch, 4, height, width\), got \(2, 3, 2, 2\)", (F_, ZQ[:, :3])),
    "batch": (ValueError, "f and zq must have the same batch size: f has 2, zq has 1", (F_, ZQ[:1])),
    "empty": (ValueError, "zq must not be empty", (F_, ZQ[..., :0])),
    "dtype": (TypeError, "zq must have the model's dtype torch.float32, got torch.float64", (F_, ZQ.double())),
    "device": (ValueError, "f must be on the model's device cpu, got meta", (F_.to("meta"), ZQ)),
}


@pytest.mark.parametrize("case", BAD)
def test_spatial_norm_refuses(case):
    error, message, arguments = BAD[case]
    with pytest.raises(error, match=message):
        LAYER(*arguments)
