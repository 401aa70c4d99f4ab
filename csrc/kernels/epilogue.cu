// The epilogue of a convolution: adds its bias and the residual in place, in one pass.
//
// Bytes: x and residual are read once, x is written once.
// An access is VecSize adjacent elements (16 bytes, or one element where alignment or sizes rule that out). Accesses form a
// matrix: in NHWC (ChannelsLast) a row is a pixel and a column its channels, in NCHW a row is a channel of an image and a column
// its pixels. A thread keeps its channels, so it loads the bias once and steps by a constant stride: down a column in NHWC, along
// a row in NCHW. Threads side by side read adjacent memory.
// Instructions: at most 66 per access of 8 bfloat16 with bias and residual, none of them a division. A warp issues them in 17
// cycles (4 per cycle and multiprocessor), while its 1.5 KB take 106 cycles of an H100's bandwidth (3.35 TB/s over 132
// multiprocessors at 1.755 GHz, data sheet). tests/test_epilogue_machine_code.py counts them.
// With statistics (chunk_statistics.cuh): at most 114 instructions per access, 29 of the 106 cycles, and once per block some 200
// per warp. A block has 7 KB of shared memory for 32 groups of 128 to 512 channels of bfloat16, and never more than 16 KB.
// Registers: at most 64 (__launch_bounds__), for 4 blocks of 256 threads per multiprocessor. Each thread has 2 loads of x and 2
// of residual in flight (1 of each in small maps), 64 KB or 32 KB per multiprocessor. An H100 needs about 20 KB to cover its
// memory latency at full bandwidth. benchmarks/results/resources.md lists what the compiler allocates.
#include "epilogue.h"

#include <algorithm>
#include <type_traits>

#include "channel_bias.cuh"
#include "chunk_statistics.cuh"
#include "device/launch.cuh"

namespace movq {
namespace epilogue {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTargetBlocks = 1024;  // about one wave of blocks on the largest GPUs
constexpr int kMaxThreadAccesses = 16;

// How the matrix of accesses is cut into blocks, numbered along the rows first. A block has `inner` x `outer` threads over
// columns x rows, and walks down a chunk of rows (NHWC) or along a chunk of columns (NCHW).
struct EpiloguePlan {
  int64_t rows;        // of an image in NHWC with statistics, of all images otherwise
  int64_t row_chunks;  // of these rows, in NHWC
  int columns, channels;
  int inner, outer, chunk;
  int blocks_across;  // side by side over the columns
  bool float_bias;
  int64_t part_stride;  // from a group (NHWC) or channel (NCHW) to the next in the statistics
  QuadGroups quads;
};

template <class T, int VecSize, bool ChannelsLast, bool WithStatistics>
__global__ void __launch_bounds__(kThreads, 4)
    add(EpiloguePlan plan, T* x, const void* bias, const T* residual, float* statistics) {
  const unsigned block_row = blockIdx.x / plan.blocks_across, block_column = blockIdx.x - block_row * plan.blocks_across;
  const unsigned outer = threadIdx.x / plan.inner, inner = threadIdx.x - outer * plan.inner;
  int64_t image = 0, row_chunk = block_row;
  if constexpr (ChannelsLast && WithStatistics) {
    image = block_row / unsigned(plan.row_chunks);
    row_chunk -= image * plan.row_chunks;
  }
  const int64_t first_row = row_chunk * (ChannelsLast ? plan.chunk : plan.outer), row = first_row + outer;
  const unsigned first_column = block_column * (ChannelsLast ? plan.inner : plan.chunk), column = first_column + inner;
  const bool idle = outer >= unsigned(plan.outer) || row >= plan.rows || column >= unsigned(plan.columns);
  if (!WithStatistics && idle) return;

  const int step = ChannelsLast ? plan.outer : plan.inner, stride = step * VecSize * (ChannelsLast ? plan.columns : 1);
  int left = ChannelsLast ? int(min(plan.rows - first_row, int64_t(plan.chunk))) - int(outer)
                          : min(plan.columns - int(first_column), plan.chunk) - int(inner);
  if (WithStatistics && idle) left = 0;
  const int64_t first = ((image * plan.rows + row) * plan.columns + column) * VecSize;
  x += first;
  const bool has_residual = residual;
  residual += has_residual ? first : 0;

  constexpr int kChannels = ChannelsLast ? VecSize : 1;
  const int64_t channel = ChannelsLast ? int64_t(column) * VecSize : unsigned(row) % unsigned(plan.channels);
  Vec<float, kChannels> channel_bias = {};
  MomentsOrNone<WithStatistics, VecSize> moments;
  auto add_accesses = [&](auto loads) {  // that many at once: loads under conditions would wait for one another
    constexpr int kLoads = decltype(loads)::value;
    Vec<T, VecSize> values[kLoads], residuals[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) values[i] = load_vec<VecSize>(x + i * stride);
    if (has_residual) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) residuals[i] = load_vec<VecSize, Cache::kStream>(residual + i * stride);
      residual += int64_t(kLoads) * stride;
    }
    if (bias) {  // once, while the map's first loads are in flight
      channel_bias = load_bias<T, kChannels>(bias, plan.float_bias, channel);
      bias = nullptr;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      Vec<float, VecSize> sums = to_float(values[i]);
#pragma unroll
      for (int k = 0; k < VecSize; ++k) sums[k] += channel_bias[ChannelsLast ? k : 0];
      if (has_residual) {
        const Vec<float, VecSize> added = to_float(residuals[i]);
#pragma unroll
        for (int k = 0; k < VecSize; ++k) sums[k] += added[k];
      }
      const Vec<T, VecSize> rounded = from_float<T>(sums);
      store_vec(x + i * stride, rounded);
      moments.add(rounded);
    }
    x += int64_t(kLoads) * stride;
    left -= kLoads * step;
  };
  while (left > step) add_accesses(std::integral_constant<int, 2>());
  if (left > 0) add_accesses(std::integral_constant<int, 1>());
  if constexpr (WithStatistics) {
    const int groups =
        ChannelsLast ? plan.quads.columns / plan.quads.group_columns : int(min(plan.rows - first_row, int64_t(plan.outer)));
    const int64_t first_part =
        ChannelsLast ? image * groups * plan.part_stride + row_chunk : first_row * plan.part_stride + block_column;
    store_group_moments(plan.quads, outer, inner, moments, groups, statistics, first_part, plan.part_stride);
  }
}

bool can_use_wide_accesses(const EpilogueProblem& problem, const Epilogue& tensors) {
  const bool aligned =
      is_aligned(tensors.x, 16) && is_aligned(tensors.residual, 16) && (!problem.channels_last || is_aligned(tensors.bias, 16));
  return aligned && (problem.channels_last ? problem.channels : problem.pixels) % (16 / bytes(problem.dtype)) == 0;
}

void check_statistics(const EpilogueProblem& problem, bool wide) {
  const int64_t access = 16 / bytes(problem.dtype), group_channels = problem.channels / problem.groups;
  const bool fits = problem.channels_last ? group_channels % kQuad == 0 && problem.channels <= kThreads * access
                                          : problem.chunk_pixels % access == 0;
  if (wide && fits && problem.chunk_pixels > 0 && group_channels * problem.groups == problem.channels) return;
  throw std::runtime_error("epilogue add: expected sizes and alignment for which epilogue.h promises statistics, got " +
                           std::to_string(problem.channels) + " channels, " + std::to_string(problem.pixels) + " pixels, " +
                           std::to_string(problem.groups) + " groups and chunks of " + std::to_string(problem.chunk_pixels) +
                           " pixels");
}

template <class T, int VecSize, bool ChannelsLast, bool WithStatistics>
void launch_add(const EpilogueProblem& problem, const Epilogue& tensors, cudaStream_t stream) {
  EpiloguePlan plan = {};
  const int64_t all_rows = problem.batch * (ChannelsLast ? problem.pixels : problem.channels);
  if (!ChannelsLast && all_rows > INT32_MAX) {  // the kernel divides them by the channels in 32 bits
    throw std::runtime_error("epilogue add: expected fewer than 2^31 channels in the batch, got " + std::to_string(all_rows));
  }
  const int64_t images = ChannelsLast && WithStatistics ? problem.batch : 1;
  plan.rows = all_rows / images;
  plan.columns = int((ChannelsLast ? problem.channels : problem.pixels) / VecSize);
  plan.channels = int(problem.channels);
  plan.float_bias = problem.bias_dtype == DType::float32;
  const int tiles = ceil_div(plan.columns, kThreads);  // of one width, in whole warps
  plan.inner = tiles == 1 ? plan.columns : round_up(ceil_div(plan.columns, tiles), kWarpSize);
  plan.outer = int(std::min<int64_t>(kThreads / plan.inner, plan.rows));
  const int64_t across = ceil_div(plan.columns, plan.inner), down = ceil_div<int64_t>(plan.rows, plan.outer);
  const int step = ChannelsLast ? plan.outer : plan.inner;
  if (WithStatistics) {
    plan.chunk = int(std::min<int64_t>(ChannelsLast ? problem.chunk_pixels : ceil_div<int64_t>(problem.chunk_pixels, VecSize),
                                       ChannelsLast ? plan.rows : plan.columns));
  } else {
    const int64_t steps = std::clamp<int64_t>(across * down / kTargetBlocks, 1, kMaxThreadAccesses);
    plan.chunk = int(std::min(steps, ChannelsLast ? down : across)) * step;
  }
  plan.blocks_across = int(ChannelsLast ? across : ceil_div(plan.columns, plan.chunk));
  plan.row_chunks = ceil_div<int64_t>(plan.rows, ChannelsLast ? plan.chunk : plan.outer);
  const unsigned threads = round_up(plan.inner * plan.outer, kWarpSize);
  LaunchConfig config = {grid_size("epilogue add", images * plan.row_chunks * plan.blocks_across), threads};
  if (WithStatistics) {
    plan.part_stride = ChannelsLast ? plan.row_chunks : plan.blocks_across;
    const int columns = plan.inner * (VecSize / kQuad);
    const int group_columns = ChannelsLast ? int(problem.channels / problem.groups / kQuad) : columns;
    plan.quads = plan_quad_groups(plan.outer, columns, ChannelsLast ? plan.outer : 1, group_columns, threads);
    config.shared_bytes = plan.quads.shared_bytes();
  }
  launch(add<T, VecSize, ChannelsLast, WithStatistics>, "epilogue add", config, stream, plan, static_cast<T*>(tensors.x),
         tensors.bias, static_cast<const T*>(tensors.residual), tensors.statistics);
}

}  // namespace
}  // namespace epilogue

void add_bias_residual(const EpilogueProblem& problem, const Epilogue& tensors, cudaStream_t stream) {
  const bool wide = epilogue::can_use_wide_accesses(problem, tensors);
  if (problem.groups) epilogue::check_statistics(problem, wide);
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWide = 16 / sizeof(T);
    auto launch_in_layout = [&](auto channels_last) {
      constexpr bool ChannelsLast = decltype(channels_last)::value;
      if (problem.groups) return epilogue::launch_add<T, kWide, ChannelsLast, true>(problem, tensors, stream);
      wide ? epilogue::launch_add<T, kWide, ChannelsLast, false>(problem, tensors, stream)
           : epilogue::launch_add<T, 1, ChannelsLast, false>(problem, tensors, stream);
    };
    problem.channels_last ? launch_in_layout(std::true_type()) : launch_in_layout(std::false_type());
  });
}

}  // namespace movq
