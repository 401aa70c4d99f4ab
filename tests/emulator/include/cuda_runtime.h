// Replaces CUDA's header of this name when the host compiler compiles kernels. It has what kernels and the emulator's tests use.
// `__shared__` is missing on purpose: csrc/kernels/device/shared.cuh says why.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (::emu::builtins->thread)
#define blockIdx (::emu::builtins->block)
#define blockDim (::emu::builtins->block_size)
#define gridDim (::emu::builtins->grid_size)

using cudaStream_t = struct CUstream_st*;

// Barriers
inline void __syncthreads(int line = __builtin_LINE()) { emu::block_sync(line); }
inline int __syncthreads_or(int p, int line = __builtin_LINE()) { return emu::block_vote(emu::Vote::kOr, p, line); }
inline int __syncthreads_and(int p, int line = __builtin_LINE()) { return emu::block_vote(emu::Vote::kAnd, p, line); }
inline int __syncthreads_count(int p, int line = __builtin_LINE()) { return emu::block_vote(emu::Vote::kCount, p, line); }
inline void __syncwarp(unsigned mask = ~0u) { emu::warp_sync(mask); }
inline void __threadfence() {}  // emulated memory is sequentially consistent

// Shuffles and votes
namespace emu {
template <class T>
T shuffled(unsigned mask, Shuffle mode, T v, int argument, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  shuffle(mask, mode, &v, sizeof(T), argument, width);
  return v;
}
}  // namespace emu
template <class T> T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  return emu::shuffled(mask, emu::Shuffle::kIndex, v, lane, width);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return emu::shuffled(mask, emu::Shuffle::kUp, v, delta, width);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return emu::shuffled(mask, emu::Shuffle::kDown, v, delta, width);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  return emu::shuffled(mask, emu::Shuffle::kXor, v, lanes, width);
}
inline unsigned __ballot_sync(unsigned mask, int p) { return emu::ballot(mask, p); }
inline int __any_sync(unsigned mask, int p) { return emu::ballot(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return emu::ballot(mask, !p) == 0; }

// Bits
template <class To, class From> inline To bit_copy(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
inline unsigned __float_as_uint(float v) { return bit_copy<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return bit_copy<float>(v); }

// Arithmetic
inline float min(float a, float b) { return std::fmin(a, b); }  // of a number and a NaN, the number
inline float max(float a, float b) { return std::fmax(a, b); }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
  static_assert(std::is_integral<A>::value && std::is_integral<B>::value, "integers");
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
  static_assert(std::is_integral<A>::value && std::is_integral<B>::value, "integers");
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmul_rz(float a, float b) {
  const double exact = double(a) * b;
  const float nearest = float(exact);
  return std::fabs(double(nearest)) > std::fabs(exact) ? std::nextafterf(nearest, 0.0f) : nearest;
}
