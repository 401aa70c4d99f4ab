#include "probe.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace movq {
namespace {

__global__ void probe_kernel() {}

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear it: the next caller would see it as its own
  throw std::runtime_error(std::string("probe_device: ") + call + ": " + cudaGetErrorString(status));
}

// Makes a device current, and restores the previous one on destruction.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~CurrentDevice() { cudaSetDevice(previous_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace

DeviceSupport probe_device(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  CurrentDevice current(device);
  cudaFuncAttributes attributes{};
  cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    attributes = {};
  } else {
    check(status, "cudaFuncGetAttributes");
  }
  return {10 * major + minor, attributes.binaryVersion, attributes.ptxVersion};
}

}  // namespace movq
