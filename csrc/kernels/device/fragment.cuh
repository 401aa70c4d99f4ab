// Tensor-core products of one warp for any type, 32 bytes of k at a time: 16 values of 16 bits, or 8 floats.
//
// Floats use 3xTF32: each operand is split into its nearest tf32 (high) and the remainder (rest), and high * high, high * rest
// and rest * high are added. What is left out is below 2^-21 of a product, so the result is as accurate as float32 arithmetic.
// An infinite operand gives NaN, because its remainder is NaN.
#pragma once

#include "mma.cuh"

namespace movq {

// An operand in registers: 4 of them hold an `a` of mma.cuh, 2 hold a `b`.
template <class T, int Registers>
struct Fragment {
  uint32_t bits[Registers];
  MOVQ_DEVICE explicit Fragment(const uint32_t* registers) {
#pragma unroll
    for (int i = 0; i < Registers; ++i) bits[i] = registers[i];
  }
};

template <int Registers>
struct Fragment<float, Registers> {
  uint32_t high[Registers], rest[Registers];
  MOVQ_DEVICE explicit Fragment(const uint32_t* registers) {
#pragma unroll
    for (int i = 0; i < Registers; ++i) {
      const float value = __uint_as_float(registers[i]);
      high[i] = to_tf32(value);
      rest[i] = to_tf32(value - __uint_as_float(high[i]));
    }
  }
};

// d += a * b
template <class T>
MOVQ_DEVICE void multiply_add(float (&d)[4], const Fragment<T, 4>& a, const Fragment<T, 2>& b) {
  mma_m16n8k16<T>(d, a.bits, b.bits);
}

template <>
MOVQ_DEVICE void multiply_add<float>(float (&d)[4], const Fragment<float, 4>& a, const Fragment<float, 2>& b) {
  float products[4] = {};
  mma_m16n8k8_tf32(products, a.rest, b.high);
  mma_m16n8k8_tf32(products, a.high, b.rest);
  mma_m16n8k8_tf32(products, a.high, b.high);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    d[i] += products[i];  // not in the mma: tensor cores truncate, and hundreds of truncations would show
}

}  // namespace movq
