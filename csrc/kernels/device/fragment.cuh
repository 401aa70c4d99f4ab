// Operands of a warp's tensor-core products in 32 bytes of k at a time, whatever the type: 16 values of 16 bits, or 8 floats.
// Floats are multiplied as three tf32 products (3xTF32: the high parts, and each high part with the other's rest), which leaves
// out no more than 2^-21 of a product, and added up outside: as exact as float32 multiplication and addition. Infinity has no
// rest: it gives NaN.
#pragma once

#include "mma.cuh"

namespace movq {

// N registers: 4 hold an a of mma.cuh, 2 hold a b.
template <class T, int N>
struct Fragment {
  uint32_t bits[N];
  MOVQ_DEVICE explicit Fragment(const uint32_t* registers) {
#pragma unroll
    for (int i = 0; i < N; ++i) bits[i] = registers[i];
  }
};

template <int N>
struct Fragment<float, N> {
  uint32_t high[N], rest[N];
  MOVQ_DEVICE explicit Fragment(const uint32_t* registers) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float value = __uint_as_float(registers[i]);
      high[i] = to_tf32(value);
      rest[i] = to_tf32(value - __uint_as_float(high[i]));
    }
  }
};

template <class T>
MOVQ_DEVICE void multiply(float (&d)[4], const Fragment<T, 4>& a, const Fragment<T, 2>& b) {
  mma_m16n8k16<T>(d, a.bits, b.bits);
}

template <>
MOVQ_DEVICE void multiply<float>(float (&d)[4], const Fragment<float, 4>& a, const Fragment<float, 2>& b) {
  float products[4] = {};
  mma_m16n8k8_tf32(products, a.rest, b.high);
  mma_m16n8k8_tf32(products, a.high, b.rest);
  mma_m16n8k8_tf32(products, a.high, b.high);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += products[i];  // tensor cores truncate their sums: of hundreds that would show
}

}  // namespace movq
