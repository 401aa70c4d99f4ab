// The one way to start a kernel. Errors are exceptions that carry the kernel's name.
#pragma once

#include <stdexcept>
#include <string>

#include "common.cuh"

namespace movq {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;      // blocks (along x) that share a cluster: sm_90 and up
  bool cooperative = false;  // all blocks resident at once, as grid_sync() needs
};

// A grid of this many blocks along x.
inline unsigned grid(const char* kernel, int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(kernel) + ": " + std::to_string(blocks) + " blocks exceed CUDA's limit of 2^31 - 1");
  }
  return unsigned(blocks);
}

#ifdef MOVQ_EMULATOR

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const char* name, const Launch& how, cudaStream_t, Args&&... args) {
  emu::launch(name, {how.grid, how.block, how.shared_bytes, how.cluster, how.cooperative}, [&] { kernel(args...); });
}

template <class... Params>
int resident_blocks(void (*)(Params...), const char*, int threads, size_t shared_bytes) {
  return emu::resident_blocks(threads, shared_bytes);
}

inline int multiprocessors() { return emu::multiprocessors(); }
inline int shared_memory_limit() { return emu::shared_memory_limit(); }

#else

inline void check(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // ours to report: do not leave it for the next caller to find
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// Above 48 KB a kernel must ask for its dynamic shared memory, once per device.
template <class... Params>
void allow_shared_memory(void (*kernel)(Params...), const char* name, size_t bytes) {
  if (bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
  }
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const char* name, const Launch& how, cudaStream_t stream, Args&&... args) {
  allow_shared_memory(kernel, name, how.shared_bytes);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (how.cluster > 1) {
    if (how.cluster > 8) {  // 8 is what every device with clusters can run
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
    }
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {how.cluster, 1, 1};
  }
  if (how.cooperative) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}

inline int device_attribute(cudaDeviceAttr attribute, const char* name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&value, attribute, device), name);
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, "multiprocessors"); }

// Bytes of shared memory that a block can ask for.
inline int shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared_memory_limit"); }

// How many blocks of this kernel the whole device holds at once: the largest cooperative grid.
template <class... Params>
int resident_blocks(void (*kernel)(Params...), const char* name, int threads, size_t shared_bytes) {
  allow_shared_memory(kernel, name, shared_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), name);
  return blocks * multiprocessors();
}

#endif

}  // namespace movq
