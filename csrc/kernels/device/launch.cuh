// The one way to launch a kernel. Errors are exceptions that carry the kernel's name.
#pragma once

#include <stdexcept>
#include <string>

#include "common.cuh"

namespace movq {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
};

// `blocks` as the size of a one-dimensional grid.
inline unsigned grid_size(const char* kernel, int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(kernel) + ": expected a grid of at most 2^31 - 1 blocks, got " + std::to_string(blocks));
  }
  return unsigned(blocks);
}

#ifdef MOVQ_EMULATOR

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const char* name, const LaunchConfig& config, cudaStream_t, Args&&... args) {
  emu::launch(name, {config.grid, config.block, config.shared_bytes}, [&] { kernel(args...); });
}

template <class... Params>
int resident_blocks(void (*)(Params...), const char*, int threads, size_t shared_bytes) {
  return emu::resident_blocks(threads, shared_bytes);
}

inline int shared_memory_limit() { return emu::shared_memory_limit(); }

#else

inline void check(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear it: the next caller would see it as its own
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// A kernel must opt in to more than 48 KB of dynamic shared memory, once per device.
template <class... Params>
void allow_shared_memory(void (*kernel)(Params...), const char* name, size_t bytes) {
  if (bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
  }
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const char* name, const LaunchConfig& config, cudaStream_t stream, Args&&... args) {
  allow_shared_memory(kernel, name, config.shared_bytes);
  cudaLaunchConfig_t cuda_config = {};
  cuda_config.gridDim = config.grid;
  cuda_config.blockDim = config.block;
  cuda_config.dynamicSmemBytes = config.shared_bytes;
  cuda_config.stream = stream;
  check(cudaLaunchKernelEx(&cuda_config, kernel, static_cast<Params>(args)...), name);
}

inline int device_attribute(cudaDeviceAttr attribute, const char* name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&value, attribute, device), name);
  return value;
}

// Bytes of shared memory that a block can have.
inline int shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared_memory_limit"); }

// The number of this kernel's blocks that run on the device at the same time.
template <class... Params>
int resident_blocks(void (*kernel)(Params...), const char* name, int threads, size_t shared_bytes) {
  allow_shared_memory(kernel, name, shared_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), name);
  return blocks * device_attribute(cudaDevAttrMultiProcessorCount, name);
}

#endif

}  // namespace movq
