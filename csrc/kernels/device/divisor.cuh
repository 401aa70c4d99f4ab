// Division by a number that the host knows: a multiplication and shifts in place of some 20 instructions.
#pragma once

#include "common.cuh"

namespace movq {

// Granlund and Montgomery, "Division by invariant integers using multiplication" (1994), figure 4.1.
struct Divisor {
  int value = 1;
  uint32_t multiplier = 1;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(int divisor) : value(divisor) {
    while ((int64_t(1) << shift) < divisor) ++shift;
    multiplier = uint32_t((((int64_t(1) << shift) - divisor) << 32) / divisor + 1);
  }
};

// `dividend` is not negative.
MOVQ_HOST_DEVICE int operator/(int dividend, const Divisor& divisor) {
  const uint32_t high = uint32_t(uint64_t(uint32_t(dividend)) * divisor.multiplier >> 32);
  return int((high + uint32_t(dividend)) >> divisor.shift);
}

}  // namespace movq
