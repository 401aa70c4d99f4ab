// The epilogue of a convolution: adds its bias and the residual in place, in one pass.
//
// Bytes: x and residual are read once, x is written once.
// An access is VecSize adjacent elements (16 bytes, or one element where alignment or sizes rule that out): channels of one
// pixel in NHWC (ChannelsLast), pixels of one channel in NCHW. A block takes a run of adjacent accesses, whatever the shape. A
// thread loads the bias again only when it reaches another channel.
// Registers: at most 64 (__launch_bounds__), for 4 blocks of 256 threads per multiprocessor. Each thread has 2 loads of x and 2
// of residual in flight (1 of each in small maps), 64 KB or 32 KB per multiprocessor. An H100 needs about 20 KB to cover its
// memory latency at full bandwidth. benchmarks/results/resources.md lists what the compiler allocates.
#include "epilogue.h"

#include <algorithm>
#include <type_traits>

#include "device/convert.cuh"
#include "device/launch.cuh"
#include "device/memory.cuh"

namespace movq {
namespace epilogue {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTargetBlocks = 1024;  // about one wave of blocks on the largest GPUs
constexpr int kMaxThreadAccesses = 16;

// How x is cut into blocks of adjacent accesses, and the bias into units. In NHWC a unit is VecSize channels, so adjacent
// accesses have different units. In NCHW a unit is one channel, and lasts for a whole map.
struct EpiloguePlan {
  int64_t accesses;
  int block_accesses;
  unsigned unit_accesses;  // adjacent accesses with the same unit
  unsigned units;          // units in all channels
  bool float_bias;
};

// Loads the N channels of a unit.
template <class T, int N>
MOVQ_DEVICE Vec<float, N> load_bias(const void* bias, bool is_float, unsigned unit) {
  const int64_t channel = int64_t(unit) * N;
  if (!is_float) return to_float(load_vec<N>(static_cast<const T*>(bias) + channel));
  constexpr int kFloats = N < 4 ? N : 4;  // 16 bytes
  Vec<float, N> values;
#pragma unroll
  for (int i = 0; i < N; i += kFloats) {
    const auto part = load_vec<kFloats>(static_cast<const float*>(bias) + channel + i);
#pragma unroll
    for (int k = 0; k < kFloats; ++k) values[i + k] = part[k];
  }
  return values;
}

template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 4) add(EpiloguePlan plan, T* x, const void* bias, const T* residual) {
  constexpr int kLoadsInFlight = 2;  // of x and of residual each
  const int64_t first = int64_t(blockIdx.x) * plan.block_accesses;
  const int accesses = int(min(int64_t(plan.block_accesses), plan.accesses - first));
  const unsigned first_unit = unsigned(first / plan.unit_accesses % plan.units), in_unit = unsigned(first % plan.unit_accesses);
  // From here on offsets have 32 bits: with 64, nvcc 13.0 splits the wide stores.
  x += first * VecSize;
  residual += residual ? first * VecSize : 0;

  constexpr int kChannels = ChannelsLast ? VecSize : 1;
  Vec<float, kChannels> unit_bias = {};
  unsigned loaded_unit = plan.units;  // none
  for (int access = threadIdx.x; access < accesses; access += kLoadsInFlight * kThreads) {
    Vec<T, VecSize> values[kLoadsInFlight], residuals[kLoadsInFlight] = {};
#pragma unroll
    for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
      const int at = access + ahead * kThreads;
      if (at < accesses) values[ahead] = load_vec<VecSize>(x + at * VecSize);
      if (at < accesses && residual) residuals[ahead] = load_vec<VecSize, Cache::kStream>(residual + at * VecSize);
    }
#pragma unroll
    for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
      const int at = access + ahead * kThreads;
      if (at >= accesses) break;
      if (bias) {
        const unsigned unit = (first_unit + (in_unit + at) / plan.unit_accesses) % plan.units;
        if (unit != loaded_unit) {
          unit_bias = load_bias<T, kChannels>(bias, plan.float_bias, unit);
          loaded_unit = unit;
        }
      }
      Vec<float, VecSize> sums;
#pragma unroll
      for (int i = 0; i < VecSize; ++i) {
        sums[i] = to_float(values[ahead][i]) + unit_bias[ChannelsLast ? i : 0] + to_float(residuals[ahead][i]);
      }
      store_vec(x + at * VecSize, from_float<T>(sums));
    }
  }
}

bool can_use_wide_accesses(const EpilogueProblem& problem, const Epilogue& tensors) {
  const bool aligned =
      is_aligned(tensors.x, 16) && is_aligned(tensors.residual, 16) && (!problem.channels_last || is_aligned(tensors.bias, 16));
  return aligned && (problem.channels_last ? problem.channels : problem.pixels) % (16 / bytes(problem.dtype)) == 0;
}

template <class T, int VecSize, bool ChannelsLast>
void launch_add(const EpilogueProblem& problem, const Epilogue& tensors, cudaStream_t stream) {
  EpiloguePlan plan = {};
  plan.accesses = problem.batch * problem.channels * problem.pixels / VecSize;
  const int64_t single_round_blocks = ceil_div<int64_t>(plan.accesses, kThreads);
  plan.block_accesses = kThreads * int(std::clamp<int64_t>(single_round_blocks / kTargetBlocks, 1, kMaxThreadAccesses));
  plan.unit_accesses = ChannelsLast ? 1 : unsigned(problem.pixels / VecSize);
  plan.units = unsigned(ChannelsLast ? problem.channels / VecSize : problem.channels);
  plan.float_bias = problem.bias_dtype == DType::float32;
  const unsigned blocks = grid_size("epilogue add", ceil_div<int64_t>(plan.accesses, plan.block_accesses));
  launch(add<T, VecSize, ChannelsLast>, "epilogue add", {blocks, kThreads}, stream, plan, static_cast<T*>(tensors.x),
         tensors.bias, static_cast<const T*>(tensors.residual));
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
