// The fake CUDA runtime, and what Python reads and sets of it. Device 0 has compute capability 9.0 and code for it, device 1 has
// 7.5 and no code; it knows only these.
#include "fake_cuda.h"

#include <cuda_runtime.h>

namespace fake {

std::string events;
int guards = 0;
bool has_hopper = false;
static cudaError_t memory_status = cudaSuccess;
static int current = 0;

static void record(const char* call, int argument) { events += std::string(call) + "(" + std::to_string(argument) + ") "; }

FakeDeviceGuard::FakeDeviceGuard(int32_t device) {
  record("guard", device);
  current = device;
  ++guards;
}

FakeDeviceGuard::~FakeDeviceGuard() {
  events += "release ";
  current = 0;
  --guards;
}

}  // namespace fake

cudaError_t cudaSetDevice(int device) {
  fake::record("cudaSetDevice", device);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = fake::current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  fake::record("cudaDeviceGetAttribute", device);
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? (device ? 7 : 9) : (device ? 5 : 0);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)()) {
  fake::record("cudaFuncGetAttributes", fake::current);
  if (fake::current == 1) return cudaErrorNoKernelImageForDevice;
  *attributes = {90, 90};
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = 1000;
  *total = 5000;
  return fake::memory_status;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    default: return "another error";
  }
}

// Returns the recorded calls, and forgets them.
extern "C" const char* take_events() {
  static std::string taken;
  taken.clear();
  taken.swap(fake::events);
  return taken.c_str();
}

// Plants the error that a failed kernel leaves behind.
extern "C" void set_kernel_failed(bool failed) { fake::memory_status = failed ? cudaErrorIllegalAddress : cudaSuccess; }

extern "C" void set_hopper(bool has_hopper) { fake::has_hopper = has_hopper; }
