// Loads mma operands from shared memory: four 8x8 matrices of 16-bit elements, one register of each lane per matrix.
#pragma once

#include "shared.cuh"

namespace movq {

// Lane 8 m + r passes the position i of row r of matrix m: 16 bytes, aligned to 16. Of each matrix a lane receives the element at
// (lane / 4, 2 (lane % 4)) and its right neighbour; transposed, the one at (2 (lane % 4), lane / 4) and the one below it.
template <bool Transposed = false, class T>
MOVQ_DEVICE void ldmatrix_x4(uint32_t (&registers)[4], const Shared<T>& from, unsigned i) {
  const unsigned address = from.address(i, 16 / sizeof(T));
#ifdef MOVQ_EMULATOR
  emu::ldmatrix(registers, 4, Transposed, address);
#else
  if constexpr (!Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

}  // namespace movq
