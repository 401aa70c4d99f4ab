// Programmatic dependent launch (sm_90 and later; PTX ISA, "griddepcontrol"): launch_dependent() lets a kernel start while the
// one before it in the stream still runs, so that its launch and the work before the wait take no time of their own.
//
// Until wait_for_previous_kernel() a dependent kernel may only read tensors that no kernel of its chain writes, and it may not
// write at all: the kernel before it may still read or write there. Every thread must wait before it returns. Then, once a kernel
// has ended, all earlier kernels have ended too. Later kernels rely on this.
#pragma once

#include "common.cuh"

namespace movq {

// Returns when the previous kernel has ended and its writes are visible, or immediately after an ordinary launch.
MOVQ_DEVICE void wait_for_previous_kernel() {
#if defined(MOVQ_EMULATOR)
  emu::wait_for_previous_kernel();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the blocks of a dependent launch start once every block of this kernel has called this or ended. By then all blocks of
// this kernel have started, so an early call takes no room from them. Waiting blocks can take room from other streams; how much
// that costs is not yet measured on a GPU. The last kernel of a chain does not call it: the next kernel may not be ours.
MOVQ_DEVICE void allow_next_kernel() {
#if !defined(MOVQ_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace movq
