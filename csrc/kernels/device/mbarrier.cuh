// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies (PTX ISA, "mbarrier").
//
// A barrier runs through phases. A phase completes when its arrivals have come and its expected bytes have been copied; the next
// phase then starts with the same number of arrivals. A thread waits for the phase of a parity: 0 for the first phase, 1 for the
// second, 0 for the third. On a new barrier, waiting for parity 1 returns at once. So a ring of stages needs no special case for
// its first round: consumers wait for parity 0 and the producer for parity 1.
#pragma once

#include "shared.cuh"

namespace movq {

class MBarrier {
 public:
  // Barrier i of an array in shared memory.
  MOVQ_DEVICE MBarrier(const Shared<uint64_t>& barriers, unsigned i) : address_(barriers.address(i, 1)) {}

  // Called by one thread. fence_proxy_async() and a block barrier must follow before any other use.
  MOVQ_DEVICE void init(unsigned arrivals) const {
#ifdef MOVQ_EMULATOR
    emu::mbarrier_init(address_, arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_), "r"(arrivals) : "memory");
#endif
  }

  // Releases what this thread did before to the threads that wait for this phase.
  MOVQ_DEVICE void arrive() const {
#ifdef MOVQ_EMULATOR
    emu::mbarrier_arrive(address_, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_) : "memory");
#endif
  }

  // Arrives, and adds `bytes` to the bytes of copies that complete this phase.
  MOVQ_DEVICE void arrive_expecting(unsigned bytes) const {
#ifdef MOVQ_EMULATOR
    emu::mbarrier_arrive(address_, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_), "r"(bytes) : "memory");
#endif
  }

  MOVQ_DEVICE void wait(unsigned parity) const {
#ifdef MOVQ_EMULATOR
    emu::mbarrier_wait(address_, parity);
#else
    while (!try_wait(parity)) {
    }
#endif
  }

  MOVQ_DEVICE unsigned address() const { return address_; }

 private:
#ifndef MOVQ_EMULATOR
  // Sleeps until the phase completes, or for a time that the system limits.
  MOVQ_DEVICE bool try_wait(unsigned parity) const {
    unsigned complete;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(complete)
        : "r"(address_), "r"(parity)
        : "memory");
    return complete;
  }
#endif

  unsigned address_;
};

}  // namespace movq
