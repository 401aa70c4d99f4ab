// Backward's sums of P and Q cell by cell. Three kernels, by the size of a cell:
//   sum_cell_per_thread  a thread adds up a whole cell for VecSize channels (NHWC, cells of up to 64 pixels);
//   sum_cell_per_block   a block adds up one cell;
//   sum_pixel_ranges     without zq: a block adds up a range of pixels, as if it were a cell with Y = 1 and B = 0.
// Each writes the cells' gradients, if there are cells, and leaves the sums of Y P and Y Q per chunk and channel.
#pragma once

#include "spatial_norm_backward.cuh"

namespace movq {
namespace spatial_norm {

enum class CellKernel { kCellPerThread, kCellPerBlock, kPixelRanges };

// Blocks are numbered by channel tile (fastest), chunk and image.
struct CellPlan {
  CellKernel kernel;
  int threads_inner, threads_outer;  // channels x pixels (or cells) in NHWC, pixels x 1 in NCHW
  int channel_tiles, chunks;
  int chunk_cells;   // kCellPerThread: cells per block
  int chunk_pixels;  // kPixelRanges: pixels per block
  MOVQ_HOST_DEVICE int threads() const { return round_up(threads_inner * threads_outer, kWarpSize); }
};

inline CellPlan plan_cells(const Geometry& geometry, int vec_size, bool channels_last, bool small_cells) {
  CellPlan plan = {};
  const int channel_accesses = channels_last ? geometry.channels / vec_size : 0;
  plan.threads_inner = channels_last ? std::min(channel_accesses, channel_threads(vec_size)) : kThreads;
  plan.threads_outer = channels_last ? kThreads / plan.threads_inner : 1;
  plan.channel_tiles = channels_last ? ceil_div(channel_accesses, plan.threads_inner) : geometry.channels;
  auto rounds_for = [&](int64_t steps) { return rounds_per_block(steps * plan.channel_tiles * geometry.batch, 16); };
  if (!geometry.zq_pixels) {
    plan.kernel = CellKernel::kPixelRanges;
    const int step_pixels = channels_last ? plan.threads_outer : plan.threads_inner * vec_size;
    const int64_t rounds = rounds_for(ceil_div(geometry.pixels, step_pixels));
    plan.chunk_pixels = int(std::min<int64_t>(rounds * step_pixels, round_up(geometry.pixels, vec_size)));
    plan.chunks = ceil_div(geometry.pixels, plan.chunk_pixels);
  } else if (channels_last && small_cells) {
    plan.kernel = CellKernel::kCellPerThread;
    plan.threads_outer = std::min(plan.threads_outer, geometry.zq_pixels);
    const int64_t rounds = rounds_for(ceil_div(geometry.zq_pixels, plan.threads_outer));
    plan.chunk_cells = int(std::min<int64_t>(rounds * plan.threads_outer, geometry.zq_pixels));
    plan.chunks = ceil_div(geometry.zq_pixels, plan.chunk_cells);
  } else {
    plan.kernel = CellKernel::kCellPerBlock;
    plan.chunks = geometry.zq_pixels;
  }
  return plan;
}

// A thread's place in its block, and its channels.
template <int VecSize, bool ChannelsLast>
struct CellThread {
  static constexpr int kChannels = ChannelsLast ? VecSize : 1;
  int64_t image;
  int chunk, block_channel;  // the first channel of the block
  int inner, outer;
  int channel;  // the first of this thread
  bool idle;

  MOVQ_DEVICE CellThread(const Geometry& geometry, const CellPlan& plan) {
    const int64_t block = blockIdx.x;
    const int tile = block % plan.channel_tiles;
    chunk = block / plan.channel_tiles % plan.chunks;
    image = block / plan.channel_tiles / plan.chunks;
    inner = threadIdx.x % plan.threads_inner;
    outer = threadIdx.x / plan.threads_inner;
    block_channel = ChannelsLast ? tile * plan.threads_inner * VecSize : tile;
    channel = block_channel + (ChannelsLast ? inner * VecSize : 0);
    idle = channel >= geometry.channels || outer >= plan.threads_outer;
  }
};

struct Rectangle { int top, bottom, left, right; };

MOVQ_DEVICE Rectangle pixels_of_cell(const Geometry& geometry, int cell) {
  const int row = cell / geometry.zq_width, column = cell - row * geometry.zq_width;
  return {first_position(row, geometry.rows), first_position(row + 1, geometry.rows), first_position(column, geometry.columns),
          first_position(column + 1, geometry.columns)};
}

// Adds P and Q over the pixels of rectangles, for one thread's channels.
template <class T, int VecSize, bool ChannelsLast>
struct PixelSum {
  static constexpr int kChannels = ChannelsLast ? VecSize : 1;
  const Geometry& geometry;
  const BackwardArrays<T>& arrays;
  const int64_t image;
  const int channel;
  Normalization normalize[kChannels];
  Affine affine[kChannels] = {};  // all zero, and not used, without an activation

  MOVQ_DEVICE PixelSum(const Geometry& geometry, const BackwardArrays<T>& arrays, int64_t image, int channel)
      : geometry(geometry), arrays(arrays), image(image), channel(channel) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) normalize[i].load_from(geometry, arrays, image, channel + i);
  }

  MOVQ_DEVICE void load_affine() {
    if (!geometry.silu) return;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) affine[i].load_from(geometry, arrays, channel + i);
  }

  // `at` is the offset of the cell in zq.
  MOVQ_DEVICE void load_modulated_affine(int64_t at) {
    if (!geometry.silu) return;
    load_affine();
    const Vec<float, kChannels> y = to_float(load_vec<kChannels>(arrays.zq_y + at));
    const Vec<float, kChannels> b = to_float(load_vec<kChannels>(arrays.zq_b + at));
#pragma unroll
    for (int i = 0; i < kChannels; ++i) affine[i] = affine[i].modulated(y[i], b[i]);
  }

  // Adds the accesses first, first + step, ... of the rectangle, counted row by row.
  MOVQ_DEVICE void add(const Rectangle& pixels, int first, int step, GradientSums (&sums)[kChannels]) const {
    constexpr int kLoadsInFlight = kChannels == 8 ? 1 : 2;  // of f and of dout each; 8 channels leave no registers for more
    constexpr int kAccessPixels = ChannelsLast ? 1 : VecSize;
    const int64_t base = element_offset<ChannelsLast>(geometry, image, channel, 0, geometry.pixels);
    const int64_t pixel_stride = ChannelsLast ? geometry.channels : 1;
    // In NCHW accesses start at multiples of VecSize, so the first and last of a row may reach into the neighbours.
    const int left_access = pixels.left / kAccessPixels, width = ceil_div(pixels.right, kAccessPixels) - left_access;
    const int accesses = pixels.right > pixels.left ? (pixels.bottom - pixels.top) * width : 0;
    for (int access = first; access < accesses; access += kLoadsInFlight * step) {
      Vec<T, VecSize> f[kLoadsInFlight], dout[kLoadsInFlight];
      int columns[kLoadsInFlight];
#pragma unroll
      for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
        const int here = access + ahead * step;
        if (here >= accesses) break;
        const int row = here / width;
        columns[ahead] = (left_access + here - row * width) * kAccessPixels;
        const int64_t from = base + (int64_t(pixels.top + row) * geometry.width + columns[ahead]) * pixel_stride;
        f[ahead] = load_vec<VecSize>(arrays.f + from);
        dout[ahead] = load_vec<VecSize>(arrays.dout + from);
      }
#pragma unroll
      for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
        if (access + ahead * step >= accesses) break;
#pragma unroll
        for (int i = 0; i < VecSize; ++i) {
          const int thread_channel = ChannelsLast ? i : 0;
          const float n = normalize[thread_channel](to_float(f[ahead][i]));
          const float h = activation_gradient(geometry.silu, to_float(dout[ahead][i]), n, affine[thread_channel]);
          const int column = columns[ahead] + i;
          if (ChannelsLast || (column >= pixels.left && column < pixels.right)) {
            sums[thread_channel] = sums[thread_channel] + GradientSums{h, h * n};
          }
        }
      }
    }
  }
};

// The distance in shared memory between one of a thread's channels and the next, in GradientSums. 16 of them span all banks, so
// VecSize adjacent channels start in different ones.
template <int VecSize>
MOVQ_HOST_DEVICE int channel_pitch(int threads) {
  return threads + kWarpSize / 2 / VecSize;
}

template <int VecSize, bool ChannelsLast>
size_t cell_shared_bytes(const CellPlan& plan) {
  return sizeof(GradientSums) * (ChannelsLast ? VecSize * channel_pitch<VecSize>(plan.threads()) : plan.threads() / kWarpSize);
}

// Adds up the sums that the block's threads hold, and calls write(channel, sum) once for every channel of the block.
template <int VecSize, bool ChannelsLast, class Function>
MOVQ_DEVICE void reduce_channels(const Geometry& geometry, const CellPlan& plan, const CellThread<VecSize, ChannelsLast>& thread,
                                 const GradientSums (&sums)[CellThread<VecSize, ChannelsLast>::kChannels], Function&& write) {
  if constexpr (ChannelsLast) {
    const int pitch = channel_pitch<VecSize>(blockDim.x);
    const Shared<GradientSums> shared(0, VecSize * pitch);
#pragma unroll
    for (int i = 0; i < VecSize; ++i) shared.store(i * pitch + threadIdx.x, sums[i]);
    __syncthreads();
    const int channels = min(plan.threads_inner * VecSize, geometry.channels - thread.block_channel);
    for (int i = threadIdx.x; i < channels; i += blockDim.x) {
      GradientSums sum = {};
      for (int outer = 0; outer < plan.threads_outer; ++outer) {
        sum = sum + shared.load(i % VecSize * pitch + outer * plan.threads_inner + i / VecSize);
      }
      write(thread.block_channel + i, sum);
    }
  } else {
    const GradientSums sum = block_reduce(sums[0], Sum(), Shared<GradientSums>(0, blockDim.x / kWarpSize));
    if (threadIdx.x == 0) write(thread.channel, sum);
  }
}

template <class T, int VecSize>
__global__ void __launch_bounds__(kThreads, 2) sum_cell_per_thread(Geometry geometry, CellPlan plan, BackwardArrays<T> arrays) {
  const CellThread<VecSize, true> thread(geometry, plan);
  GradientSums totals[VecSize] = {};  // sums of Y P and Y Q over the thread's cells
  if (!thread.idle) {
    PixelSum<T, VecSize, true> pixel_sum(geometry, arrays, thread.image, thread.channel);
    const int end_cell = min((thread.chunk + 1) * plan.chunk_cells, geometry.zq_pixels);
    for (int cell = thread.chunk * plan.chunk_cells + thread.outer; cell < end_cell; cell += plan.threads_outer) {
      const int64_t at = element_offset<true>(geometry, thread.image, thread.channel, cell, geometry.zq_pixels);
      pixel_sum.load_modulated_affine(at);
      GradientSums sums[VecSize] = {};
      pixel_sum.add(pixels_of_cell(geometry, cell), 0, 1, sums);
      write_cell_gradients(geometry, arrays, thread.channel, at, sums);
#pragma unroll
      for (int i = 0; i < VecSize; ++i) totals[i] = totals[i] + sums[i];
    }
  }
  reduce_channels(geometry, plan, thread, totals, [&](int channel, const GradientSums& sum) {
    store_sums(arrays.chunk_sums, (thread.image * plan.chunks + thread.chunk) * geometry.channels + channel, sum);
  });
}

template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 2) sum_cell_per_block(Geometry geometry, CellPlan plan, BackwardArrays<T> arrays) {
  const CellThread<VecSize, ChannelsLast> thread(geometry, plan);
  const int cell = thread.chunk;
  auto offset_in_zq = [&](int channel) {
    return element_offset<ChannelsLast>(geometry, thread.image, channel, cell, geometry.zq_pixels);
  };
  GradientSums sums[thread.kChannels] = {};
  if (!thread.idle) {
    PixelSum<T, VecSize, ChannelsLast> pixel_sum(geometry, arrays, thread.image, thread.channel);
    pixel_sum.load_modulated_affine(offset_in_zq(thread.channel));
    const int first = ChannelsLast ? thread.outer : thread.inner;
    const int step = ChannelsLast ? plan.threads_outer : plan.threads_inner;
    pixel_sum.add(pixels_of_cell(geometry, cell), first, step, sums);
  }
  reduce_channels(geometry, plan, thread, sums, [&](int channel, const GradientSums& sum) {
    GradientSums cell_sums[1] = {sum};
    write_cell_gradients(geometry, arrays, channel, offset_in_zq(channel), cell_sums);
    store_sums(arrays.chunk_sums, (thread.image * plan.chunks + cell) * geometry.channels + channel, cell_sums[0]);
  });
}

template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 2) sum_pixel_ranges(Geometry geometry, CellPlan plan, BackwardArrays<T> arrays) {
  const CellThread<VecSize, ChannelsLast> thread(geometry, plan);
  GradientSums sums[thread.kChannels] = {};
  if (!thread.idle) {
    PixelSum<T, VecSize, ChannelsLast> pixel_sum(geometry, arrays, thread.image, thread.channel);
    pixel_sum.load_affine();
    const int left = thread.chunk * plan.chunk_pixels;
    const int right = int(min(left + int64_t(plan.chunk_pixels), int64_t(geometry.pixels)));
    const int first = ChannelsLast ? thread.outer : thread.inner;
    const int step = ChannelsLast ? plan.threads_outer : plan.threads_inner;
    pixel_sum.add({0, 1, left, right}, first, step, sums);
  }
  reduce_channels(geometry, plan, thread, sums, [&](int channel, const GradientSums& sum) {
    store_sums(arrays.chunk_sums, (thread.image * plan.chunks + thread.chunk) * geometry.channels + channel, sum);
  });
}

template <class T, int VecSize, bool ChannelsLast>
void launch_cell_sums(const Geometry& geometry, const CellPlan& plan, const BackwardArrays<T>& arrays, cudaStream_t stream) {
  auto launch_as = [&](auto kernel, const char* name) {
    const LaunchConfig config = {grid_size(name, geometry.batch * plan.channel_tiles * plan.chunks), unsigned(plan.threads()),
                                 cell_shared_bytes<VecSize, ChannelsLast>(plan)};
    launch(kernel, name, config, stream, geometry, plan, arrays);
  };
  switch (plan.kernel) {
    case CellKernel::kCellPerThread:
      if constexpr (ChannelsLast) launch_as(sum_cell_per_thread<T, VecSize>, "spatial_norm sum_cell_per_thread");
      break;
    case CellKernel::kCellPerBlock:
      launch_as(sum_cell_per_block<T, VecSize, ChannelsLast>, "spatial_norm sum_cell_per_block");
      break;
    case CellKernel::kPixelRanges: launch_as(sum_pixel_ranges<T, VecSize, ChannelsLast>, "spatial_norm sum_pixel_ranges"); break;
  }
}

}  // namespace spatial_norm
}  // namespace movq
