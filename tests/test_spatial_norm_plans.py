"""How the kernels of SpatialNorm cut a problem into blocks: shared memory of every kernel, and blocks and loads of backward."""

import functools
from types import SimpleNamespace

import emulator
import pytest
import torch
from kernels import usable

pytestmark = pytest.mark.skipif(not usable("emulator"), reason="needs Linux and a host C++ compiler")
GLUE = """
#include "spatial_norm_bands.cuh"
#include "spatial_norm_cells.cuh"
#include "spatial_norm_input_gradient.cuh"
#include "spatial_norm_output_plan.h"
#include "spatial_norm_statistics.cuh"

using namespace movq;
using namespace movq::spatial_norm;

static void write(int64_t* to, const int64_t* values, int count) {
  for (int i = 0; i < count; ++i) emu::copy_to_device(to + i, values + i, sizeof *to);
}

static Geometry geometry_of(int64_t batch, int channels, int groups, int height, int width, int zq_height, int zq_width,
                            int dtype, bool channels_last, int* vec_size) {
  SpatialNormProblem p = {batch, channels, height, width, groups, zq_height, zq_width, DType(dtype)};
  p.channels_last = channels_last;
  const Geometry geometry = make_geometry(p);
  *vec_size = choose_vec_size(p, geometry, {});
  return geometry;
}

template <class Function>
static size_t with_vec_size(int vec_size, Function&& function) {
  if (vec_size == 8) return function(std::integral_constant<int, 8>());
  if (vec_size == 4) return function(std::integral_constant<int, 4>());
  return function(std::integral_constant<int, 1>());
}

// Shared memory of each kernel: contiguous statistics without and with f_bias, interleaved statistics, bands, cells, df.
static void shared_bytes(const Geometry& geometry, int vec_size, bool channels_last, int64_t (&bytes)[6]) {
  if (channels_last) {
    bytes[2] = plan_interleaved_groups(geometry, vec_size).shared_bytes(vec_size);
    bytes[5] = with_vec_size(vec_size, [](auto size) { return BlockChannels<size, kGradientTerms>::kSharedBytes; });
  } else {
    bytes[0] = plan_contiguous_groups(geometry, vec_size, false).shared_bytes();
    bytes[1] = plan_contiguous_groups(geometry, vec_size, true).shared_bytes();
    if (geometry.zq_pixels) bytes[3] = plan_bands(geometry, vec_size, geometry.width / geometry.zq_width + 2).shared_bytes();
  }
  const CellPlan cells = plan_cells(geometry, vec_size, channels_last);
  bytes[4] = with_vec_size(vec_size, [&](auto size) {
    return channels_last ? cell_shared_bytes<size, true>(cells) : cell_shared_bytes<size, false>(cells);
  });
}

// The largest of each over 2 to 64 groups, 1 to max_group_channels channels a group, all dtypes and both layouts.
EXPORT(largest_shared_bytes, int height, int width, int zq_height, int zq_width, int max_group_channels, int64_t* results) {
  int64_t largest[6] = {}, channels[6] = {}, groups_of[6] = {};
  for (int groups = 2; groups <= 64; ++groups) {
    for (int group_channels = 1; group_channels <= max_group_channels; ++group_channels) {
      for (int form = 0; form < 4; ++form) {  // float32 and 16 bits, in NCHW and in NHWC
        int vec_size;
        const Geometry geometry = geometry_of(1, groups * group_channels, groups, height, width, zq_height, zq_width, form / 2,
                                              form % 2, &vec_size);
        int64_t bytes[6] = {};
        shared_bytes(geometry, vec_size, form % 2, bytes);
        for (int i = 0; i < 6; ++i) {
          if (bytes[i] <= largest[i]) continue;
          largest[i] = bytes[i];
          channels[i] = geometry.channels;
          groups_of[i] = groups;
        }
      }
    }
  }
  write(results, largest, 6);
  write(results + 6, channels, 6);
  write(results + 12, groups_of, 6);
}

// Whether cells of two rows and two columns count as even, in maps of 8 channels.
EXPORT(has_even_cells, int64_t height, int64_t width, bool channels_last, int64_t* result) {
  SpatialNormProblem p = {1, 8, height, width, 1, height / 2, width / 2, DType::bfloat16};
  p.channels_last = channels_last;
  const int64_t even = choose_resize(p, 8) == Resize::kEvenCells;
  write(result, &even, 1);
}

// kernel, blocks, threads, threads of a team, accesses in flight
EXPORT(cell_plan, int64_t batch, int channels, int height, int width, int zq_height, int zq_width, int dtype, int64_t* plan) {
  int vec_size;
  const Geometry geometry = geometry_of(batch, channels, 32, height, width, zq_height, zq_width, dtype, true, &vec_size);
  const CellPlan cells = plan_cells(geometry, vec_size, true);
  const int64_t values[] = {int(cells.kernel), batch * cells.channel_tiles * cells.chunks, cells.threads(), cells.team_threads,
                            loads_in_flight(vec_size)};
  write(plan, values, 5);
}
"""
KERNELS = ("NCHW statistics", "NCHW statistics with f_bias", "NHWC statistics", "sum_bands", "sum over cells", "df")
BUDGETS = {"any GPU without asking": 48 << 10, "sm_86, 89, 120": 99 << 10, "sm_80": 163 << 10, "sm_90, 100": 227 << 10}


@functools.cache
def library():
    return emulator.build(glue=GLUE)


SIZES = [((64, 64), (8, 8)), ((64, 64), (32, 32)), ((24, 40), (24, 40)), ((1, 4096), (0, 0)), ((1, 1), (1, 1)), ((2, 5), (1, 1))]


@pytest.mark.parametrize("size, zq_size", SIZES, ids=str)
def test_every_kernel_fits_into_the_shared_memory_of_every_gpu(size, zq_size):
    """2 to 64 groups of 1 to 1,100 channels, in all dtypes and both layouts."""
    results = torch.zeros(3, len(KERNELS), dtype=torch.int64)
    sizes = dict(height=size[0], width=size[1], zq_height=zq_size[0], zq_width=zq_size[1])
    library().call("largest_shared_bytes", **sizes, max_group_channels=1100, results=results, seeds=(0,))
    worst = {
        name: f"{size} bytes: C={channels}, groups={groups}"
        for name, size, channels, groups in zip(KERNELS, *results.tolist(), strict=True)
    }
    print(worst)
    for budget, limit in BUDGETS.items():
        assert int(results[0].max()) <= limit, f"{budget}: {limit} bytes, {worst}"


def cell_plan(batch, channels, size, zq_size, dtype):
    plan = torch.zeros(5, dtype=torch.int64)
    library().call(
        "cell_plan", batch=batch, channels=channels, height=size, width=size, zq_height=zq_size, zq_width=zq_size, dtype=dtype,
        plan=plan, seeds=(0,),
    )  # fmt: skip
    kernel, blocks, threads, team_threads, loads = plan.tolist()
    return SimpleNamespace(kernel=kernel, blocks=blocks, threads=threads, team_threads=team_threads, loads=loads)


# The levels of a Kandinsky decoder at 256x256 and 1024x1024: (channels, height = width, latent's height = width).
LEVELS = [(512, 64, 32), (256, 128, 32), (256, 256, 32), (128, 256, 32), (512, 256, 128), (256, 512, 128), (128, 1024, 128)]
MULTIPROCESSORS, BLOCKS_EACH = 132, 2  # of an H100, at 128 registers
# cub/device/dispatch/tuning/tuning_transform.cuh of CUDA 13.0, arch_to_min_bytes_in_flight, and its remark on H100 and H200
BYTES_IN_FLIGHT = {"A100": 16 << 10, "H100": 32 << 10, "H200": 48 << 10}


@pytest.mark.parametrize("dtype", [0, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("channels, size, zq_size", LEVELS)
def test_backward_fills_a_gpu_and_keeps_it_busy(channels, size, zq_size, dtype):
    plan = cell_plan(1, channels, size, zq_size, dtype)
    assert plan.blocks >= 0.96 * MULTIPROCESSORS * BLOCKS_EACH, plan  # 256 blocks for 264 places
    cell_pixels = (size // zq_size) ** 2
    loads = min(plan.loads, cell_pixels // plan.team_threads)
    assert loads == min(plan.loads, cell_pixels), f"a thread of a team has {loads} accesses"
    if cell_pixels > 4:  # kCellPerThread requests two, and Y and B with them
        assert BLOCKS_EACH * plan.threads * loads * 2 * 16 >= max(BYTES_IN_FLIGHT.values()), plan


def test_teams_share_cells_of_many_pixels_only():
    assert cell_plan(1, 512, 64, 64, 2).team_threads == 1
    assert cell_plan(1, 512, 64, 32, 2).team_threads == 1
    assert cell_plan(1, 256, 256, 32, 2).team_threads == 8
    assert cell_plan(8, 256, 256, 32, 2).team_threads == 2


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("long_side", ["height", "width"])
def test_long_maps_follow_torchs_rounding(layout, long_side):
    """torch's nearest rule rounds positions to float32: row 2^24 + 3 reads the cell after its own."""
    source = torch.arange((1 << 23) + 8, dtype=torch.float32)[None, None]
    read = torch.nn.functional.interpolate(source, size=(1 << 24) + 16, mode="nearest")[0, 0]
    assert int(read[(1 << 24) + 3]) == ((1 << 24) + 3) // 2 + 1

    def has_even_cells(size):
        result = torch.full((1,), -1, dtype=torch.int64)
        sides = {"height": 2, "width": 16, long_side: size}
        library().call("has_even_cells", **sides, channels_last=layout == "channels_last", result=result, seeds=(0,))
        return bool(result)

    assert has_even_cells(1 << 24)
    columns_matter = layout == "nchw" or long_side == "height"
    assert has_even_cells((1 << 24) + 16) != columns_matter
