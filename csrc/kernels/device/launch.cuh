// The one way to launch a kernel. Errors are exceptions that carry the kernel's name.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "../bounded_cache.h"
#include "common.cuh"

namespace movq {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  bool dependent = false;  // see launch_dependent()
};

// `blocks` as the size of a one-dimensional grid.
inline unsigned grid_size(const char* kernel, int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(kernel) + ": expected a grid of at most 2^31 - 1 blocks, got " + std::to_string(blocks));
  }
  return unsigned(blocks);
}

#ifdef MOVQ_EMULATOR

inline int current_device(const char*) { return emu::device(); }
inline int multiprocessors(const char*) { return emu::multiprocessors(); }
inline int shared_memory_limit(const char*) { return emu::shared_memory_limit(); }

namespace detail {

inline bool can_launch_dependent(const void*, const char*) { return emu::can_launch_dependent(); }

inline void set_max_shared_memory(const void* kernel, const char*, int bytes) { emu::set_max_shared_memory(kernel, bytes); }

template <class... Params, class... Args>
void start(void (*kernel)(Params...), const char* name, const LaunchConfig& config, cudaStream_t, Args&&... args) {
  const auto* address = reinterpret_cast<const void*>(kernel);
  emu::launch(name, {config.grid, config.block, config.shared_bytes, 1, false, address, config.dependent},
              [&] { kernel(args...); });
}

template <class... Params>
int blocks_per_multiprocessor(void (*)(Params...), const char*, int threads, size_t shared_bytes) {
  return emu::blocks_per_multiprocessor(threads, shared_bytes);
}

}  // namespace detail

#else

inline void check(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear it: the next caller would see it as its own
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

inline int current_device(const char* name) {
  int device = 0;
  check(cudaGetDevice(&device), name);
  return device;
}

inline int device_attribute(cudaDeviceAttr attribute, const char* name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, current_device(name)), name);
  return value;
}

inline int multiprocessors(const char* name) { return device_attribute(cudaDevAttrMultiProcessorCount, name); }

// Bytes of shared memory that a block can have.
inline int shared_memory_limit(const char* name) { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, name); }

namespace detail {

inline void set_max_shared_memory(const void* kernel, const char* name, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
}

template <class... Params, class... Args>
void start(void (*kernel)(Params...), const char* name, const LaunchConfig& config, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t cuda_config = {};
  cuda_config.gridDim = config.grid;
  cuda_config.blockDim = config.block;
  cuda_config.dynamicSmemBytes = config.shared_bytes;
  cuda_config.stream = stream;
  if (config.dependent) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cuda_config.attrs = &attribute;
    cuda_config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&cuda_config, kernel, static_cast<Params>(args)...), name);
}

// Whether the code that the current device runs was compiled for sm_90 or later. A device may run code of an earlier target, in
// which wait_for_previous_kernel() does nothing.
inline bool is_compiled_for_sm90(const void* kernel, const char* name) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  return attributes.ptxVersion >= 90;
}

// Drivers for CUDA 12.2 and earlier cannot capture a dependent launch in a graph.
inline bool can_launch_dependent(const void* kernel, const char* name) {
  int driver = 0;
  check(cudaDriverGetVersion(&driver), name);
  return driver >= 12030 && is_compiled_for_sm90(kernel, name);
}

template <class... Params>
int blocks_per_multiprocessor(void (*kernel)(Params...), const char* name, int threads, size_t shared_bytes) {
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), name);
  return blocks;
}

}  // namespace detail

#endif

// A kernel must opt in to more than 48 KB of dynamic shared memory, once per device. It always opts in to the device's limit: a
// limit for this problem could be lowered by another thread's smaller problem before the launch.
template <class... Params>
void allow_shared_memory(void (*kernel)(Params...), const char* name, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  static auto& opted_in =
      *new BoundedCache<std::pair<const void*, int>, bool, 1024>;  // never destroyed: threads may outlive main()
  const auto* address = reinterpret_cast<const void*>(kernel);
  opted_in.get({address, current_device(name)}, [&] {
    detail::set_max_shared_memory(address, name, shared_memory_limit(name));
    return true;
  });
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const char* name, const LaunchConfig& config, cudaStream_t stream, Args&&... args) {
  allow_shared_memory(kernel, name, config.shared_bytes);
  detail::start(kernel, name, config, stream, std::forward<Args>(args)...);
}

// Launches a kernel that may start while the one before it on this stream still runs; see dependent_launch.cuh. For the second
// and later kernels of a chain: the first reads what other libraries' kernels write, and is launched with launch(). Code compiled
// for an earlier GPU gets an ordinary launch. CUDA graph capture records the dependence as a programmatic edge.
template <class... Params, class... Args>
void launch_dependent(void (*kernel)(Params...), const char* name, LaunchConfig config, cudaStream_t stream, Args&&... args) {
  static auto& answers = *new BoundedCache<std::pair<const void*, int>, bool, 1024>;  // never destroyed, like opted_in
  const auto* address = reinterpret_cast<const void*>(kernel);
  config.dependent = answers.get({address, current_device(name)}, [&] { return detail::can_launch_dependent(address, name); });
  launch(kernel, name, config, stream, std::forward<Args>(args)...);
}

// The number of this kernel's blocks that run on the device at the same time.
template <class... Params>
int resident_blocks(void (*kernel)(Params...), const char* name, int threads, size_t shared_bytes) {
  allow_shared_memory(kernel, name, shared_bytes);
  return detail::blocks_per_multiprocessor(kernel, name, threads, shared_bytes) * multiprocessors(name);
}

}  // namespace movq
