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
// Registers: at most 64 (__launch_bounds__), for 4 blocks of 256 threads per multiprocessor. Each thread has 2 loads of x and 2
// of residual in flight (1 of each in small maps), 64 KB or 32 KB per multiprocessor. An H100 needs about 20 KB to cover its
// memory latency at full bandwidth. benchmarks/results/resources.md lists what the compiler allocates.
#include "epilogue.h"

#include <algorithm>
#include <type_traits>

#include "channel_bias.cuh"
#include "device/launch.cuh"

namespace movq {
namespace epilogue {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTargetBlocks = 1024;  // about one wave of blocks on the largest GPUs
constexpr int kMaxThreadAccesses = 16;

// How the matrix of accesses is cut into blocks, numbered along the rows first. A block has `inner` x `outer` threads over
// columns x rows, and walks `steps` times down the rows (NHWC) or along the columns (NCHW).
struct EpiloguePlan {
  int64_t rows;
  int columns, channels;
  int inner, outer, steps;
  int blocks_across;  // side by side over the columns
  bool float_bias;
};

template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 4) add(EpiloguePlan plan, T* x, const void* bias, const T* residual) {
  const unsigned block_row = blockIdx.x / plan.blocks_across, block_column = blockIdx.x - block_row * plan.blocks_across;
  const unsigned outer = threadIdx.x / plan.inner, inner = threadIdx.x - outer * plan.inner;
  const int64_t row = int64_t(block_row) * plan.outer * (ChannelsLast ? plan.steps : 1) + outer;
  const unsigned column = block_column * plan.inner * (ChannelsLast ? 1 : plan.steps) + inner;
  if (outer >= unsigned(plan.outer) || row >= plan.rows || column >= unsigned(plan.columns)) return;

  const int step = ChannelsLast ? plan.outer : plan.inner, stride = step * VecSize * (ChannelsLast ? plan.columns : 1);
  int left = int(min(ChannelsLast ? plan.rows - row : int64_t(plan.columns) - column, int64_t(step) * plan.steps));
  const int64_t first = (row * plan.columns + column) * VecSize;
  x += first;
  const bool has_residual = residual;
  residual += has_residual ? first : 0;

  constexpr int kChannels = ChannelsLast ? VecSize : 1;
  const int64_t channel = ChannelsLast ? int64_t(column) * VecSize : unsigned(row) % unsigned(plan.channels);
  Vec<float, kChannels> channel_bias = {};
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
      store_vec(x + i * stride, from_float<T>(sums));
    }
    x += int64_t(kLoads) * stride;
    left -= kLoads * step;
  };
  while (left > step) add_accesses(std::integral_constant<int, 2>());
  if (left > 0) add_accesses(std::integral_constant<int, 1>());
}

bool can_use_wide_accesses(const EpilogueProblem& problem, const Epilogue& tensors) {
  const bool aligned =
      is_aligned(tensors.x, 16) && is_aligned(tensors.residual, 16) && (!problem.channels_last || is_aligned(tensors.bias, 16));
  return aligned && (problem.channels_last ? problem.channels : problem.pixels) % (16 / bytes(problem.dtype)) == 0;
}

template <class T, int VecSize, bool ChannelsLast>
void launch_add(const EpilogueProblem& problem, const Epilogue& tensors, cudaStream_t stream) {
  EpiloguePlan plan = {};
  plan.rows = problem.batch * (ChannelsLast ? problem.pixels : problem.channels);
  if (!ChannelsLast && plan.rows > INT32_MAX) {  // the kernel divides them by the channels in 32 bits
    throw std::runtime_error("epilogue add: expected fewer than 2^31 channels in the batch, got " + std::to_string(plan.rows));
  }
  plan.columns = int((ChannelsLast ? problem.channels : problem.pixels) / VecSize);
  plan.channels = int(problem.channels);
  plan.float_bias = problem.bias_dtype == DType::float32;
  const int tiles = ceil_div(plan.columns, kThreads);  // of one width, in whole warps
  plan.inner = tiles == 1 ? plan.columns : round_up(ceil_div(plan.columns, tiles), kWarpSize);
  plan.outer = int(std::min<int64_t>(kThreads / plan.inner, plan.rows));
  const int64_t across = ceil_div(plan.columns, plan.inner), down = ceil_div<int64_t>(plan.rows, plan.outer);
  const int64_t steps = std::clamp<int64_t>(across * down / kTargetBlocks, 1, kMaxThreadAccesses);
  plan.steps = int(std::min(steps, ChannelsLast ? down : across));
  plan.blocks_across = int(ChannelsLast ? across : ceil_div<int64_t>(across, plan.steps));
  const int64_t blocks = plan.blocks_across * (ChannelsLast ? ceil_div<int64_t>(down, plan.steps) : down);
  const LaunchConfig config = {grid_size("epilogue add", blocks), unsigned(round_up(plan.inner * plan.outer, kWarpSize))};
  launch(add<T, VecSize, ChannelsLast>, "epilogue add", config, stream, plan, static_cast<T*>(tensors.x), tensors.bias,
         static_cast<const T*>(tensors.residual));
}

}  // namespace
}  // namespace epilogue

void add_bias_residual(const EpilogueProblem& problem, const Epilogue& tensors, cudaStream_t stream) {
  const bool wide = epilogue::can_use_wide_accesses(problem, tensors);
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWide = 16 / sizeof(T);
    auto launch_in_layout = [&](auto channels_last) {
      constexpr bool ChannelsLast = decltype(channels_last)::value;
      wide ? epilogue::launch_add<T, kWide, ChannelsLast>(problem, tensors, stream)
           : epilogue::launch_add<T, 1, ChannelsLast>(problem, tensors, stream);
    };
    problem.channels_last ? launch_in_layout(std::true_type()) : launch_in_layout(std::false_type());
  });
}

}  // namespace movq
