// A block barrier whose result is passed on, so that a signature shows which functions rely on one.
#pragma once

#include "common.cuh"

namespace movq {

// Evidence of a block barrier. A function that takes one may read shared memory that other threads wrote before the barrier, and
// may overwrite what they read before it. Empty: it costs no instruction.
class [[nodiscard]] Synced {
#ifdef MOVQ_EMULATOR
  friend Synced block_barrier(int line);
#else
  friend MOVQ_DEVICE Synced block_barrier();
#endif
  MOVQ_DEVICE Synced() {}
};

#ifdef MOVQ_EMULATOR
inline Synced block_barrier(int line = __builtin_LINE()) {  // the caller's line: the emulator tells barriers apart by it
  __syncthreads(line);
  return {};
}
#else
MOVQ_DEVICE Synced block_barrier() {
  __syncthreads();
  return {};
}
#endif

}  // namespace movq
