// Included by every device header. Kernels compile twice: with nvcc for the GPU, and with the host compiler for the emulator in
// tests/emulator (MOVQ_EMULATOR), which has its own <cuda_runtime.h>.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#define MOVQ_DEVICE __device__ __forceinline__
#define MOVQ_HOST_DEVICE __host__ __device__ __forceinline__

// Defined where wgmma and setmaxnreg exist. Elsewhere kernels that use them consist of __trap().
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MOVQ_EMULATOR)
#define MOVQ_SM90A
#endif

namespace movq {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks that use warps are one-dimensional.
MOVQ_DEVICE int lane_id() { return threadIdx.x % kWarpSize; }
MOVQ_DEVICE int warp_id() { return threadIdx.x / kWarpSize; }

template <class Integer>
MOVQ_HOST_DEVICE constexpr Integer ceil_div(Integer dividend, Integer divisor) {
  return (dividend + divisor - 1) / divisor;
}

template <class Integer>
MOVQ_HOST_DEVICE constexpr Integer round_up(Integer value, Integer multiple) {
  return ceil_div(value, multiple) * multiple;
}

MOVQ_HOST_DEVICE bool is_aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// N values that are loaded and stored together: one memory instruction up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];
  MOVQ_HOST_DEVICE T& operator[](int i) { return data[i]; }
  MOVQ_HOST_DEVICE const T& operator[](int i) const { return data[i]; }
};

}  // namespace movq
