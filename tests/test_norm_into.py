"""The spatial norm written to given memory: the operator's result, whatever the memory and the layout."""

import pytest
import torch
from clip_cases import SIZES, arguments
from pretend_gpu import PretendGpu
from tolerances import assert_close, relative_error

from movq_ext import spatial_norm
from movq_ext.ops import norm_into
from movq_ext.ops.options import NormOptions
from movq_ext.ops.registration import CPU_IMPLEMENTATIONS

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@pytest.mark.parametrize("where", ["new", "over f", "behind frames"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("f_size", "zq_size"), SIZES)
def test_the_result_is_the_operators(f_size, zq_size, activation, layout, where, monkeypatch):
    monkeypatch.setattr(norm_into, "CHUNK_ELEMENTS", 50)
    for latent in (True, False):
        f, y, b, weight, bias, groups = arguments(f_size, zq_size)
        y, b = (y, b) if latent else (None, None)
        options = NormOptions(weight, bias, groups, 1e-6, activation, split_first_frame=latent)
        expected = spatial_norm(f, y, b, weight, bias, groups, 1e-6, activation, split_first_frame=latent)
        f = f.contiguous(memory_format=layout)
        frames = torch.full((2, 6, 2 + f_size[0], *f_size[1:]), 7.0, dtype=f.dtype).contiguous(memory_format=layout)
        out = {"new": torch.empty_like(f), "over f": f, "behind frames": frames[:, :, 2:]}[where]
        assert norm_into.spatial_norm_into(out, f, y, b, options) is out
        assert_close(out, expected)
        assert (frames[:, :, :2] == 7).all()


@pytest.mark.parametrize("where", ["over f", "behind frames"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("f_size", "zq_size"), SIZES)
def test_the_kernels_write_to_the_memory(f_size, zq_size, layout, where, monkeypatch):
    into = CPU_IMPLEMENTATIONS["spatial_norm_into"]
    monkeypatch.setattr(torch.ops.movq_ext, "spatial_norm_into", into, raising=False)
    for latent in (True, False):
        f, y, b, weight, bias, groups = arguments(f_size, zq_size, torch.float32)
        y, b = (y, b) if latent else (None, None)
        options = NormOptions(weight, bias, groups, 1e-6, "silu", split_first_frame=latent)
        expected = spatial_norm(f, y, b, weight, bias, groups, 1e-6, "silu", split_first_frame=latent)
        f = f.contiguous(memory_format=layout)
        frames = torch.full((2, 6, 2 + f_size[0], *f_size[1:]), 7.0).contiguous(memory_format=layout)
        out = {"over f": f, "behind frames": frames[:, :, 2:]}[where]
        norm_into.spatial_norm_into(out, f.as_subclass(PretendGpu), y, b, options)
        assert_close(out, expected, slack=2.0)
        assert (frames[:, :, :2] == 7).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_survive_a_large_mean(layout):
    """E[x^2] - E[x]^2 would lose every digit here."""
    f = (torch.randn(2, 6, 5, 8, 8, generator=torch.Generator().manual_seed(0)) + 4096).contiguous(memory_format=layout)
    mean, rest, rstd = norm_into.group_statistics(f, 3, 1e-6)
    exact = f.double().view(2, 3, -1) if f.is_contiguous() else f.double().contiguous().view(2, 3, -1)
    assert_close(mean, exact.mean(2))
    assert relative_error(mean.double() + rest, exact.mean(2)) < 1e-11
    assert_close(rstd, (exact.var(2, correction=0) + 1e-6).rsqrt(), slack=100)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_large_mean_costs_no_more_digits_than_in_diffusers(seed, latent, layout):
    """diffusers modulates the result of torch's group norm. The mean is subtracted before anything is scaled."""
    seed = torch.Generator().manual_seed(seed)
    f = (torch.randn(1, 8, 5, 32, 48, generator=seed) + 100).contiguous(memory_format=layout)
    y, b = torch.randn(2, 1, 8, 5, 32, 48, generator=seed) if latent else (None, None)
    weight, bias = torch.randn(2, 8, generator=seed)

    def published(dtype):
        normalised = torch.nn.functional.group_norm(f.to(dtype), 4, weight.to(dtype), bias.to(dtype), 1e-6)
        return normalised * y.to(dtype) + b.to(dtype) if latent else normalised

    ours = norm_into.spatial_norm_into(torch.empty_like(f), f, y, b, NormOptions(weight, bias, 4, 1e-6))
    exact = published(torch.float64)
    assert relative_error(ours, exact) <= min(2e-7, relative_error(published(torch.float32), exact))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 100.1, 3e8])
def test_a_constant_clip_gives_the_bias(value, layout):
    f = torch.full((1, 6, 5, 7, 9), value).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    out = norm_into.spatial_norm_into(torch.empty_like(f), f, None, None, NormOptions(weight, bias, 3, 1e-6))
    assert torch.allclose(out, bias[:, None, None, None].expand_as(out), atol=1e-4)


def test_parameters_may_be_missing():
    f, y, b, _, _, groups = arguments()
    out = norm_into.spatial_norm_into(torch.empty_like(f), f, y, b, NormOptions(None, None, groups))
    assert_close(out, spatial_norm(f, y, b, None, None, groups))
