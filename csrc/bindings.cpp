// The Python module movq_ext._C.
#include <pybind11/pybind11.h>

#include "kernels/probe.h"

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA kernels of movq_ext";
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
