// Conversions between float, the type of all arithmetic, and the types that memory and tensor cores hold.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.cuh"

namespace movq {

MOVQ_DEVICE float to_float(float value) { return value; }
MOVQ_DEVICE float to_float(__half value) { return __half2float(value); }
MOVQ_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest, ties to even.
template <class T> MOVQ_DEVICE T from_float(float value);
template <> MOVQ_DEVICE float from_float<float>(float value) { return value; }
template <> MOVQ_DEVICE __half from_float<__half>(float value) { return __float2half_rn(value); }
template <> MOVQ_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

template <class T, int N>
MOVQ_DEVICE Vec<float, N> to_float(const Vec<T, N>& values) {
  Vec<float, N> results;
#pragma unroll
  for (int i = 0; i < N; ++i) results[i] = to_float(values[i]);
  return results;
}

template <class T, int N>
MOVQ_DEVICE Vec<T, N> from_float(const Vec<float, N>& values) {
  Vec<T, N> results;
#pragma unroll
  for (int i = 0; i < N; ++i) results[i] = from_float<T>(values[i]);
  return results;
}

// A bfloat16 is the upper half of a float: one instruction per value, where single ones take two.
template <int N>
MOVQ_DEVICE Vec<float, N> to_float(const Vec<__nv_bfloat16, N>& values) {
  if constexpr (N % 2) {
    return to_float<__nv_bfloat16, N>(values);
  } else {
    union {
      Vec<__nv_bfloat16, N> values;
      uint32_t pairs[N / 2];
    } bits = {values};
    Vec<float, N> results;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      results[i] = __uint_as_float(bits.pairs[i / 2] << 16);
      results[i + 1] = __uint_as_float(bits.pairs[i / 2] & 0xffff0000u);
    }
    return results;
  }
}

// Two 16-bit values in one register, as mma takes them: the first in the low half.
template <class T> MOVQ_DEVICE uint32_t pack(float low, float high);
template <> MOVQ_DEVICE uint32_t pack<__half>(float low, float high) {
  union {
    __half2 pair;
    uint32_t bits;
  } packed = {__floats2half2_rn(low, high)};
  return packed.bits;
}
template <> MOVQ_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  union {
    __nv_bfloat162 pair;
    uint32_t bits;
  } packed = {__floats2bfloat162_rn(low, high)};
  return packed.bits;
}

// The bits of the nearest tf32 (10 bits of mantissa), ties away from zero.
MOVQ_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
#ifdef MOVQ_EMULATOR
  bits = emu::to_tf32(value);
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
  return bits;
}

}  // namespace movq
