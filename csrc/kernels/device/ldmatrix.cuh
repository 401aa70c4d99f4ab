// Loads mma operands: `Count` 8x8 matrices of 16-bit elements from shared memory into one register each. Lane 8 m + r names row r
// of matrix m: eight elements from s[i] on, aligned to 16 bytes. A lane gets the elements (lane / 4, 2 (lane % 4)) and the
// one to its right; transposed, (2 (lane % 4), lane / 4) and the one below it.
#pragma once

#include "shared.cuh"

namespace movq {

template <bool Transposed = false, int Count, class T>
MOVQ_DEVICE void ldmatrix(uint32_t (&r)[Count], const Shared<T>& s, unsigned i) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  static_assert(Count == 1 || Count == 2 || Count == 4, "one, two or four matrices");
#ifdef MOVQ_EMULATOR
  const bool names_a_row = threadIdx.x % kWarp < 8 * Count;  // what the other lanes pass is not used
  emu::ldmatrix(r, Count, Transposed, names_a_row ? s.address(i, 8) : 0);
#else
  const unsigned from = s.address(i, 8);
  if constexpr (Count == 1 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  } else if constexpr (Count == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  } else if constexpr (Count == 2 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  } else if constexpr (Count == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  } else if constexpr (!Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

}  // namespace movq
