// Folds the weights of a 3x3 convolution that follows nearest 2x upsampling, and the gradient of that fold.
//
// Along each axis, the three weights w become four sums: w0, w0 + w1, w1 + w2, w2. Sum s is tap 3 - s of the transposed
// convolution, or tap s / 2 of the windows' pixel (s + 1) % 2. A thread computes the sixteen sums of VecSize channels in float32
// and rounds each once.
//
// Bytes: 9 weights are read and 16 sums written per pair of channels, 50 bytes in 16-bit types: 13 MB for 512 channels, 4 us at
// 3.35 TB/s (H100 SXM data sheet). A thread executes about 650 instructions for 8 pairs, 0.7 us for 512 channels.
// The weight has out channels outermost, the transposed form innermost: a block exchanges a tile of 16 in channels and 128 bytes
// of out channels through 18 KB of shared memory. Global accesses have 16 bytes (one element where alignment or sizes rule that
// out) and fill whole sectors; in [out][in][3][3] two neighbouring loads share each sector, the second from L1.
// Registers: at most 128 (__launch_bounds__). A thread has 9 (backward: 16) loads of 16 bytes in flight, 18 (32) KB per block;
// 512 channels make 256 blocks, about two per multiprocessor of an H100, which needs about 20 KB in flight.
#include "upsampling.h"

#include <algorithm>
#include <type_traits>

#include "device/convert.cuh"
#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/shared.cuh"

namespace movq {
namespace upsampling {
namespace {

constexpr int kThreads = 128, kTaps = 9;

struct Channels { int out, in; };

// The 3x3 weights of one out channel and VecSize in channels from `in` on, as vectors over the in channels. In [in][3][3] the
// nine accesses are one run of memory, which the compiler sorts into the taps.
template <class T, int VecSize, bool ChannelsLast>
MOVQ_DEVICE void load_taps(const T* weight, const Channels& channels, int out, int in, Vec<T, VecSize> (&taps)[kTaps]) {
  weight += int64_t(out) * kTaps * channels.in + (ChannelsLast ? in : in * kTaps);
  Vec<T, VecSize> accesses[kTaps];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) accesses[i] = load_vec<VecSize>(weight + i * (ChannelsLast ? channels.in : VecSize));
#pragma unroll
  for (int i = 0; i < kTaps * VecSize; ++i) {
    const int tap = ChannelsLast ? i / VecSize : i % kTaps, channel = ChannelsLast ? i % VecSize : i / kTaps;
    taps[tap][channel] = accesses[i / VecSize][i % VecSize];
  }
}

template <class T, int VecSize, bool ChannelsLast>
MOVQ_DEVICE void store_taps(T* weight, const Channels& channels, int out, int in, const Vec<T, VecSize> (&taps)[kTaps]) {
  weight += int64_t(out) * kTaps * channels.in + (ChannelsLast ? in : in * kTaps);
  Vec<T, VecSize> accesses[kTaps];
#pragma unroll
  for (int i = 0; i < kTaps * VecSize; ++i) {
    const int tap = ChannelsLast ? i / VecSize : i % kTaps, channel = ChannelsLast ? i % VecSize : i / kTaps;
    accesses[i / VecSize][i % VecSize] = taps[tap][channel];
  }
#pragma unroll
  for (int i = 0; i < kTaps; ++i) store_vec(weight + int64_t(i) * (ChannelsLast ? channels.in : VecSize), accesses[i]);
}

// Calls store(row, column, sums) for each of the 4x4 sums.
template <class T, int VecSize, class Store>
MOVQ_DEVICE void fold(const Vec<T, VecSize> (&taps)[kTaps], Store&& store) {
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    Vec<float, VecSize> rows[3];  // sum `row` of each column
#pragma unroll
    for (int column = 0; column < 3; ++column) {
#pragma unroll
      for (int i = 0; i < VecSize; ++i) {
        const float first = to_float(taps[(row == 0 ? 0 : row - 1) * 3 + column][i]);
        rows[column][i] = row == 0 || row == 3 ? first : first + to_float(taps[row * 3 + column][i]);
      }
    }
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      Vec<float, VecSize> sums;
#pragma unroll
      for (int i = 0; i < VecSize; ++i) {
        sums[i] = column == 0 ? rows[0][i] : column == 3 ? rows[2][i] : rows[column - 1][i] + rows[column][i];
      }
      store(row, column, from_float<T>(sums));
    }
  }
}

// A block's taps while they are exchanged between threads that hold in channels and threads that hold out channels: rows are
// in channels. The 16-byte chunks of a row are permuted, so that both sides access shared memory without bank conflicts.
template <class T, int VecSize>
struct ExchangedTile {
  static constexpr int kIn = 16, kChunks = 8, kOut = kChunks * VecSize;
  static_assert(kIn * kOut == kThreads * VecSize, "one access per thread and tap, on both sides");
  static constexpr unsigned kElements = kTaps * kIn * kOut, kBytes = kElements * sizeof(T);

  MOVQ_DEVICE ExchangedTile() : elements(0, kElements), accesses(0, kElements / VecSize) {}
  MOVQ_DEVICE static unsigned index(int tap, int in, int out) {
    const int chunk = (out / VecSize ^ 2 * (in / VecSize)) % kChunks;
    return ((tap * kIn + in) * kChunks + chunk) * VecSize + out % VecSize;
  }

  Shared<T> elements;
  Shared<Vec<T, VecSize>> accesses;  // the same memory
};

template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 4) fold_to_transposed(const T* weight, Channels channels, int in_tiles, T* folded) {
  using Tile = ExchangedTile<T, VecSize>;
  const Tile tile;
  const int first_in = int(blockIdx.x) % in_tiles * Tile::kIn, first_out = int(blockIdx.x) / in_tiles * Tile::kOut;
  Vec<T, VecSize> taps[kTaps];
  {
    constexpr int kInAccesses = Tile::kIn / VecSize;
    const int out = threadIdx.x / kInAccesses, in = threadIdx.x % kInAccesses * VecSize;
    if (first_out + out < channels.out && first_in + in < channels.in) {
      load_taps<T, VecSize, ChannelsLast>(weight, channels, first_out + out, first_in + in, taps);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
        for (int i = 0; i < VecSize; ++i) tile.elements.store(Tile::index(tap, in + i, out), taps[tap][i]);
      }
    }
  }
  __syncthreads();
  const int in = threadIdx.x / Tile::kChunks, out = threadIdx.x % Tile::kChunks * VecSize;
  if (first_out + out >= channels.out || first_in + in >= channels.in) return;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) taps[tap] = tile.accesses.load(Tile::index(tap, in, out) / VecSize);
  folded += int64_t(first_in + in) * 16 * channels.out + first_out + out;
  fold(taps, [&](int row, int column, const Vec<T, VecSize>& sums) {
    // In 64 bits: nvcc 13.0 splits stores at 32-bit multiples of a stride into four.
    store_vec(folded + int64_t((3 - row) * 4 + 3 - column) * channels.out, sums);
  });
}

template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 4) fold_to_windows(const T* weight, Channels channels, T* folded) {
  const unsigned in_accesses = unsigned(channels.in) / VecSize, access = blockIdx.x * kThreads + threadIdx.x;
  const int out = access / in_accesses, in = access % in_accesses * VecSize;
  if (out >= channels.out) return;
  Vec<T, VecSize> taps[kTaps];
  load_taps<T, VecSize, ChannelsLast>(weight, channels, out, in, taps);
  fold(taps, [&](int row, int column, const Vec<T, VecSize>& sums) {
    const int pixel = (row + 1) % 2 * 2 + (column + 1) % 2, tap = row / 2 * 2 + column / 2;
    store_vec(folded + ((int64_t(pixel) * channels.out + out) * 4 + tap) * channels.in + in, sums);
  });
}

// dw0 = ds0 + ds1, dw1 = ds1 + ds2, dw2 = ds2 + ds3 along both axes, for the gradients ds of the four sums.
template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 4) unfold_transposed(const T* dfolded, Channels channels, int in_tiles, T* dweight) {
  using Tile = ExchangedTile<T, VecSize>;
  const Tile tile;
  const int first_in = int(blockIdx.x) % in_tiles * Tile::kIn, first_out = int(blockIdx.x) / in_tiles * Tile::kOut;
  {
    const int in = threadIdx.x / Tile::kChunks, out = threadIdx.x % Tile::kChunks * VecSize;
    if (first_out + out < channels.out && first_in + in < channels.in) {
      dfolded += int64_t(first_in + in) * 16 * channels.out + first_out + out;
      Vec<T, VecSize> dsums[16];
#pragma unroll
      for (int tap = 0; tap < 16; ++tap) dsums[tap] = load_vec<VecSize, Cache::kStream>(dfolded + tap * channels.out);
      auto dsum = [&](int row, int column, int i) { return to_float(dsums[15 - row * 4 - column][i]); };
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int row = tap / 3, column = tap % 3;
        Vec<float, VecSize> sums;
#pragma unroll
        for (int i = 0; i < VecSize; ++i) {
          sums[i] = (dsum(row, column, i) + dsum(row, column + 1, i)) + (dsum(row + 1, column, i) + dsum(row + 1, column + 1, i));
        }
        tile.accesses.store(Tile::index(tap, in, out) / VecSize, from_float<T>(sums));
      }
    }
  }
  __syncthreads();
  constexpr int kInAccesses = Tile::kIn / VecSize;
  const int out = threadIdx.x / kInAccesses, in = threadIdx.x % kInAccesses * VecSize;
  if (first_out + out >= channels.out || first_in + in >= channels.in) return;
  Vec<T, VecSize> taps[kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int i = 0; i < VecSize; ++i) taps[tap][i] = tile.elements.load(Tile::index(tap, in + i, out));
  }
  store_taps<T, VecSize, ChannelsLast>(dweight, channels, first_out + out, first_in + in, taps);
}

// Calls function(Type<T>, integral_constant<int, VecSize>, bool_constant<ChannelsLast>).
template <class Function>
void dispatch(const FoldProblem& problem, const void* weight, const void* folded, Function&& function) {
  const int wide = 16 / bytes(problem.dtype);
  const bool whole = problem.out_channels % wide == 0 && problem.in_channels % wide == 0;
  const bool use_wide = whole && is_aligned(weight, 16) && is_aligned(folded, 16);
  with_type(problem.dtype, [&](auto type) {
    constexpr int kWide = 16 / sizeof(typename decltype(type)::type);
    auto with_vec_size = [&](auto vec_size) {
      problem.channels_last ? function(type, vec_size, std::true_type()) : function(type, vec_size, std::false_type());
    };
    use_wide ? with_vec_size(std::integral_constant<int, kWide>()) : with_vec_size(std::integral_constant<int, 1>());
  });
}

}  // namespace
}  // namespace upsampling

void fold_upsampling(const FoldProblem& problem, const void* weight, void* folded, cudaStream_t stream) {
  using namespace upsampling;
  const Channels channels = {int(problem.out_channels), int(problem.in_channels)};
  dispatch(problem, weight, folded, [&](auto type, auto vec_size, auto channels_last) {
    using T = typename decltype(type)::type;
    constexpr int VecSize = decltype(vec_size)::value;
    constexpr bool ChannelsLast = decltype(channels_last)::value;
    const auto* from = static_cast<const T*>(weight);
    auto* to = static_cast<T*>(folded);
    if (problem.windows) {
      const int64_t accesses = problem.out_channels * (problem.in_channels / VecSize);
      const unsigned blocks = grid_size("fold_to_windows", ceil_div<int64_t>(accesses, kThreads));
      launch(fold_to_windows<T, VecSize, ChannelsLast>, "fold_to_windows", {blocks, kThreads}, stream, from, channels, to);
    } else {
      using Tile = ExchangedTile<T, VecSize>;
      const int in_tiles = ceil_div(channels.in, Tile::kIn);
      const unsigned blocks = grid_size("fold_to_transposed", int64_t(in_tiles) * ceil_div(channels.out, Tile::kOut));
      launch(fold_to_transposed<T, VecSize, ChannelsLast>, "fold_to_transposed", {blocks, kThreads, Tile::kBytes}, stream, from,
             channels, in_tiles, to);
    }
  });
}

void fold_upsampling_backward(const FoldProblem& problem, const void* dfolded, void* dweight, cudaStream_t stream) {
  using namespace upsampling;
  const Channels channels = {int(problem.out_channels), int(problem.in_channels)};
  dispatch(problem, dweight, dfolded, [&](auto type, auto vec_size, auto channels_last) {
    using T = typename decltype(type)::type;
    constexpr int VecSize = decltype(vec_size)::value;
    using Tile = ExchangedTile<T, VecSize>;
    const int in_tiles = ceil_div(channels.in, Tile::kIn);
    const unsigned blocks = grid_size("unfold_transposed", int64_t(in_tiles) * ceil_div(channels.out, Tile::kOut));
    launch(unfold_transposed<T, VecSize, decltype(channels_last)::value>, "unfold_transposed", {blocks, kThreads, Tile::kBytes},
           stream, static_cast<const T*>(dfolded), channels, in_tiles, static_cast<T*>(dweight));
  });
}

}  // namespace movq
