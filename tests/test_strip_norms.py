"""The norms of strips must match those of whole maps, whichever rows are requested."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from movq_ext import GroupNorm, SpatialNorm
from movq_ext.model import strip_norms
from movq_ext.model.feature_maps import MapStore
from movq_ext.model.strip_buffer import StripBuffer
from movq_ext.model.strip_norms import CombinedModulation, NormalisedRows, nearest_indices, split_at_cells

HEIGHT, WIDTH = 12, 8
NORMS = {
    "group norm": (lambda: GroupNorm(8, 32, 1e-6), (3, 4), strip_norms.ChannelAffine),
    "group norm without weights": (lambda: nn.GroupNorm(8, 32, affine=False), (3, 4), strip_norms.ChannelAffine),
    "cells of 4x2": (lambda: SpatialNorm(32, 5, num_groups=8), (3, 4), strip_norms.CellAffine),
    "cells of one pixel": (lambda: SpatialNorm(32, 5, num_groups=8), (HEIGHT, WIDTH), strip_norms.CellAffine),
    "cells of uneven size": (lambda: SpatialNorm(32, 5, num_groups=8), (5, 3), strip_norms.NearestAffine),
    "zq larger than the map": (lambda: SpatialNorm(32, 5, num_groups=8), (30, 9), strip_norms.NearestAffine),
    "add_conv": (lambda: SpatialNorm(32, 5, num_groups=8, add_conv=True), (3, 4), strip_norms.ConvolvedAffine),
    "add_conv, uneven": (lambda: SpatialNorm(32, 5, num_groups=8, add_conv=True), (5, 3), strip_norms.ConvolvedAffine),
}


def make_norm(name, dtype):
    torch.manual_seed(0)
    norm = NORMS[name][0]()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    return norm.to(dtype)


def normalised_rows(norm, x, zq, activation):
    return NormalisedRows(norm, x, zq, activation, StripBuffer(MapStore(x.dtype, torch.device("cpu")), 0))


def stored(values):
    x = MapStore(values.dtype, values.device).allocate(*values.shape[1:])
    x.write(0, values)
    return x


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_rows_match_the_norm_of_the_whole_map(name, dtype, activation):
    _, grid, affine = NORMS[name]
    norm, generator = make_norm(name, dtype), torch.Generator().manual_seed(1)
    values = (torch.randn(1, 32, HEIGHT, WIDTH, generator=generator) + 3).to(dtype)
    zq = torch.randn(1, 5, *grid, generator=generator).to(dtype)
    inputs = (values, zq) if isinstance(norm, SpatialNorm) else (values,)
    expected = make_norm(name, dtype).double()(*(x.double() for x in inputs))
    expected = F.silu(expected) if activation == "silu" else expected
    rows = normalised_rows(norm, stored(values), zq, activation)
    assert type(rows.affine) is affine
    for first in range(HEIGHT):
        for last in range(first + 1, HEIGHT + 1):
            out = torch.full((1, 32, last - first, WIDTH), torch.nan, dtype=dtype)
            rows.write_rows(first, last, out)
            assert_close(out, expected[:, :, first:last], slack=3)


class Doubled(SpatialNorm):
    def modulation(self, zq):
        return tuple(2 * x for x in super().modulation(zq))


@torch.no_grad()
@pytest.mark.parametrize("autocasts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind, is_plain", [(SpatialNorm, True), (Doubled, False)])
def test_combined_modulation(kind, is_plain, dtype, autocasts):
    """Also in 16 bits, one product computes scale and shift in float32, and rounds neither y nor b."""
    torch.manual_seed(0)
    norm, zq = kind(32, 5, num_groups=8).to(dtype), torch.randn(1, 5, 3, 4, dtype=dtype)
    scale, shift = torch.randn(2, 32, dtype=torch.float64)
    y, b = copy.deepcopy(norm).double().modulation(zq.double())
    expected = y * scale[:, None, None], b + y * shift[:, None, None]
    combined = CombinedModulation(norm, scale, shift, torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        results = combined(zq)
    assert combined.is_plain == is_plain
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == torch.promote_types(dtype, torch.float32)
        if is_plain:
            assert_close(result, exact)
        else:
            assert relative_error(result, exact) < 2e-2


@torch.no_grad()
def test_a_replaced_modulation_is_called():
    norm, scale = SpatialNorm(32, 5, num_groups=8), torch.ones(32)
    norm.modulation = lambda zq: (zq.new_full((1, 32, 3, 4), 2), zq.new_full((1, 32, 3, 4), 3))
    results = CombinedModulation(norm, scale, scale, torch.float32)(torch.randn(1, 5, 3, 4))
    assert [set(result.flatten().tolist()) for result in results] == [{2}, {5}]


@torch.no_grad()
def test_strips_compute_the_modulation_of_their_cells():
    """So threads share the work, and no tensor has the scale and the shift of all cells."""
    norm, zq = make_norm("cells of 4x2", torch.float32), torch.randn(1, 5, 3, 4)
    with FlopCounterMode(display=False) as of_all:
        rows = normalised_rows(norm, stored(torch.randn(1, 32, HEIGHT, WIDTH)), zq, None)
    assert of_all.get_total_flops() == 0
    for first, last, cells in ((0, 1, 1), (3, 9, 3), (4, 12, 2)):  # rows of cells, four rows of pixels each
        with FlopCounterMode(display=False) as of_strip:
            parts = list(rows.affine.parts(first, last))
        assert of_strip.get_total_flops() == 2 * (cells * zq.shape[3]) * (5 + 1) * (2 * 32)
        assert parts[0].scale.untyped_storage().nbytes() == cells * zq.shape[3] * 2 * 32 * 4


@torch.no_grad()
def test_modified_modulations_are_called_once_for_all_cells():
    norm, zq, sizes = make_norm("cells of 4x2", torch.float32), torch.randn(1, 5, 3, 4), []
    norm.conv_y.register_forward_hook(lambda layer, inputs, result: sizes.append(inputs[0].shape[2:]))
    rows = normalised_rows(norm, stored(torch.randn(1, 32, HEIGHT, WIDTH)), zq, None)
    for first, last in ((0, 5), (5, 12)):
        rows.write_rows(first, last, torch.empty(1, 32, last - first, WIDTH))
    assert sizes == [(3, 4)]


@torch.no_grad()
def test_the_map_is_not_modified():
    values = torch.randn(1, 32, HEIGHT, WIDTH)
    x = stored(values)
    rows = normalised_rows(make_norm("cells of 4x2", torch.float32), x, torch.randn(1, 5, 3, 4), "silu")
    rows.write_rows(0, HEIGHT, torch.empty(1, 32, HEIGHT, WIDTH))
    assert torch.equal(x.read(0, HEIGHT), values)


@given(first=st.integers(0, 40), count=st.integers(1, 40), size=st.integers(1, 9))
def test_parts_are_whole_cells_or_lie_in_one(first, count, size):
    parts = list(split_at_cells(first, first + count, size))
    assert [row for begin, end in parts for row in range(begin, end)] == list(range(first, first + count))
    assert len(parts) <= 3
    for begin, end in parts:
        assert begin // size == (end - 1) // size or (begin % size == 0 and end % size == 0)


@pytest.mark.parametrize("small", range(1, 14))
def test_nearest_indices_are_torchs(small):
    for height, width in ((1, 40), (7, 13), (26, 39), (small, 3 * small), (82, 123)):  # 82 and 123 round in float32
        values = torch.arange(small * small, dtype=torch.float32).view(1, 1, small, small)
        rows, columns = nearest_indices(values, height, width)
        assert torch.equal(values[:, :, rows][:, :, :, columns], F.interpolate(values, size=(height, width), mode="nearest"))
