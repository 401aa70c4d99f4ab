// Copies from global to shared memory that run while the thread goes on. The bytes are there for the thread that copied them
// after its wait, and for the others after the barrier that follows the wait.
#pragma once

#include "common.cuh"
#include "shared.cuh"

namespace movq {

// Copies N elements (4, 8 or 16 bytes, both sides aligned to that) to dst[i]; writes zeros, and reads nothing, where not `valid`.
template <int N, class T>
MOVQ_DEVICE void cp_async(const Shared<T>& dst, unsigned i, const T* src, bool valid = true) {
  constexpr int bytes = N * sizeof(T);
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async moves 4, 8 or 16 bytes");
#ifdef MOVQ_EMULATOR
  emu::cp_async(dst.address(i, N), src, bytes, valid);
#else
  const unsigned to = dst.address(i, N);
  const int size = valid ? bytes : 0;
  if (bytes == 16) {  // .cg: past L1, which nobody else would read
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(src), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(src), "n"(bytes), "r"(size) : "memory");
  }
#endif
}

// Ends this thread's current group of copies.
MOVQ_DEVICE void cp_async_commit() {
#ifdef MOVQ_EMULATOR
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's groups are still under way.
template <int Pending>
MOVQ_DEVICE void cp_async_wait() {
#ifdef MOVQ_EMULATOR
  emu::cp_async_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace movq
