// Copies of boxes of a tensor from global to shared memory by the tensor memory accelerator (sm_90).
#pragma once

#ifndef MOVQ_EMULATOR
#include <cuda.h>
#endif

#include <algorithm>
#include <array>

#include "launch.cuh"
#include "mbarrier.cuh"

namespace movq {

// Describes a tensor to the hardware. A kernel takes it as `const __grid_constant__ TensorMap`.
#ifdef MOVQ_EMULATOR
using TensorMap = emu::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// A tensor of 16-bit elements with 4 dimensions, innermost first, and the box that one copy moves. Elements of dimension 0 are
// adjacent; strides are those of dimensions 1 to 3 in bytes, multiples of 16.
struct TensorShape {
  uint64_t sizes[4];
  uint64_t strides[3];
  uint32_t box[4];
};

namespace detail {

#ifdef MOVQ_EMULATOR

inline TensorMap encode_tensor_map(const void* data, const TensorShape& shape, const char*) {
  return emu::make_tensor_map(data, sizeof(uint16_t), shape.sizes, shape.strides, shape.box);
}

inline void set_address(TensorMap& map, const void* data, const char*) { emu::set_address(map, data); }

#else

// A function of the driver, found at run time, so that the extension loads where there is no libcuda.
template <class Function>
Function* driver_function(const char* symbol, const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion(symbol, &function, 12000, cudaEnableDefault, &found), name);
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string(name) + ": the driver has no " + symbol + "; expected CUDA 12.0 or newer");
  }
  return reinterpret_cast<Function*>(function);
}

inline void check_driver(CUresult result, const char* function, const char* name) {
  if (result == CUDA_SUCCESS) return;
  throw std::runtime_error(std::string(name) + ": " + function + " failed with error " + std::to_string(int(result)));
}

inline TensorMap encode_tensor_map(const void* data, const TensorShape& shape, const char* name) {
  static const auto encode = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", name);
  TensorMap map;
  const uint32_t steps[4] = {1, 1, 1, 1};
  // The type tells the copy only the size of an element.
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), shape.sizes, shape.strides,
                                 shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_driver(result, "cuTensorMapEncodeTiled", name);
  return map;
}

inline void set_address(TensorMap& map, const void* data, const char* name) {
  static const auto replace = driver_function<decltype(cuTensorMapReplaceAddress)>("cuTensorMapReplaceAddress", name);
  check_driver(replace(&map, const_cast<void*>(data)), "cuTensorMapReplaceAddress", name);
}

#endif

}  // namespace detail

// The map of a tensor of this shape at `data`. It is encoded once per device and shape; later calls only set the address. Box
// rows must have 128 bytes: they are written in the layout of SwizzledTile.
inline TensorMap tensor_map(const void* data, const TensorShape& shape, const char* name) {
  using Key = std::array<uint64_t, 12>;
  static auto& maps = *new BoundedCache<Key, TensorMap, 256>;  // never destroyed: threads may outlive main()
  Key key = {uint64_t(current_device(name))};
  auto end = std::copy(std::begin(shape.sizes), std::end(shape.sizes), key.begin() + 1);
  end = std::copy(std::begin(shape.strides), std::end(shape.strides), end);
  std::copy(std::begin(shape.box), std::end(shape.box), end);
  TensorMap map = maps.get(key, [&] { return detail::encode_tensor_map(data, shape, name); });
  detail::set_address(map, data, name);
  return map;
}

struct Coordinates { int x, y, z, w; };  // innermost first

// Starts the copy of the box at `from` to element i of `to`, which must be aligned to 1024 bytes. Called by one thread. Elements
// beyond the tensor become zeros, and their bytes count too: the barrier must expect the bytes of the whole box.
template <class T>
MOVQ_DEVICE void tma_load(const Shared<T>& to, unsigned i, const TensorMap& map, const Coordinates& from,
                          const MBarrier& barrier) {
#ifdef MOVQ_EMULATOR
  const unsigned address = to.address(i, map.box_bytes() / sizeof(T));
  const int coordinates[] = {from.x, from.y, from.z, from.w};
  emu::tma_load(address, map, coordinates, barrier.address());
#else
  const unsigned address = to.address(i, 1);
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::
          "r"(address),
      "l"(&map), "r"(from.x), "r"(from.y), "r"(from.z), "r"(from.w), "r"(barrier.address())
      : "memory");
#endif
}

}  // namespace movq
