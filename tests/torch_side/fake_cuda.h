// Included before every file of csrc's torch side. Its operators then become those of the library "torch_side" for CPU tensors,
// on a fake CUDA runtime that records which device is current.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

namespace fake {

inline constexpr char kStream[] = "the current stream";

extern std::string events;  // calls of the runtime, for Python
extern int guards;          // device guards that exist
extern bool has_hopper;     // whether the current device runs the kernels for Hopper

struct FakeDeviceGuard {
  explicit FakeDeviceGuard(int32_t device);
  ~FakeDeviceGuard();
};

inline AOTITorchError current_stream(int32_t, void** stream) {
  *stream = const_cast<char*>(kStream);
  return 0;
}

}  // namespace fake

namespace torch::stable::accelerator {
using fake::FakeDeviceGuard;
}

#define movq_ext torch_side
#define CUDA CPU
#define DeviceGuard FakeDeviceGuard
#define aoti_torch_get_current_cuda_stream fake::current_stream
