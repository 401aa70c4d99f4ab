// Warpgroups: 4 consecutive warps that issue wgmma together, and what their cooperation needs (sm_90a).
#pragma once

#include "common.cuh"

namespace movq {

constexpr int kWarpgroupSize = 4 * kWarpSize;

// Taken from one lane, so that the compiler knows that a branch on it does not divide a warp.
MOVQ_DEVICE int warpgroup_id() { return __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroupSize, 0); }

// Changes the registers that each thread of this warpgroup may use; all its threads call. A block starts with as many as its
// launch bounds allow, returns some in one warpgroup and then takes them in another. `Registers` is a multiple of 8. The kernel
// needs __launch_bounds__(threads, 1): without it ptxas ignores setmaxnreg and only reports that in its output.
template <int Registers>
MOVQ_DEVICE void release_registers() {
#ifdef MOVQ_EMULATOR
  emu::set_max_registers(Registers, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

template <int Registers>
MOVQ_DEVICE void acquire_registers() {
#ifdef MOVQ_EMULATOR
  emu::set_max_registers(Registers, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

// The generic proxy is the path of ordinary loads and stores to shared memory; wgmma and TMA use the async proxy. Each thread
// calls this between its stores (and MBarrier::init) and the barrier after which wgmma or TMA uses what it stored.
MOVQ_DEVICE void fence_proxy_async() {
#ifdef MOVQ_EMULATOR
  emu::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A hardware barrier of `threads` threads, with an id from 1 to 15 (0 is __syncthreads). Some threads wait in sync(), the others
// only arrive().
class NamedBarrier {
 public:
  MOVQ_DEVICE constexpr NamedBarrier(int id, int threads) : id_(id), threads_(threads) {}

  MOVQ_DEVICE void arrive() const {
#ifdef MOVQ_EMULATOR
    emu::named_barrier(id_, threads_, false);
#else
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id_), "r"(threads_) : "memory");
#endif
  }

  MOVQ_DEVICE void sync() const {
#ifdef MOVQ_EMULATOR
    emu::named_barrier(id_, threads_, true);
#else
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id_), "r"(threads_) : "memory");
#endif
  }

 private:
  int id_, threads_;
};

}  // namespace movq
