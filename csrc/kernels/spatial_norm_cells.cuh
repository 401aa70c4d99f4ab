// Backward's sums of P and Q cell by cell. Four kernels, by layout and by the size of a cell:
//   sum_cell_per_thread  NHWC, cells of a few pixels: a thread sums a whole cell for VecSize channels;
//   sum_cell_per_team    NHWC, larger cells: the threads of a team share the pixels of a cell;
//   sum_cell_per_block   NCHW, wide cells: a block sums one cell of one channel;
//   sum_pixel_ranges     without zq: a block sums a range of pixels, as if it were a cell with Y = 1 and B = 0.
// Each writes the cells' gradients, if there are cells, and leaves the sums of Y P and Y Q per chunk and channel.
//
// Bytes in flight: a thread requests 3 accesses of 16 bytes of f and as many of dout before it uses the first, 4 where an access
// has fewer than 8 values. At 128 registers two blocks of 256 threads run per multiprocessor: 512 * 3 * 2 * 16 bytes = 48 KB. CUB
// asks for 16 KB on an A100, 32 KB on an H100 and 48 KB on an H200 (cub/device/dispatch/tuning/tuning_transform.cuh in CUDA 13.0,
// arch_to_min_bytes_in_flight()). A cell per thread leaves registers for 2 accesses, beside Y and B.
// Blocks: teams grow until there are 1024 blocks, 3.9 waves on 132 multiprocessors, or until their threads would have fewer
// accesses than they can request at once.
// Instructions: about 150 for 16 bytes of f and of dout with SiLU, in 16-bit types. A multiprocessor of an H100 can issue 282 in
// the time in which those bytes arrive (test_norm_backward_machine_code.py).
#pragma once

#include "device/dependent_launch.cuh"
#include "spatial_norm_backward.cuh"

namespace movq {
namespace spatial_norm {

// Accesses of f, and as many of dout, that a thread requests before it uses the first. 8 channels leave registers for fewer.
constexpr int loads_in_flight(int vec_size) { return vec_size == 8 ? 3 : 4; }

enum class CellKernel { kCellPerThread, kCellPerTeam, kCellPerBlock, kPixelRanges };

// Blocks are numbered by channel tile (fastest), chunk and image.
struct CellPlan {
  CellKernel kernel;
  int threads_inner, threads_outer;  // channels x pixels (or cells) in NHWC, pixels x 1 in NCHW
  int channel_tiles, chunks;
  int team_threads;  // kCellPerTeam: threads that share the pixels of a cell. A block has threads_outer / team_threads teams
  int chunk_cells;   // kCellPerThread and kCellPerTeam: cells per block
  int chunk_pixels;  // kPixelRanges: pixels per block
  MOVQ_HOST_DEVICE int threads() const { return round_up(threads_inner * threads_outer, kWarpSize); }
};

// The threads that share a cell: 1 for small cells, otherwise at least 2, and as few as make kTargetBlocks blocks. Each has
// loads_in_flight() accesses or more.
inline int choose_team_threads(const Geometry& geometry, int vec_size, const CellPlan& plan) {
  const int cell_pixels = geometry.height * geometry.width / (geometry.zq_height * geometry.zq_width);  // of one frame
  int team_threads = 1;
  auto blocks = [&] {
    return ceil_div<int64_t>(geometry.zq_pixels, plan.threads_outer / team_threads) * plan.channel_tiles * geometry.batch;
  };
  while (2 * team_threads <= plan.threads_outer && 2 * team_threads * loads_in_flight(vec_size) <= cell_pixels &&
         (team_threads == 1 || blocks() < kTargetBlocks)) {
    team_threads *= 2;
  }
  return team_threads;
}

inline CellPlan plan_cells(const Geometry& geometry, int vec_size, bool channels_last) {
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
  } else if (channels_last) {
    plan.team_threads = choose_team_threads(geometry, vec_size, plan);
    plan.kernel = plan.team_threads == 1 ? CellKernel::kCellPerThread : CellKernel::kCellPerTeam;
    if (plan.team_threads == 1) plan.threads_outer = std::min(plan.threads_outer, geometry.zq_pixels);
    const int teams = plan.threads_outer / plan.team_threads;  // in the last block some have no cell, but add up others' sums
    const int64_t rounds = plan.team_threads == 1 ? rounds_for(ceil_div(geometry.zq_pixels, teams)) : 1;
    plan.chunk_cells = int(std::min<int64_t>(rounds * teams, geometry.zq_pixels));
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

// The same rectangle of adjacent frames.
struct Box {
  Rows rows;
  int left, right;
};

MOVQ_DEVICE Box pixels_of_cell(const Geometry& geometry, int cell) {
  const int row = cell / geometry.zq_width, column = cell - row * geometry.zq_width;
  return {rows_that_read(geometry, row), first_position(column, geometry.columns), first_position(column + 1, geometry.columns)};
}

// Sums h and h (f - mean) over the pixels of boxes, for one thread's channels.
template <class T, int VecSize, bool ChannelsLast>
struct PixelSum {
  static constexpr int kChannels = ChannelsLast ? VecSize : 1;
  const Geometry& geometry;
  const BackwardArrays<T>& arrays;
  const int64_t base;  // offset of the first channel's first pixel in f
  Vec<float, kChannels> mean;
  Affine affine[kChannels];  // u, not used without an activation

  // Adds the accesses first, first + step, ... of each frame's rectangle, counted row by row.
  template <int kLoadsInFlight = loads_in_flight(VecSize)>
  MOVQ_DEVICE void add(const Box& pixels, int first, int step, GradientSums (&sums)[kChannels]) const {
    for (int frame = pixels.rows.first_frame; frame < pixels.rows.end_frame; ++frame) {
      add_frame<kLoadsInFlight>(pixels, frame, first, step, sums);
    }
  }

 private:
  template <int kLoadsInFlight>
  MOVQ_DEVICE void add_frame(const Box& pixels, int frame, int first, int step, GradientSums (&sums)[kChannels]) const {
    constexpr int kAccessPixels = ChannelsLast ? 1 : VecSize;
    // In NCHW accesses start at multiples of VecSize, so the first and last of a row may reach into the neighbours.
    const int left_access = pixels.left / kAccessPixels, width = ceil_div(pixels.right, kAccessPixels) - left_access;
    const int accesses = pixels.right > pixels.left ? (pixels.rows.bottom - pixels.rows.top) * width : 0;
    if (first >= accesses) return;
    const int64_t access_stride = ChannelsLast ? geometry.channels : VecSize,
                  row_stride = geometry.width / kAccessPixels * access_stride;
    const int step_rows = step / width, step_columns = step - step_rows * width, first_row = first / width;
    int column = first - first_row * width;
    int64_t at =
        base + (frame * geometry.height + pixels.rows.top + first_row) * row_stride + (left_access + column) * access_stride;
    for (int remaining = accesses - first; remaining > 0; remaining -= kLoadsInFlight * step) {
      Vec<T, VecSize> f[kLoadsInFlight], dout[kLoadsInFlight];
      int columns[kLoadsInFlight];
#pragma unroll
      for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
        if (ahead * step < remaining) {
          f[ahead] = load_vec<VecSize>(arrays.f + at);
          dout[ahead] = load_vec<VecSize>(arrays.dout + at);
        }
        columns[ahead] = (left_access + column) * kAccessPixels;
        column += step_columns;
        at += step_rows * row_stride + step_columns * access_stride;
        if (column >= width) {
          column -= width;
          at += row_stride - width * access_stride;
        }
      }
#pragma unroll
      for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
        if (ahead * step >= remaining) break;
        const Vec<float, VecSize> f_values = to_float(f[ahead]), dout_values = to_float(dout[ahead]);
        with_silu(geometry.silu, [&](auto silu) {
#pragma unroll
          for (int i = 0; i < VecSize; ++i) {
            const int thread_channel = ChannelsLast ? i : 0, pixel_column = columns[ahead] + i;
            const float centred = f_values[i] - mean[thread_channel];
            const float h = activation_gradient<silu>(dout_values[i], centred, affine[thread_channel]);
            if (ChannelsLast || (pixel_column >= pixels.left && pixel_column < pixels.right)) {
              sums[thread_channel].p += h;
              sums[thread_channel].q += h * centred;
            }
          }
        });
      }
    }
  }
};

// The sums of a block's threads in NHWC, side by side in shared memory.
template <int VecSize>
struct ChannelSums {
  // From one of a thread's channels to the next. 16 sums span all banks, so VecSize adjacent channels start in different ones.
  static constexpr int kPitch = kThreads + kWarpSize / 2 / VecSize;
  // Followed by the terms of the channels.
  static constexpr size_t kSharedBytes =
      sizeof(GradientSums) * VecSize * kPitch + BlockChannels<VecSize, kChannelTerms>::kSharedBytes;
  const CellPlan& plan;
  const int channels;  // of the block's channels, those that exist
  const Shared<GradientSums> shared;

  MOVQ_DEVICE ChannelSums(const Geometry& geometry, const CellPlan& plan, int block_channel)
      : plan(plan), channels(min(plan.threads_inner * VecSize, geometry.channels - block_channel)), shared(0, VecSize * kPitch) {}

  MOVQ_DEVICE void store(const GradientSums (&sums)[VecSize]) const {
#pragma unroll
    for (int i = 0; i < VecSize; ++i) shared.store(i * kPitch + threadIdx.x, sums[i]);
  }

  MOVQ_DEVICE void add(const GradientSums (&sums)[VecSize]) const {
#pragma unroll
    for (int i = 0; i < VecSize; ++i) shared.store(i * kPitch + threadIdx.x, shared.load(i * kPitch + threadIdx.x) + sums[i]);
  }

  // The sum over rows first_row, first_row + 1, ... of threads, for one of the block's channels.
  MOVQ_DEVICE GradientSums sum_rows(int channel, int first_row, int rows) const {
    const int first = channel % VecSize * kPitch + channel / VecSize + first_row * plan.threads_inner;
    GradientSums sum = {};
    for (int row = 0; row < rows; ++row) sum = sum + shared.load(first + row * plan.threads_inner);
    return sum;
  }
};

// The mean, slope and offset of a block's channels in NHWC.
template <int VecSize>
struct ChannelTerms : BlockChannels<VecSize, kChannelTerms> {
  template <class T>
  MOVQ_DEVICE ChannelTerms(const Geometry& geometry, const BackwardArrays<T>& arrays, const CellThread<VecSize, true>& thread,
                           const ChannelSums<VecSize>& sums)
      : BlockChannels<VecSize, kChannelTerms>(sums.shared.end()) {
    this->fill(sums.channels, [&](int channel, auto& terms) {
      const Affine affine = load_affine(geometry, arrays, thread.image, thread.block_channel + channel);
      terms[kMean] = load_mean(geometry, arrays, thread.image, thread.block_channel + channel);
      terms[kSlope] = affine.slope;
      terms[kOffset] = affine.offset;
    });
  }

  // What a thread needs to sum the pixels of a cell with these Y and B.
  template <class T>
  MOVQ_DEVICE PixelSum<T, VecSize, true> pixel_sum(const Geometry& geometry, const BackwardArrays<T>& arrays,
                                                   const CellThread<VecSize, true>& thread, const Vec<float, VecSize>& y,
                                                   const Vec<float, VecSize>& b) const {
    const int64_t base = element_offset<true>(geometry, thread.image, thread.channel, 0, geometry.pixels);
    PixelSum<T, VecSize, true> sum = {geometry, arrays, base, this->load_vec(kMean, thread.inner)};
    const Vec<float, VecSize> slope = this->load_vec(kSlope, thread.inner), offset = this->load_vec(kOffset, thread.inner);
#pragma unroll
    for (int i = 0; i < VecSize; ++i) sum.affine[i] = Affine{slope[i], offset[i]}.modulated(y[i], b[i]);
    return sum;
  }
};

template <class T, int VecSize>
__global__ void __launch_bounds__(kThreads, 2) sum_cell_per_thread(Geometry geometry, CellPlan plan, BackwardArrays<T> arrays) {
  allow_next_kernel();
  const CellThread<VecSize, true> thread(geometry, plan);
  // Sums of Y P and Y Q over each thread's cells. They are in shared memory to leave the registers to loads.
  const ChannelSums<VecSize> totals(geometry, plan, thread.block_channel);
  const ChannelTerms<VecSize> terms(geometry, arrays, thread, totals);
  GradientSums sums[VecSize] = {};
  totals.store(sums);
  const int end_cell = thread.idle ? 0 : min((thread.chunk + 1) * plan.chunk_cells, geometry.zq_pixels);
  for (int cell = thread.chunk * plan.chunk_cells + thread.outer; cell < end_cell; cell += plan.threads_outer) {
    const int64_t at = element_offset<true>(geometry, thread.image, thread.channel, cell, geometry.zq_pixels);
    const auto y = load_vec<VecSize>(arrays.zq_y + at), b = load_vec<VecSize>(arrays.zq_b + at);
#pragma unroll
    for (int i = 0; i < VecSize; ++i) sums[i] = {};
    terms.pixel_sum(geometry, arrays, thread, to_float(y), to_float(b))
        .template add<2>(pixels_of_cell(geometry, cell), 0, 1, sums);
    asm volatile("" ::: "memory");  // the terms and Y are read again: keeping them would exceed the registers
    write_cell_gradients(arrays, at, terms.load_vec(kSlope, thread.inner), terms.load_vec(kOffset, thread.inner), sums);
    totals.add(sums);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < totals.channels; i += blockDim.x) {
    store_chunk_sums(geometry, arrays, thread.image, plan.chunks, thread.chunk, thread.block_channel + i,
                     totals.sum_rows(i, 0, plan.threads_outer));
  }
}

template <class T, int VecSize>
__global__ void __launch_bounds__(kThreads, 2) sum_cell_per_team(Geometry geometry, CellPlan plan, BackwardArrays<T> arrays) {
  allow_next_kernel();
  const CellThread<VecSize, true> thread(geometry, plan);
  const ChannelSums<VecSize> block_sums(geometry, plan, thread.block_channel);
  const ChannelTerms<VecSize> terms(geometry, arrays, thread, block_sums);
  const int first_cell = thread.chunk * plan.chunk_cells, cells = min(plan.chunk_cells, geometry.zq_pixels - first_cell);
  GradientSums sums[VecSize] = {};
  const int team = thread.outer / plan.team_threads;
  if (!thread.idle && team < cells) {
    const int64_t at = element_offset<true>(geometry, thread.image, thread.channel, first_cell + team, geometry.zq_pixels);
    const auto y = load_vec<VecSize>(arrays.zq_y + at), b = load_vec<VecSize>(arrays.zq_b + at);
    terms.pixel_sum(geometry, arrays, thread, to_float(y), to_float(b))
        .add(pixels_of_cell(geometry, first_cell + team), thread.outer - team * plan.team_threads, plan.team_threads, sums);
  }
  block_sums.store(sums);
  __syncthreads();
  // The threads take other roles: `adders` of them for each channel add up the members of every adders-th team.
  const int adders = blockDim.x / block_sums.channels, adder = threadIdx.x / block_sums.channels;
  const int channel = threadIdx.x - adder * block_sums.channels;
  GradientSums total = {};  // sums of Y P and Y Q over this adder's cells
  for (int cell = adder; cell < cells && adder < adders; cell += adders) {
    GradientSums cell_sums[1] = {block_sums.sum_rows(channel, cell * plan.team_threads, plan.team_threads)};
    const int64_t at =
        element_offset<true>(geometry, thread.image, thread.block_channel + channel, first_cell + cell, geometry.zq_pixels);
    write_cell_gradients<T, 1>(arrays, at, {{terms.load(kSlope, channel)}}, {{terms.load(kOffset, channel)}}, cell_sums);
    total = total + cell_sums[0];
  }
  __syncthreads();
  block_sums.shared.store(threadIdx.x, total);
  __syncthreads();
  if (adder > 0) return;
  for (int other = 1; other < adders; ++other) {
    total = total + block_sums.shared.load(other * block_sums.channels + channel);
  }
  store_chunk_sums(geometry, arrays, thread.image, plan.chunks, thread.chunk, thread.block_channel + channel, total);
}

template <class T, int VecSize>
__global__ void __launch_bounds__(kThreads, 2) sum_cell_per_block(Geometry geometry, CellPlan plan, BackwardArrays<T> arrays) {
  allow_next_kernel();
  const CellThread<VecSize, false> thread(geometry, plan);
  const int cell = thread.chunk;
  const int64_t at = element_offset<false>(geometry, thread.image, thread.channel, cell, geometry.zq_pixels);
  const Affine affine = load_affine(geometry, arrays, thread.image, thread.channel);
  const Affine modulated = affine.modulated(to_float(load(arrays.zq_y + at)), to_float(load(arrays.zq_b + at)));
  GradientSums sums[1] = {};
  const PixelSum<T, VecSize, false> pixel_sum = {
      geometry,
      arrays,
      element_offset<false>(geometry, thread.image, thread.channel, 0, geometry.pixels),
      {{load_mean(geometry, arrays, thread.image, thread.channel)}},
      {modulated}};
  pixel_sum.add(pixels_of_cell(geometry, cell), thread.inner, plan.threads_inner, sums);
  sums[0] = block_reduce(sums[0], Sum(), Shared<GradientSums>(0, blockDim.x / kWarpSize));
  if (threadIdx.x > 0) return;
  write_cell_gradients<T, 1>(arrays, at, {{affine.slope}}, {{affine.offset}}, sums);
  store_chunk_sums(geometry, arrays, thread.image, plan.chunks, cell, thread.channel, sums[0]);
}

template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 2) sum_pixel_ranges(Geometry geometry, CellPlan plan, BackwardArrays<T> arrays) {
  allow_next_kernel();
  const CellThread<VecSize, ChannelsLast> thread(geometry, plan);
  const int left = thread.chunk * plan.chunk_pixels;
  const int right = int(min(left + int64_t(plan.chunk_pixels), int64_t(geometry.pixels)));
  const Box pixels = {{0, 1, 0, 1}, left, right};
  auto store = [&](int channel, const GradientSums& sums) {
    store_chunk_sums(geometry, arrays, thread.image, plan.chunks, thread.chunk, channel, sums);
  };
  GradientSums sums[thread.kChannels] = {};
  if constexpr (ChannelsLast) {
    const ChannelSums<VecSize> block_sums(geometry, plan, thread.block_channel);
    const ChannelTerms<VecSize> terms(geometry, arrays, thread, block_sums);
    Vec<float, VecSize> y, b;
#pragma unroll
    for (int i = 0; i < VecSize; ++i) y[i] = 1, b[i] = 0;
    if (!thread.idle) terms.pixel_sum(geometry, arrays, thread, y, b).add(pixels, thread.outer, plan.threads_outer, sums);
    block_sums.store(sums);
    __syncthreads();
    for (int i = threadIdx.x; i < block_sums.channels; i += blockDim.x) {
      store(thread.block_channel + i, block_sums.sum_rows(i, 0, plan.threads_outer));
    }
  } else {
    const PixelSum<T, VecSize, false> pixel_sum = {
        geometry,
        arrays,
        element_offset<false>(geometry, thread.image, thread.channel, 0, geometry.pixels),
        {{load_mean(geometry, arrays, thread.image, thread.channel)}},
        {load_affine(geometry, arrays, thread.image, thread.channel)}};
    pixel_sum.add(pixels, thread.inner, plan.threads_inner, sums);
    const GradientSums sum = block_reduce(sums[0], Sum(), Shared<GradientSums>(0, blockDim.x / kWarpSize));
    if (threadIdx.x == 0) store(thread.channel, sum);
  }
}

template <int VecSize, bool ChannelsLast>
size_t cell_shared_bytes(const CellPlan& plan) {
  return ChannelsLast ? ChannelSums<VecSize>::kSharedBytes : plan.threads() / kWarpSize * sizeof(GradientSums);
}

template <class T, int VecSize, bool ChannelsLast>
void launch_cell_sums(const Geometry& geometry, const CellPlan& plan, const BackwardArrays<T>& arrays, cudaStream_t stream) {
  auto launch_as = [&](auto kernel, const char* name) {
    const LaunchConfig config = {grid_size(name, geometry.batch * plan.channel_tiles * plan.chunks), unsigned(plan.threads()),
                                 cell_shared_bytes<VecSize, ChannelsLast>(plan)};
    launch(kernel, name, config, stream, geometry, plan, arrays);
  };
  if (plan.kernel == CellKernel::kPixelRanges) {
    launch_as(sum_pixel_ranges<T, VecSize, ChannelsLast>, "spatial_norm sum_pixel_ranges");
  } else if constexpr (!ChannelsLast) {
    launch_as(sum_cell_per_block<T, VecSize>, "spatial_norm sum_cell_per_block");
  } else if (plan.kernel == CellKernel::kCellPerTeam) {
    launch_as(sum_cell_per_team<T, VecSize>, "spatial_norm sum_cell_per_team");
  } else {
    launch_as(sum_cell_per_thread<T, VecSize>, "spatial_norm sum_cell_per_thread");
  }
}

}  // namespace spatial_norm
}  // namespace movq
