// Replaces CUDA's header of this name: float16 storage and conversion.
#pragma once

#include "cuda_runtime.h"

struct __half { unsigned short bits; };
struct alignas(4) __half2 { __half x, y; };

// Rounds to nearest, ties to even.
inline __half __float2half_rn(float v) {
  unsigned u = __float_as_uint(v);
  const unsigned sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  unsigned r;
  if (u > 0x7f800000) return {0x7fff};  // CUDA's NaN
  if (u >= 0x477ff000) r = 0x7c00;      // 65520 and above: infinity
  else if (u < 0x38800000)
    r = __float_as_uint(__uint_as_float(u) + 0.5f) - 0x3f000000;  // subnormal: 0.5f has the same ulp, 2^-24
  else r = (u + 0xfff + (u >> 13 & 1) - 0x38000000) >> 13;
  return {static_cast<unsigned short>(sign | r)};
}

inline float __half2float(__half v) {
  const unsigned sign = (v.bits & 0x8000u) << 16, exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(mantissa * 0x1p-24f));
  return __uint_as_float(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13);
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
