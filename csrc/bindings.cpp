// The operators' schemas and the Python module movq_ext._C. No logic.
//
// The module is written for Python's limited API, and the operators for torch's stable ABI: one binary serves every version of
// both from those it is compiled for.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <exception>

#include "kernels/probe.h"

// Each operator is implemented and registered in the .cpp file named after it.
STABLE_TORCH_LIBRARY(movq_ext, m) {
  m.def(
      "spatial_norm_forward(Tensor f, Tensor? zq_y, Tensor? zq_b, Tensor? weight, Tensor? bias, int groups, float eps, bool silu,"
      " Tensor? f_bias=None, bool bordered=False) -> (Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "spatial_norm_backward(Tensor dout, Tensor f, Tensor? zq_y, Tensor? zq_b, Tensor? weight, Tensor? bias, Tensor mean,"
      " Tensor rstd, int groups, bool silu) -> (Tensor df, Tensor dzq_y, Tensor dzq_b, Tensor dweight, Tensor dbias)");
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
  m.def("fold_upsampling(Tensor weight, bool windows=False) -> Tensor");
  m.def("fold_upsampling_backward(Tensor dfolded, bool channels_last) -> Tensor");
  m.def("interleave_windows(Tensor windows, Tensor? bias) -> Tensor");
}

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s, s:i, s:s}", "torch", TORCH_VERSION, "cuda", CUDART_VERSION, "compiler", __VERSION__);
}

PyObject* device_support(PyObject*, PyObject* argument) {
  const long device = PyLong_AsLong(argument);
  if (device == -1 && PyErr_Occurred()) return nullptr;
  try {
    const int capability = movq::device_capability(static_cast<int>(device));  // an error if there is no such device
    // torch's guard, since cudaSetDevice would create a context on the device to restore, which the process may not use.
    const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
    const movq::CodeVersions versions = movq::code_versions();
    return Py_BuildValue("{s:i, s:i, s:i}", "device_capability", capability, "binary_version", versions.binary, "ptx_version",
                         versions.ptx);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "The versions that compiled this binary: torch's release, CUDA as 1000 * major + 10 * minor, the C++ compiler."},
    {"device_support", device_support, METH_O,
     "The compute capability of a device, given by its index, and the versions of machine code and PTX for it, as "
     "10 * major + minor, 0 for none. Raises RuntimeError if the device cannot be queried."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_C", .m_doc = "CUDA kernels of movq_ext", .m_size = -1, .m_methods = methods};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
