// Gathers the large map from the windows of an upsampling convolution, and adds the bias.
//
// Pixel (y, x) of the large map is phase ((y + 1) % 2, (x + 1) % 2) of the window in row (y + 1) / 2 and column (x + 1) / 2. Both
// hold its channels in one run of memory, so this is a copy of runs.
//
// Bytes: windows are read once and the map written once, in accesses of 16 bytes (one element where alignment or sizes rule that
// out). The phases of border windows that lie outside the map, about half of them, are not read.
// Blocks: one takes 128 bytes of channels of a run of pixels in one row. A thread keeps its channels and its phase, so it loads
// the bias once, and steps through both maps by constant strides.
// Instructions: at most 40 per access of 16 bytes, none of them a division. A warp issues them in 10 cycles, while its 1 KB take
// 70 cycles of an H100's bandwidth (see epilogue.cu). tests/test_epilogue_machine_code.py counts them.
// With statistics (chunk_statistics.cuh): at most 84 instructions per access, 21 of the 70 cycles.
// Registers: at most 64 (__launch_bounds__), for 4 blocks of 256 threads per multiprocessor, each with 2 loads of 16 bytes in
// flight: 32 KB, where an H100 needs about 20 KB to cover its memory latency at full bandwidth.
#include <algorithm>
#include <type_traits>

#include "channel_bias.cuh"
#include "chunk_statistics.cuh"
#include "device/launch.cuh"
#include "upsampling.h"

namespace movq {
namespace upsampling {
namespace {

constexpr int kThreads = 256, kLoadsInFlight = 2;
constexpr int64_t kTargetBlocks = 1024;  // about one wave of blocks on the largest GPUs
constexpr int kMaxRounds = 8;            // accesses per thread

struct Interleaving {
  int height, width;  // of the large map
  int channels, channel_tiles;
  int chunk_columns;  // of a row, per block
  bool float_bias;
  int groups, chunks;  // of an image's statistics, and of a row's
  QuadGroups quads;
};

// Threads side by side over the channels of a pixel, and the columns that a block covers at once.
template <int VecSize> constexpr int kInner = VecSize > 1 ? 8 : 32;
template <int VecSize> constexpr int kColumnStep = kThreads / kInner<VecSize>;

// Blocks: channel tile (fastest) and chunk of columns in x, row in y, image in z.
template <class T, int VecSize, bool WithStatistics>
__global__ void __launch_bounds__(kThreads, 4)
    interleave(Interleaving plan, const T* windows, const void* bias, T* out, float* statistics) {
  constexpr int kStep = kColumnStep<VecSize>;
  static_assert(kStep % 2 == 0, "a thread must keep its phase");
  const unsigned chunk = blockIdx.x / unsigned(plan.channel_tiles), tile = blockIdx.x - chunk * plan.channel_tiles;
  const unsigned y = blockIdx.y, x = chunk * plan.chunk_columns + threadIdx.x / kInner<VecSize>;
  const int channel = int(tile * kInner<VecSize> + threadIdx.x % kInner<VecSize>) * VecSize;
  const int columns = min(int(chunk + 1) * plan.chunk_columns, plan.width) - int(x);  // of this thread and those to its right
  const bool idle = channel >= plan.channels || columns <= 0;
  if (!WithStatistics && idle) return;

  const unsigned phase = (y + 1) % 2 * 2 + (x + 1) % 2, window_rows = plan.height / 2 + 1, window_columns = plan.width / 2 + 1;
  const int64_t window = (int64_t(blockIdx.z) * window_rows + (y + 1) / 2) * window_columns + (x + 1) / 2;
  windows += (window * 4 + phase) * plan.channels + channel;
  out += ((int64_t(blockIdx.z) * plan.height + y) * plan.width + x) * plan.channels + channel;
  const int window_stride = kStep / 2 * 4 * plan.channels, out_stride = kStep * plan.channels;

  Vec<T, VecSize> pixels[kLoadsInFlight];
  auto load_pixels = [&](int first) {
#pragma unroll
    for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
      // Beyond the end it loads the first pixel again: loads under conditions would wait for one another.
      const int valid = first + ahead * kStep < columns ? ahead : 0;
      pixels[ahead] = load_vec<VecSize, Cache::kStream>(windows + valid * window_stride);
    }
  };
  MomentsOrNone<WithStatistics, VecSize> moments;
  auto copy_pixels = [&] {
    load_pixels(0);
    const Vec<float, VecSize> added = load_bias<T, VecSize>(bias, plan.float_bias, channel);
    for (int first = 0;;) {
#pragma unroll
      for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
        if (first + ahead * kStep >= columns) break;
        const Vec<float, VecSize> pixel = to_float(pixels[ahead]);
        Vec<float, VecSize> sums;
#pragma unroll
        for (int i = 0; i < VecSize; ++i) sums[i] = pixel[i] + added[i];
        const Vec<T, VecSize> rounded = from_float<T>(sums);
        store_vec(out + ahead * out_stride, rounded);
        moments.add(rounded);
      }
      first += kLoadsInFlight * kStep;
      if (first >= columns) break;
      windows += kLoadsInFlight * window_stride;
      out += kLoadsInFlight * out_stride;
      load_pixels(first);
    }
  };
  if (!idle) copy_pixels();
  if constexpr (WithStatistics) {
    const int tile_groups = plan.quads.columns / plan.quads.group_columns, first_group = int(tile) * tile_groups;
    const int64_t parts = int64_t(plan.height) * plan.chunks;
    const int64_t first_part = (int64_t(blockIdx.z) * plan.groups + first_group) * parts + int64_t(y) * plan.chunks + chunk;
    store_group_moments(plan.quads, threadIdx.x / kInner<VecSize>, threadIdx.x % kInner<VecSize>, moments,
                        min(tile_groups, plan.groups - first_group), statistics, first_part, parts);
  }
}

template <class T, int VecSize, bool WithStatistics>
void launch_interleave(const InterleaveProblem& problem, const void* windows, const void* bias, void* out, float* statistics,
                       cudaStream_t stream) {
  Interleaving plan = {};
  plan.height = int(2 * problem.height);
  plan.width = int(2 * problem.width);
  plan.channels = int(problem.channels);
  plan.channel_tiles = ceil_div(plan.channels, kInner<VecSize> * VecSize);
  const int64_t steps = ceil_div(plan.width, kColumnStep<VecSize>);
  const int64_t single_round_blocks = problem.batch * plan.height * steps * plan.channel_tiles;
  const int64_t rounds = std::clamp<int64_t>(single_round_blocks / kTargetBlocks, kLoadsInFlight, kMaxRounds);
  plan.chunk_columns = WithStatistics ? int(std::min<int64_t>(problem.chunk_columns, plan.width))
                                      : int(std::min(rounds, steps) * kColumnStep<VecSize>);
  plan.float_bias = problem.bias_dtype == DType::float32;
  const int64_t chunks = ceil_div(plan.width, plan.chunk_columns);
  LaunchConfig config = {
      dim3(grid_size("interleave windows", chunks * plan.channel_tiles), unsigned(plan.height), unsigned(problem.batch)),
      kThreads};
  if (WithStatistics) {
    plan.groups = int(problem.groups);
    plan.chunks = int(chunks);
    const int group_columns = int(problem.channels / problem.groups / kQuad);
    plan.quads =
        plan_quad_groups(kColumnStep<VecSize>, kInner<VecSize> * VecSize / kQuad, kColumnStep<VecSize>, group_columns, kThreads);
    config.shared_bytes = plan.quads.shared_bytes();
  }
  launch(interleave<T, VecSize, WithStatistics>, "interleave windows", config, stream, plan, static_cast<const T*>(windows), bias,
         static_cast<T*>(out), statistics);
}

void check_statistics(const InterleaveProblem& problem, bool wide) {
  const int64_t group_channels = problem.channels / problem.groups;
  const bool fits = group_channels % kQuad == 0 && 128 / bytes(problem.dtype) % group_channels == 0;
  if (wide && fits && problem.chunk_columns > 0 && group_channels * problem.groups == problem.channels) return;
  throw std::runtime_error("interleave windows: expected sizes and alignment for which upsampling.h promises statistics, got " +
                           std::to_string(problem.channels) + " channels, " + std::to_string(problem.groups) +
                           " groups and chunks of " + std::to_string(problem.chunk_columns) + " columns");
}

}  // namespace
}  // namespace upsampling

void interleave_windows(const InterleaveProblem& problem, const void* windows, const void* bias, void* out, float* statistics,
                        cudaStream_t stream) {
  const bool aligned = is_aligned(windows, 16) && is_aligned(bias, 16) && is_aligned(out, 16);
  const bool wide = aligned && problem.channels % (16 / bytes(problem.dtype)) == 0;
  if (problem.groups) upsampling::check_statistics(problem, wide);
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWide = 16 / sizeof(T);
    const auto launch = problem.groups ? upsampling::launch_interleave<T, kWide, true>
                        : wide         ? upsampling::launch_interleave<T, kWide, false>
                                       : upsampling::launch_interleave<T, 1, false>;
    launch(problem, windows, bias, out, statistics, stream);
  });
}

}  // namespace movq
