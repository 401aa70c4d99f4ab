// Operator schemas and the Python module movq_ext._C. No logic.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "kernels/probe.h"

namespace py = pybind11;

// Each operator's schema stands here; its implementation is registered in the file that is named after it.
TORCH_LIBRARY(movq_ext, m) {}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA kernels of movq_ext";
  m.def(
      "build_info",
      [] {
        py::dict result;
        result["torch"] = TORCH_VERSION;
        result["cuda"] = CUDART_VERSION;
        result["compiler"] = __VERSION__;
        return result;
      },
      "What this binary was compiled with: torch's release, CUDA as 1000 * major + 10 * minor, the C++ compiler.");
  m.def(
      "device_support",
      [](int device) {
        movq::DeviceSupport support = movq::probe_device(device);
        py::dict result;
        result["device_capability"] = support.device_capability;
        result["binary_version"] = support.binary_version;
        result["ptx_version"] = support.ptx_version;
        return result;
      },
      py::arg("device"),
      "What this binary holds for a CUDA device: capabilities as 10 * major + minor, 0 for none. RuntimeError if it cannot be "
      "asked.");
}
