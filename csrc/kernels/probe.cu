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

}  // namespace

int device_capability(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

CodeVersions code_versions() {
  cudaFuncAttributes attributes{};
  cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    return {};
  }
  check(status, "cudaFuncGetAttributes");
  return {attributes.binaryVersion, attributes.ptxVersion};
}

}  // namespace movq
