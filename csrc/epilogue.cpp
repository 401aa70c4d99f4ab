// The operator add_bias_residual_ for CUDA tensors: checks, layout, stream; then the launcher.
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

// residual in x's layout. Where that takes no copy, it is x itself or apart from it.
Tensor laid_out(const Tensor& residual, const Tensor& x, at::MemoryFormat layout) {
  const Tensor r = residual.contiguous(layout);
  const auto from = reinterpret_cast<uintptr_t>(r.const_data_ptr()), to = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  TORCH_CHECK_VALUE(from == to || from >= to + x.nbytes() || to >= from + x.nbytes(), "residual must not overlap x in part");
  return r;
}

void add_bias_residual_(Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual) {
  const c10::cuda::CUDAGuard guard(x.device());
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x must have 4 dimensions, none empty, got shape ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) <= INT32_MAX && x.size(2) * x.size(3) <= INT32_MAX,
                    "x must have fewer than 2^31 channels and pixels, got shape ", x.sizes());
  TORCH_CHECK_VALUE(bias || residual, "bias or residual must be given");
  const at::MemoryFormat layout = layout_of(x);
  movq::EpilogueProblem problem;
  problem.batch = x.size(0);
  problem.channels = x.size(1);
  problem.pixels = x.size(2) * x.size(3);
  problem.dtype = movq::dtype_of(x, "x");
  problem.channels_last = layout == at::MemoryFormat::ChannelsLast;
  Tensor b, r;
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == x.size(1), "bias must have shape (", x.size(1), "), got ",
                      bias->sizes());
    TORCH_CHECK_VALUE(bias->device() == x.device(), "bias must be on x's device ", x.device(), ", got ", bias->device());
    TORCH_CHECK_TYPE(bias->scalar_type() == at::kFloat || bias->scalar_type() == x.scalar_type(),
                     "bias must be float32 or have x's dtype ", x.scalar_type(), ", got ", bias->scalar_type());
    b = bias->contiguous();
    problem.bias_dtype = movq::dtype_of(b, "bias");
  }
  if (residual) {
    TORCH_CHECK_VALUE(residual->sizes() == x.sizes(), "residual must have x's shape ", x.sizes(), ", got ", residual->sizes());
    TORCH_CHECK_VALUE(residual->device() == x.device(), "residual must be on x's device ", x.device(), ", got ",
                      residual->device());
    TORCH_CHECK_TYPE(residual->scalar_type() == x.scalar_type(), "residual must have x's dtype ", x.scalar_type(), ", got ",
                     residual->scalar_type());
    r = laid_out(*residual, x, layout);
  }
  const movq::Epilogue a = {x.mutable_data_ptr(), b.defined() ? b.const_data_ptr() : nullptr,
                            r.defined() ? r.const_data_ptr() : nullptr};
  movq::add_bias_residual(problem, a, c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(movq_ext, CUDA, m) { m.impl("add_bias_residual_", &add_bias_residual_); }
