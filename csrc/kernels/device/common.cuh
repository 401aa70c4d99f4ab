// What every device header starts from. Kernels are compiled twice: by nvcc for the GPU, and by the host compiler for the
// emulator in tests/emulator (MOVQ_EMULATOR), whose own <cuda_runtime.h> stands in for CUDA's.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#define MOVQ_DEVICE __device__ __forceinline__
#define MOVQ_HOST_DEVICE __host__ __device__ __forceinline__

namespace movq {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

MOVQ_DEVICE int lane_id() { return threadIdx.x % kWarp; }
MOVQ_DEVICE int warp_id() { return threadIdx.x / kWarp; }  // blocks are one-dimensional wherever warps matter

template <class I>
MOVQ_HOST_DEVICE constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

MOVQ_HOST_DEVICE bool is_aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// N values that move as one. Up to 16 bytes they are one memory instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];
  MOVQ_HOST_DEVICE T& operator[](int i) { return data[i]; }
  MOVQ_HOST_DEVICE const T& operator[](int i) const { return data[i]; }
};

}  // namespace movq
