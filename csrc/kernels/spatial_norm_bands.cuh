// Backward's sums of P and Q in NCHW where cells are narrow: sum_bands.
//
// A band is the pixels of one row of cells, over `tile_cells` columns of cells, in one channel; in a clip, the same rows of a few
// frames. A thread adds a few columns of pixels down the rows of a band, with 16-byte accesses whatever the width of a cell, and
// leaves one sum per column in shared memory (16 KB per block). Then threads add the columns of each cell and write its
// gradients.
#pragma once

#include "device/dependent_launch.cuh"
#include "spatial_norm_backward.cuh"

namespace movq {
namespace spatial_norm {

constexpr int kMaxBandCellWidth = 64;  // wider cells are served better by a block each

struct BandPlan {
  int tile_cells, tiles;             // columns of cells per block, and blocks across the map
  int threads_inner, threads_outer;  // threads across a band, and bands in parallel
  int chunk_bands, chunks;           // rows of cells per block, and blocks down the map
  int band_floats;                   // floats of shared memory per band: the columns of threads_inner threads
  MOVQ_HOST_DEVICE int threads() const { return round_up(threads_inner * threads_outer, kWarpSize); }
  size_t shared_bytes() const {
    return std::max<size_t>(2 * sizeof(float) * threads_outer * band_floats, threads() / kWarpSize * sizeof(GradientSums));
  }
};

inline BandPlan plan_bands(const Geometry& geometry, int vec_size, int cell_width) {
  BandPlan plan = {};
  const int block_width = kThreads * vec_size;
  const bool whole_rows = geometry.width <= block_width;
  plan.tile_cells = whole_rows ? geometry.zq_width : (block_width - 2 * vec_size) / cell_width;
  plan.tiles = ceil_div(geometry.zq_width, plan.tile_cells);
  plan.threads_inner = whole_rows ? geometry.width / vec_size : kThreads;
  const int bands = geometry.zq_frames * geometry.zq_height;
  plan.threads_outer = std::min(kThreads / plan.threads_inner, bands);
  plan.band_floats = plan.threads_inner * vec_size;
  const int64_t steps = ceil_div(bands, plan.threads_outer);
  const int64_t rounds = rounds_per_block(geometry.batch * geometry.channels * plan.tiles * steps, 8);
  plan.chunk_bands = int(std::min<int64_t>(rounds * plan.threads_outer, bands));
  plan.chunks = ceil_div(bands, plan.chunk_bands);
  return plan;
}

// The slot of a column's sum in shared memory. A thread with 8 columns stores 4 at a time; every second group of 4 threads swaps
// its halves, so that the 8 threads whose 128 bytes are stored together use all banks.
template <int VecSize>
MOVQ_DEVICE int column_slot(int column) {
  return VecSize == 8 ? column ^ (column >> 3 & 4) : column;
}

template <int VecSize>
MOVQ_DEVICE void store_column_sums(const Shared<float>& shared, int first, const Vec<float, VecSize>& sums) {
  if constexpr (VecSize > 1) {
#pragma unroll
    for (int i = 0; i < VecSize; i += 4) {
      shared.template store_vec<4>(column_slot<VecSize>(first + i), {{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]}});
    }
  } else {
    shared.store(first, sums[0]);
  }
}

// y = up(zq_y) and b = up(zq_b) for the columns of an access that reads the row of zq at `row`. Leaves b alone if not `with_b`.
template <class T, int VecSize>
MOVQ_DEVICE void load_modulation(const Geometry& geometry, const BackwardArrays<T>& arrays, int64_t row, int column, bool with_b,
                                 Vec<float, VecSize>& y, Vec<float, VecSize>& b) {
  if (geometry.zq_width == geometry.width) {
    y = to_float(load_vec<VecSize>(arrays.zq_y + row + column));
    if (with_b) b = to_float(load_vec<VecSize>(arrays.zq_b + row + column));
    return;
  }
  int previous = -1;
#pragma unroll
  for (int i = 0; i < VecSize; ++i) {  // adjacent pixels usually have the same source: load it once
    const int source = source_index(column + i, geometry.columns);
    if (i > 0) y[i] = y[i - 1], b[i] = b[i - 1];
    if (source != previous) {
      y[i] = to_float(load(arrays.zq_y + row + source));
      if (with_b) b[i] = to_float(load(arrays.zq_b + row + source));
      previous = source;
    }
  }
}

template <class T, int VecSize>
__global__ void __launch_bounds__(kThreads, 2) sum_bands(Geometry geometry, BandPlan plan, BackwardArrays<T> arrays) {
  allow_next_kernel();
  constexpr int kLoadsInFlight = 2;  // of f and of dout each
  const int64_t block = blockIdx.x;
  const int tile = block % plan.tiles, chunk = block / plan.tiles % plan.chunks;
  const int64_t plane = block / plan.tiles / plan.chunks, image = plane / geometry.channels;
  const int channel = plane - image * geometry.channels;
  const int inner = threadIdx.x % plan.threads_inner, outer = threadIdx.x / plan.threads_inner;
  const Shared<float> column_p(0, plan.threads_outer * plan.band_floats);
  const Shared<float> column_q(column_p.end(), plan.threads_outer * plan.band_floats);
  const Shared<GradientSums> scratch(0, blockDim.x / kWarpSize);  // overlaps column_p, after its last use

  const float mean = load_mean(geometry, arrays, image, channel);
  const Affine affine = load_affine(geometry, arrays, image, channel);
  const int first_cell = tile * plan.tile_cells, end_cell = min(first_cell + plan.tile_cells, geometry.zq_width);
  const int left = first_position(first_cell, geometry.columns) / VecSize * VecSize;
  const int right = first_position(end_cell, geometry.columns);
  const int column = left + inner * VecSize;
  const int64_t base = plane * geometry.pixels, zq_base = plane * geometry.zq_pixels;

  GradientSums total = {};  // sums of Y P and Y Q over this thread's cells
  const int end_band = min((chunk + 1) * plan.chunk_bands, geometry.zq_frames * geometry.zq_height);
  for (int first_band = chunk * plan.chunk_bands; first_band < end_band; first_band += plan.threads_outer) {
    const int band = first_band + outer;
    if (outer < plan.threads_outer && band < end_band && column < right) {
      Vec<float, VecSize> y = {}, b = {}, p = {}, q = {};
      const Rows rows = rows_that_read(geometry, band);
      if (!rows.are_empty()) {
        load_modulation(geometry, arrays, zq_base + int64_t(band) * geometry.zq_width, column, geometry.silu, y, b);
      }
      Affine modulated[VecSize];
#pragma unroll
      for (int i = 0; i < VecSize; ++i) modulated[i] = affine.modulated(y[i], b[i]);
      for (int frame = rows.first_frame; frame < rows.end_frame; ++frame) {
        const int64_t first = base + int64_t(frame) * geometry.height * geometry.width + column;
        for (int row = rows.top; row < rows.bottom; row += kLoadsInFlight) {
          Vec<T, VecSize> f[kLoadsInFlight], dout[kLoadsInFlight];
#pragma unroll
          for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
            if (row + ahead >= rows.bottom) break;
            const int64_t from = first + int64_t(row + ahead) * geometry.width;
            f[ahead] = load_vec<VecSize>(arrays.f + from);
            dout[ahead] = load_vec<VecSize>(arrays.dout + from);
          }
#pragma unroll
          for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
            if (row + ahead >= rows.bottom) break;
            const Vec<float, VecSize> f_values = to_float(f[ahead]), dout_values = to_float(dout[ahead]);
            with_silu(geometry.silu, [&](auto silu) {
#pragma unroll
              for (int i = 0; i < VecSize; ++i) {
                const float centred = f_values[i] - mean;
                const float h = activation_gradient<silu>(dout_values[i], centred, modulated[i]);
                p[i] += h;
                q[i] += h * centred;
              }
            });
          }
        }
      }
      const int slot = outer * plan.band_floats + inner * VecSize;
      store_column_sums(column_p, slot, p);
      store_column_sums(column_q, slot, q);
    }
    __syncthreads();
    const int cells = end_cell - first_cell, bands = min(plan.threads_outer, end_band - first_band);
    for (int i = threadIdx.x; i < bands * cells; i += blockDim.x) {
      const int in_block = i / cells, cell = first_cell + i - in_block * cells;
      const int cell_left = first_position(cell, geometry.columns);
      const int width = first_position(cell + 1, geometry.columns) - cell_left;
      const int first = in_block * plan.band_floats + cell_left - left;
      GradientSums sums[1] = {};
      // The cells of a warp start in the same bank as often as the largest power of two in their width: stagger their columns.
      int at = lane_id() * min(width & -width, kWarpSize) / kWarpSize;
#pragma unroll 4
      for (int k = 0; k < width; ++k) {
        const int slot = column_slot<VecSize>(first + at);
        sums[0] = sums[0] + GradientSums{column_p.load(slot), column_q.load(slot)};
        at = at + 1 < width ? at + 1 : 0;
      }
      const int64_t cell_row = first_band + in_block;
      write_cell_gradients<T, 1>(arrays, zq_base + cell_row * geometry.zq_width + cell, {{affine.slope}}, {{affine.offset}},
                                 sums);
      total = total + sums[0];
    }
    __syncthreads();
  }
  total = block_reduce(total, Sum(), scratch);
  if (threadIdx.x == 0) {
    store_chunk_sums(geometry, arrays, image, int64_t(plan.chunks) * plan.tiles, chunk * int64_t(plan.tiles) + tile, channel,
                     total);
  }
}

template <class T, int VecSize>
void launch_band_sums(const Geometry& geometry, const BandPlan& plan, const BackwardArrays<T>& arrays, cudaStream_t stream) {
  const char* name = "spatial_norm sum_bands";
  const LaunchConfig config = {grid_size(name, geometry.batch * geometry.channels * plan.chunks * plan.tiles),
                               unsigned(plan.threads()), plan.shared_bytes()};
  launch(sum_bands<T, VecSize>, name, config, stream, geometry, plan, arrays);
}

}  // namespace spatial_norm
}  // namespace movq
