// The operators spatial_norm_forward and spatial_norm_backward for CUDA tensors: checks, layout, allocation and stream around the
// launchers.
#include "kernels/spatial_norm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "tensors.h"

namespace {

using at::Tensor;
using movq::read_pointer;
using OptionalTensor = std::optional<Tensor>;

// The layout for the kernels: f's own if it is dense in NCHW or NHWC. The other tensors are converted to it.
at::MemoryFormat layout_of(const Tensor& f) {
  return f.is_contiguous() ? at::MemoryFormat::Contiguous : f.suggest_memory_format();
}

// The arguments of both forward and backward, checked and in f's layout. Tensors that were not given are undefined.
struct Inputs {
  Tensor f, zq_y, zq_b, weight, bias;
  at::MemoryFormat layout;
  movq::SpatialNormProblem problem;

  Inputs(const Tensor& given_f, const OptionalTensor& given_zq_y, const OptionalTensor& given_zq_b,
         const OptionalTensor& given_weight, const OptionalTensor& given_bias, int64_t groups, double eps, bool silu) {
    TORCH_CHECK_VALUE(given_f.dim() == 4 && given_f.numel() > 0, "f must have 4 dimensions and not be empty, got shape ",
                      given_f.sizes());
    TORCH_CHECK_VALUE(groups > 0 && given_f.size(1) % groups == 0,
                      "groups must be a positive divisor of f's channels, got groups=", groups, " for ", given_f.size(1),
                      " channels");
    TORCH_CHECK_VALUE(given_f.size(1) <= INT32_MAX && given_f.size(2) * given_f.size(3) <= movq::kMaxMapPixels,
                      "f must have fewer than 2^31 channels and at most ", movq::kMaxMapPixels, " pixels, got shape ",
                      given_f.sizes());
    TORCH_CHECK_VALUE(given_zq_y.has_value() == given_zq_b.has_value(),
                      "zq_y and zq_b must be given together or not at all, got only ", given_zq_y ? "zq_y" : "zq_b");
    layout = layout_of(given_f);
    f = given_f.contiguous(layout);
    problem.dtype = movq::dtype_of(f, "f");
    problem.batch = f.size(0);
    problem.channels = f.size(1);
    problem.height = f.size(2);
    problem.width = f.size(3);
    problem.groups = groups;
    problem.channels_last = layout == at::MemoryFormat::ChannelsLast;
    problem.silu = silu;
    problem.eps = static_cast<float>(eps);
    if (given_zq_y) {
      zq_y = checked_zq("zq_y", *given_zq_y);
      zq_b = checked_zq("zq_b", *given_zq_b);
      TORCH_CHECK_VALUE(zq_y.sizes() == zq_b.sizes(), "zq_y and zq_b must have the same shape, got ", zq_y.sizes(), " and ",
                        zq_b.sizes());
      problem.zq_height = zq_y.size(2);
      problem.zq_width = zq_y.size(3);
    }
    weight = checked_parameter("weight", given_weight);
    bias = checked_parameter("bias", given_bias);
    if (weight.defined() && bias.defined()) movq::check_dtype("bias", bias, "weight", weight);
    problem.param_dtype = weight.defined() ? movq::dtype_of(weight, "weight")
                          : bias.defined() ? movq::dtype_of(bias, "bias")
                                           : problem.dtype;
  }

  Tensor checked_zq(const char* name, const Tensor& zq) const {
    TORCH_CHECK_VALUE(zq.dim() == 4 && zq.numel() > 0, name, " must have 4 dimensions and not be empty, got shape ", zq.sizes());
    TORCH_CHECK_VALUE(zq.size(0) == f.size(0) && zq.size(1) == f.size(1), name, " must have f's batch and channels (", f.size(0),
                      ", ", f.size(1), "), got shape ", zq.sizes());
    movq::check_device(name, zq, "f", f);
    movq::check_dtype(name, zq, "f", f);
    return zq.contiguous(layout);
  }

  Tensor checked_parameter(const char* name, const OptionalTensor& parameter) const {
    if (!parameter) return {};
    movq::check_channel_parameter(name, *parameter, "f", f);
    return parameter->contiguous();
  }
};

// Null for an undefined or empty tensor, whose gradient is not wanted.
void* write_pointer(const Tensor& tensor) { return tensor.defined() && tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

void check_bordered(const Inputs& inputs) {
  const movq::SpatialNormProblem& problem = inputs.problem;
  auto fits = [](int64_t size, int64_t zq_size) {
    return zq_size > 0 && zq_size % 3 == 0 && size % (zq_size / 3) == 0 && size / (zq_size / 3) > 1;
  };
  TORCH_CHECK_VALUE(fits(problem.height, problem.zq_height) && fits(problem.width, problem.zq_width),
                    "bordered zq_y must have three rows and columns for each cell of at least 2x2 of f's ", problem.height, " x ",
                    problem.width, " pixels, got shape ", inputs.zq_y.defined() ? inputs.zq_y.sizes() : at::IntArrayRef());
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& f, const OptionalTensor& zq_y, const OptionalTensor& zq_b,
                                           const OptionalTensor& weight, const OptionalTensor& bias, int64_t groups, double eps,
                                           bool silu, const OptionalTensor& given_f_bias, bool bordered) {
  const c10::cuda::CUDAGuard guard(f.device());
  Inputs inputs(f, zq_y, zq_b, weight, bias, groups, eps, silu);
  if (bordered) check_bordered(inputs);
  inputs.problem.bordered = bordered;
  const Tensor f_bias = inputs.checked_parameter("f_bias", given_f_bias);
  if (f_bias.defined()) inputs.problem.f_bias_dtype = movq::dtype_of(f_bias, "f_bias");
  Tensor out = at::empty_like(inputs.f, inputs.layout);
  Tensor mean = at::empty({f.size(0), groups}, f.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  movq::SpatialNormForward arguments = {
      .f = read_pointer(inputs.f),
      .zq_y = read_pointer(inputs.zq_y),
      .zq_b = read_pointer(inputs.zq_b),
      .weight = read_pointer(inputs.weight),
      .bias = read_pointer(inputs.bias),
      .f_bias = read_pointer(f_bias),
      .out = write_pointer(out),
      .mean = mean.mutable_data_ptr<float>(),
      .rstd = rstd.mutable_data_ptr<float>(),
      .workspace = nullptr,
  };
  const size_t bytes = movq::spatial_norm_forward_workspace(inputs.problem, arguments);
  const Tensor workspace = movq::allocate_workspace(bytes, inputs.f);
  arguments.workspace = workspace.mutable_data_ptr();
  movq::spatial_norm_forward(inputs.problem, arguments, c10::cuda::getCurrentCUDAStream());
  return {out, mean, rstd};
}

// The gradient of an argument that was not given is an empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& given_dout, const Tensor& f, const OptionalTensor& zq_y,
                                                            const OptionalTensor& zq_b, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                                            int64_t groups, bool silu) {
  const c10::cuda::CUDAGuard guard(f.device());
  const Inputs inputs(f, zq_y, zq_b, weight, bias, groups, 0, silu);
  TORCH_CHECK_VALUE(given_dout.sizes() == f.sizes(), "dout must have f's shape ", f.sizes(), ", got ", given_dout.sizes());
  movq::check_device("dout", given_dout, "f", f);
  movq::check_dtype("dout", given_dout, "f", f);
  for (const auto& [name, statistic] : {std::pair("mean", &mean), std::pair("rstd", &rstd)}) {
    TORCH_CHECK_VALUE(statistic->dim() == 2 && statistic->size(0) == f.size(0) && statistic->size(1) == groups, name,
                      " must have the shape (", f.size(0), ", ", groups, ") that forward returned, got ", statistic->sizes());
    TORCH_CHECK_VALUE(statistic->is_contiguous(), name, " must be contiguous, got strides ", statistic->strides());
    TORCH_CHECK_TYPE(statistic->scalar_type() == at::kFloat, name, " must be float32, got ", statistic->scalar_type());
    movq::check_device(name, *statistic, "f", f);
  }
  const Tensor dout = given_dout.contiguous(inputs.layout);
  auto empty_gradient = [&](const Tensor& of) { return of.defined() ? at::empty_like(of) : at::empty({0}, inputs.f.options()); };
  Tensor df = at::empty_like(inputs.f, inputs.layout), dzq_y = empty_gradient(inputs.zq_y), dzq_b = empty_gradient(inputs.zq_b);
  Tensor dweight = empty_gradient(inputs.weight), dbias = empty_gradient(inputs.bias);
  movq::SpatialNormBackward arguments = {
      .dout = read_pointer(dout),
      .f = read_pointer(inputs.f),
      .zq_y = read_pointer(inputs.zq_y),
      .zq_b = read_pointer(inputs.zq_b),
      .weight = read_pointer(inputs.weight),
      .bias = read_pointer(inputs.bias),
      .mean = mean.const_data_ptr<float>(),
      .rstd = rstd.const_data_ptr<float>(),
      .df = write_pointer(df),
      .dzq_y = write_pointer(dzq_y),
      .dzq_b = write_pointer(dzq_b),
      .dweight = write_pointer(dweight),
      .dbias = write_pointer(dbias),
      .workspace = nullptr,
  };
  const size_t bytes = movq::spatial_norm_backward_workspace(inputs.problem, arguments);
  const Tensor workspace = movq::allocate_workspace(bytes, inputs.f);
  arguments.workspace = workspace.mutable_data_ptr();
  movq::spatial_norm_backward(inputs.problem, arguments, c10::cuda::getCurrentCUDAStream());
  return {df, dzq_y, dzq_b, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(movq_ext, CUDA, m) {
  m.impl("spatial_norm_forward", &forward);
  m.impl("spatial_norm_backward", &backward);
}
