// The operators' schemas and the Python module movq_ext._C. No logic.
//
// The operators use only torch's stable ABI, and pybind11 consists of headers. So one binary serves every torch from the one it
// is compiled for, and one version of Python.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "kernels/probe.h"

namespace py = pybind11;

// Each operator is implemented and registered in the .cpp file named after it.
STABLE_TORCH_LIBRARY(movq_ext, m) {
  m.def(
      "spatial_norm_forward(Tensor f, Tensor? zq_y, Tensor? zq_b, Tensor? weight, Tensor? bias, int groups, float eps, bool silu,"
      " Tensor? f_bias=None, bool bordered=False, Tensor? statistics=None, int frames=1, int latent_frames=1,"
      " bool split_first_frame=False)"
      " -> (Tensor out, Tensor mean, Tensor rstd)");
  // Writes to `out`, whose images and channels need not be adjacent.
  m.def(
      "spatial_norm_into(Tensor(a!) out, Tensor f, Tensor? zq_y, Tensor? zq_b, Tensor? weight, Tensor? bias, int groups,"
      " float eps, bool silu, int frames=1, int latent_frames=1, bool split_first_frame=False) -> ()");
  m.def(
      "spatial_norm_backward(Tensor dout, Tensor f, Tensor? zq_y, Tensor? zq_b, Tensor? weight, Tensor? bias, Tensor mean,"
      " Tensor rstd, int groups, bool silu, int frames=1, int latent_frames=1, bool split_first_frame=False)"
      " -> (Tensor df, Tensor dzq_y, Tensor dzq_b, Tensor dweight, Tensor dbias)");
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale)"
      " -> (Tensor dq, Tensor dk, Tensor dv)");
  // `hopper`: the kernels for compute capability 9.0, where they run.
  m.def("shared_kv_attention_forward(Tensor q, Tensor kv, float scale, bool hopper=False) -> (Tensor out, Tensor lse)");
  m.def(
      "shared_kv_attention_backward(Tensor dout, Tensor q, Tensor kv, Tensor out, Tensor lse, float scale, bool hopper=False)"
      " -> (Tensor dq, Tensor dkv)");
  m.def("add_bias_residual_(Tensor(a!) x, Tensor? bias, Tensor? residual) -> ()");
  m.def(
      "add_bias_residual_statistics_(Tensor(a!) x, Tensor? bias, Tensor? residual, int groups, int chunk_pixels)"
      " -> Tensor statistics");
  m.def("fold_upsampling(Tensor weight, bool windows=False) -> Tensor");
  m.def("fold_upsampling_backward(Tensor dfolded, bool channels_last) -> Tensor");
  m.def("interleave_windows(Tensor windows, Tensor? bias) -> Tensor");
  m.def(
      "interleave_windows_statistics(Tensor windows, Tensor? bias, int groups, int chunk_columns)"
      " -> (Tensor out, Tensor statistics)");
}

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
      "The versions that compiled this binary: torch's release, CUDA as 1000 * major + 10 * minor, the C++ compiler.");
  m.def(
      "device_support",
      [](int device) {
        const int capability = movq::device_capability(device);  // an error if there is no such device
        // torch's guard, since cudaSetDevice would create a context on the device to restore, which the process may not use.
        const torch::stable::accelerator::DeviceGuard guard(device);
        const movq::CodeVersions versions = movq::code_versions();
        py::dict result;
        result["device_capability"] = capability;
        result["binary_version"] = versions.binary;
        result["ptx_version"] = versions.ptx;
        return result;
      },
      py::arg("device"),
      "The device's compute capability and the versions of machine code and PTX for it, as 10 * major + minor, 0 for none. "
      "Raises RuntimeError if the device cannot be queried.");
}
