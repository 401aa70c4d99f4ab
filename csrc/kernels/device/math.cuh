// Fast approximations that have no function in CUDA C++.
#pragma once

#include "common.cuh"

namespace movq {

// 2^x to within 2 ulp; 0 for -inf.
MOVQ_DEVICE float fast_exp2(float x) {
#ifdef MOVQ_EMULATOR
  return exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// 1 / x to within 1 ulp; 0 for a result below 2^-126, and infinite for such an x.
MOVQ_DEVICE float fast_reciprocal(float x) {
#ifdef MOVQ_EMULATOR
  return 1 / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

}  // namespace movq
