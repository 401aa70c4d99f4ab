// Tensor-core products of one warp: d += a * b, accumulated in float with truncation.
//
// Where each lane's values lie in the matrices (PTX ISA, "Matrix Fragments for mma"), with row = lane / 4 and pair = lane % 4:
//   d (16 x 8):           d[0], d[1] at (row, 2 pair), (row, 2 pair + 1); d[2], d[3] eight rows below
//   a (16 x 16, 16 bit):  a[0] at (row, 2 pair) and the next column; a[1] eight rows below; a[2], a[3] eight columns to the right
//   b (16 x 8, 16 bit):   b[0] at (2 pair, row) and the next row; b[1] eight rows below
//   a (16 x 8, tf32):     a[0] at (row, pair); a[1] eight rows below; a[2], a[3] four columns to the right
//   b (8 x 8, tf32):      b[0] at (pair, row); b[1] four rows below
#pragma once

#include <type_traits>

#include "convert.cuh"

namespace movq {

// T is __half or __nv_bfloat16.
template <class T>
MOVQ_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef MOVQ_EMULATOR
  emu::mma_m16n8k16(d, a, b, std::is_same<T, __half>::value);
#else
  if constexpr (std::is_same<T, __half>::value) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same<T, __nv_bfloat16>::value, "float16 or bfloat16");
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// The operands come from to_tf32().
MOVQ_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef MOVQ_EMULATOR
  emu::mma_m16n8k8_tf32(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace movq
