// The bias of a thread's channels.
#pragma once

#include "device/convert.cuh"
#include "device/memory.cuh"

namespace movq {

// N adjacent values in float32 or in T, in accesses of up to 16 bytes; zeros for null. Waits for its loads: issue those of the
// map first.
template <class T, int N>
MOVQ_DEVICE Vec<float, N> load_bias(const void* bias, bool is_float, int64_t channel) {
  Vec<float, N> values = {};
  if (!bias) return values;
  if (!is_float) return to_float(load_vec<N>(static_cast<const T*>(bias) + channel));
  constexpr int kFloats = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kFloats) {
    const auto part = load_vec<kFloats>(static_cast<const float*>(bias) + channel + i);
#pragma unroll
    for (int k = 0; k < kFloats; ++k) values[i + k] = part[k];
  }
  return values;
}

}  // namespace movq
