// The operator add_bias_residual_ for CUDA tensors: checks, layout and stream around the launcher.
#include "kernels/epilogue.h"

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "tensors.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

at::MemoryFormat layout_of(const Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  TORCH_CHECK_VALUE(x.is_contiguous(at::MemoryFormat::ChannelsLast), "x must be dense in NCHW or channels_last, got strides ",
                    x.strides(), " for shape ", x.sizes());
  return at::MemoryFormat::ChannelsLast;
}

// The residual in x's layout. If that takes no copy it may be x itself; any other overlap would read values already overwritten.
Tensor in_layout(const Tensor& given, const Tensor& x, at::MemoryFormat layout) {
  const Tensor residual = given.contiguous(layout);
  const auto start = reinterpret_cast<uintptr_t>(residual.const_data_ptr());
  const auto x_start = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  TORCH_CHECK_VALUE(start == x_start || start >= x_start + x.nbytes() || x_start >= start + x.nbytes(),
                    "residual must be x itself or not overlap it, got one that starts ",
                    static_cast<int64_t>(start) - static_cast<int64_t>(x_start), " bytes after x, which has ", x.nbytes());
  return residual;
}

void add_bias_residual_(Tensor& x, const OptionalTensor& given_bias, const OptionalTensor& given_residual) {
  const c10::cuda::CUDAGuard guard(x.device());
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x must have 4 dimensions and not be empty, got shape ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) <= INT32_MAX && x.size(2) * x.size(3) <= INT32_MAX,
                    "x must have fewer than 2^31 channels and pixels, got shape ", x.sizes());
  TORCH_CHECK_VALUE(given_bias || given_residual, "bias or residual must be given, got neither");
  const at::MemoryFormat layout = layout_of(x);
  movq::EpilogueProblem problem;
  problem.batch = x.size(0);
  problem.channels = x.size(1);
  problem.pixels = x.size(2) * x.size(3);
  problem.dtype = movq::dtype_of(x, "x");
  problem.channels_last = layout == at::MemoryFormat::ChannelsLast;
  Tensor bias, residual;
  if (given_bias) {
    movq::check_channel_parameter("bias", *given_bias, "x", x);
    bias = given_bias->contiguous();
    problem.bias_dtype = movq::dtype_of(bias, "bias");
  }
  if (given_residual) {
    TORCH_CHECK_VALUE(given_residual->sizes() == x.sizes(), "residual must have x's shape ", x.sizes(), ", got ",
                      given_residual->sizes());
    movq::check_device("residual", *given_residual, "x", x);
    movq::check_dtype("residual", *given_residual, "x", x);
    residual = in_layout(*given_residual, x, layout);
  }
  const movq::Epilogue arguments = {
      .x = x.mutable_data_ptr(),
      .bias = movq::read_pointer(bias),
      .residual = movq::read_pointer(residual),
  };
  movq::add_bias_residual(problem, arguments, c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(movq_ext, CUDA, m) { m.impl("add_bias_residual_", &add_bias_residual_); }
