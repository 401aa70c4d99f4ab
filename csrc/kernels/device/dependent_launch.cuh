// Programmatic dependent launch (sm_90 and later; PTX ISA, "griddepcontrol"): launch_dependent() lets a kernel start while the
// one before it in the stream still runs, so that its launch and the work before the wait take no time of their own.
//
// Until wait_for_previous_kernel() a dependent kernel may only read tensors that no kernel of its chain writes, and it may not
// write at all: the kernel before it may still read or write there. Every thread must wait before it returns. Only then does the
// end of a kernel imply the end of all before it, which kernels later in the chain rely on.
#pragma once

#include "common.cuh"

namespace movq {

// Returns when the previous kernel has ended and its writes are visible; at once after an ordinary launch.
MOVQ_DEVICE void wait_for_previous_kernel() {
#if defined(MOVQ_EMULATOR)
  emu::wait_for_previous_kernel();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start once all blocks of this kernel have called this. They find room only beside running blocks,
// so calling it first delays nothing. Without it they start when this kernel's blocks end. The last kernel of a chain does not
// call it, because another library's kernel is next.
MOVQ_DEVICE void allow_next_kernel() {
#if !defined(MOVQ_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace movq
