// The epilogue of a convolution: one pass that adds its bias and the residual in place.
//
// Bytes: x and residual are read once and x is written once.
// An access is V adjacent elements (16 bytes, or 1 element where alignment or sizes forbid more): V channels of one pixel in NHWC
// (`Last`), V pixels of one channel in NCHW. A block takes a run of adjacent accesses, whatever the shape, and a thread reads the
// bias again only where it comes to another channel.
// Registers: at most 64 (__launch_bounds__) keep 4 blocks of 256 threads on a multiprocessor, each thread with 2 loads of x and 2
// of residual in flight: 64 KB, or 32 KB in small maps, where it makes one of each; latency of memory times the bandwidth is
// about 20 KB a multiprocessor on an H100. See benchmarks/results/resources.md for what the compiler made of it.
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
constexpr int64_t kBlocksWanted = 1024;  // about one wave of blocks on the largest GPUs
constexpr int kMostRounds = 16;          // accesses of a thread

// x as one run of accesses in memory. The bias comes in units: V channels in NHWC, which change from access to access, and one
// channel in NCHW, which holds for all accesses of a map.
struct Run {
  int64_t accesses;
  int span;  // accesses of a block
  unsigned unit_accesses;
  unsigned units;  // of one period: all channels
  bool float_bias;
};

// Unit `unit` of the bias: N channels.
template <class T, int N>
MOVQ_DEVICE Vec<float, N> read_bias(const void* bias, bool is_float, unsigned unit) {
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

template <class T, int V, bool Last>
__global__ void __launch_bounds__(kThreads, 4) add(Run run, T* x, const void* bias, const T* residual) {
  constexpr int kAhead = 2;  // loads in flight, of x and of residual each
  const int64_t begin = int64_t(blockIdx.x) * run.span;
  const int left = int(min(int64_t(run.span), run.accesses - begin));
  const unsigned first_unit = unsigned(begin / run.unit_accesses % run.units), into_unit = unsigned(begin % run.unit_accesses);
  x += begin * V;
  residual += residual ? begin * V : 0;  // from here on 32-bit offsets; with 64 bits nvcc 13.0 splits the wide stores

  constexpr int kChannels = Last ? V : 1;
  Vec<float, kChannels> held = {};
  unsigned held_unit = run.units;  // none
  for (int first = threadIdx.x; first < left; first += kAhead * kThreads) {
    Vec<T, V> value[kAhead], other[kAhead] = {};
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = first + u * kThreads;
      if (at < left) value[u] = load_vec<V>(x + at * V);
      if (at < left && residual) other[u] = load_vec<V, Cache::kStream>(residual + at * V);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = first + u * kThreads;
      if (at >= left) break;
      if (bias) {
        const unsigned unit = (first_unit + (into_unit + at) / run.unit_accesses) % run.units;
        if (unit != held_unit) {
          held = read_bias<T, kChannels>(bias, run.float_bias, unit);
          held_unit = unit;
        }
      }
      Vec<float, V> sum;
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] = to_float(value[u][i]) + held[Last ? i : 0] + to_float(other[u][i]);
      store_vec(x + at * V, from_float<T>(sum));
    }
  }
}

// Elements in one access: 16 bytes of them, or 1.
int access(const EpilogueProblem& p, const Epilogue& a) {
  const int lanes = 16 / bytes(p.dtype);
  const bool aligned = is_aligned(a.x, 16) && is_aligned(a.residual, 16) && (!p.channels_last || is_aligned(a.bias, 16));
  return aligned && (p.channels_last ? p.channels : p.pixels) % lanes == 0 ? lanes : 1;
}

template <class T, int V, bool Last>
void start(const EpilogueProblem& p, const Epilogue& a, cudaStream_t stream) {
  Run run = {};
  run.accesses = p.batch * p.channels * p.pixels / V;
  const int64_t rounds = ceil_div<int64_t>(run.accesses, kThreads);
  run.span = kThreads * int(std::clamp<int64_t>(rounds / kBlocksWanted, 1, kMostRounds));
  run.unit_accesses = Last ? 1 : unsigned(p.pixels / V);
  run.units = unsigned(Last ? p.channels / V : p.channels);
  run.float_bias = p.bias_dtype == DType::float32;
  const unsigned blocks = grid("epilogue add", ceil_div<int64_t>(run.accesses, run.span));
  launch(add<T, V, Last>, "epilogue add", {blocks, kThreads}, stream, run, static_cast<T*>(a.x), a.bias,
         static_cast<const T*>(a.residual));
}

}  // namespace
}  // namespace epilogue

void add_bias_residual(const EpilogueProblem& p, const Epilogue& a, cudaStream_t stream) {
  const bool wide = epilogue::access(p, a) > 1;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = 16 / sizeof(T);
    if (p.channels_last) wide ? epilogue::start<T, V, true>(p, a, stream) : epilogue::start<T, 1, true>(p, a, stream);
    else wide ? epilogue::start<T, V, false>(p, a, stream) : epilogue::start<T, 1, false>(p, a, stream);
  });
}

}  // namespace movq
