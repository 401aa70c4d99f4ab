// Asynchronous copies from global to shared memory. A thread sees the bytes it copied after its own wait; other threads see them
// after a barrier that follows that wait.
#pragma once

#include "common.cuh"
#include "shared.cuh"

namespace movq {

// Copies 16 bytes to element i of `to`; both sides must be aligned to 16. If not `valid`, writes zeros and reads nothing.
template <class T>
MOVQ_DEVICE void cp_async_16(const Shared<T>& to, unsigned i, const void* from, bool valid) {
  const unsigned address = to.address(i, 16 / sizeof(T));
#ifdef MOVQ_EMULATOR
  emu::cp_async(address, from, 16, valid);
#else
  const int bytes_read = valid ? 16 : 0;
  // .cg bypasses L1: no other thread of the multiprocessor reads these bytes.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes_read) : "memory");
#endif
}

// Closes this thread's current group of copies.
MOVQ_DEVICE void cp_async_commit() {
#ifdef MOVQ_EMULATOR
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's groups are in flight.
template <int Pending>
MOVQ_DEVICE void cp_async_wait() {
#ifdef MOVQ_EMULATOR
  emu::cp_async_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace movq
