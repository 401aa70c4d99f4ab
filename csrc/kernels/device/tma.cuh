// Copies of boxes of a tensor from global to shared memory by the tensor memory accelerator (sm_90).
#pragma once

#ifndef MOVQ_EMULATOR
#include <cuda.h>
#endif

#include "launch.cuh"
#include "mbarrier.cuh"

namespace movq {

// What the hardware knows of a tensor. A kernel takes it as `const __grid_constant__ TensorMap`.
#ifdef MOVQ_EMULATOR
using TensorMap = emu::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// A tensor of 16-bit elements with 4 dimensions, innermost first, and the box that one copy takes. Elements of dimension 0 are
// adjacent; strides are those of dimensions 1 to 3 in bytes, multiples of 16.
struct TensorShape {
  uint64_t sizes[4];
  uint64_t strides[3];
  uint32_t box[4];
};

// Box rows must have 128 bytes: they are written in the layout of SwizzledTile.
inline TensorMap make_tensor_map(const void* data, const TensorShape& shape, const char* name) {
#ifdef MOVQ_EMULATOR
  return emu::make_tensor_map(data, sizeof(uint16_t), shape.sizes, shape.strides, shape.box);
#else
  // The driver's function, found at run time, so that the extension loads where there is no libcuda.
  static const auto encode = [name] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found), name);
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(std::string(name) + ": the driver has no cuTensorMapEncodeTiled; expected CUDA 12.0 or newer");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  TensorMap map;
  const uint32_t steps[4] = {1, 1, 1, 1};
  // The type tells the copy only the size of an element.
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), shape.sizes, shape.strides,
                                 shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(name) + ": cuTensorMapEncodeTiled failed with error " + std::to_string(int(result)));
  }
  return map;
#endif
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
