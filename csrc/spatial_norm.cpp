// The operators spatial_norm_forward and spatial_norm_backward for CUDA tensors: checks, allocation, stream; then the launchers.
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
using OptionalTensor = std::optional<Tensor>;

// What the kernels work in: f as it is where it is dense in NCHW or NHWC, and the others in the same layout.
at::MemoryFormat layout_of(const Tensor& f) {
  return f.is_contiguous() ? at::MemoryFormat::Contiguous : f.suggest_memory_format();
}

void check_like(const char* name, const Tensor& t, const Tensor& f) {
  TORCH_CHECK_VALUE(t.device() == f.device(), name, " must be on f's device ", f.device(), ", got ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == f.scalar_type(), name, " must have f's dtype ", f.scalar_type(), ", got ", t.scalar_type());
}

// The arguments that forward and backward share, checked and laid out.
struct Inputs {
  Tensor f, zq_y, zq_b, weight, bias;  // undefined where not given
  at::MemoryFormat layout;
  movq::SpatialNormProblem problem;

  Inputs(const Tensor& f_, const OptionalTensor& zq_y_, const OptionalTensor& zq_b_, const OptionalTensor& weight_,
         const OptionalTensor& bias_, int64_t groups, double eps, bool silu) {
    TORCH_CHECK_VALUE(f_.dim() == 4 && f_.numel() > 0, "f must have 4 dimensions, none empty, got shape ", f_.sizes());
    TORCH_CHECK_VALUE(groups > 0 && f_.size(1) % groups == 0, "groups must be a positive divisor of f's ", f_.size(1),
                      " channels, got ", groups);
    TORCH_CHECK_VALUE(f_.size(1) <= INT32_MAX && f_.size(2) * f_.size(3) <= movq::kMostPixels,
                      "f must have fewer than 2^31 channels and at most ", movq::kMostPixels, " pixels, got shape ", f_.sizes());
    TORCH_CHECK_VALUE(zq_y_.has_value() == zq_b_.has_value(), "zq_y and zq_b must be given together or not at all");
    layout = layout_of(f_);
    f = f_.contiguous(layout);
    problem.dtype = movq::dtype_of(f, "f");
    problem.batch = f.size(0);
    problem.channels = f.size(1);
    problem.height = f.size(2);
    problem.width = f.size(3);
    problem.groups = groups;
    problem.channels_last = layout == at::MemoryFormat::ChannelsLast;
    problem.silu = silu;
    problem.eps = static_cast<float>(eps);
    if (zq_y_) {
      zq_y = map("zq_y", *zq_y_);
      zq_b = map("zq_b", *zq_b_);
      TORCH_CHECK_VALUE(zq_y.sizes() == zq_b.sizes(), "zq_y and zq_b must have one shape, got ", zq_y.sizes(), " and ",
                        zq_b.sizes());
      problem.zq_height = zq_y.size(2);
      problem.zq_width = zq_y.size(3);
    }
    weight = parameter("weight", weight_);
    bias = parameter("bias", bias_);
    TORCH_CHECK_TYPE(!weight.defined() || !bias.defined() || weight.scalar_type() == bias.scalar_type(),
                     "weight and bias must have one dtype");
    problem.param_dtype = weight.defined() ? movq::dtype_of(weight, "weight")
                          : bias.defined() ? movq::dtype_of(bias, "bias")
                                           : problem.dtype;
  }

  Tensor map(const char* name, const Tensor& t) const {
    TORCH_CHECK_VALUE(t.dim() == 4 && t.numel() > 0 && t.size(0) == f.size(0) && t.size(1) == f.size(1), name,
                      " must have 4 dimensions, none empty, with f's batch and channels, got shape ", t.sizes());
    check_like(name, t, f);
    return t.contiguous(layout);
  }

  Tensor parameter(const char* name, const OptionalTensor& t) const {
    if (!t) return {};
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == f.size(1), name, " must have shape (", f.size(1), "), got ", t->sizes());
    TORCH_CHECK_VALUE(t->device() == f.device(), name, " must be on f's device ", f.device(), ", got ", t->device());
    TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat || t->scalar_type() == f.scalar_type(), name,
                     " must be float32 or have f's dtype ", f.scalar_type(), ", got ", t->scalar_type());
    return t->contiguous();
  }
};

const void* in(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* out(const Tensor& t) { return t.defined() && t.numel() ? t.mutable_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& f, const OptionalTensor& zq_y, const OptionalTensor& zq_b,
                                           const OptionalTensor& weight, const OptionalTensor& bias, int64_t groups, double eps,
                                           bool silu, const OptionalTensor& f_bias, bool bordered) {
  const c10::cuda::CUDAGuard guard(f.device());
  Inputs i(f, zq_y, zq_b, weight, bias, groups, eps, silu);
  if (bordered) {
    const auto& p = i.problem;
    for (const auto& [size, zq_size] : {std::pair(p.height, p.zq_height), std::pair(p.width, p.zq_width)}) {
      TORCH_CHECK_VALUE(zq_size > 0 && zq_size % 3 == 0 && size % (zq_size / 3) == 0 && size / (zq_size / 3) > 1,
                        "a bordered zq_y must have "
                        "three rows and columns for each of its cells, which are as many of f's and two at least, got shape ",
                        i.zq_y.defined() ? i.zq_y.sizes() : at::IntArrayRef(), " for f of ", f.sizes());
    }
    i.problem.bordered = true;
  }
  const Tensor moved = i.parameter("f_bias", f_bias);
  if (moved.defined()) i.problem.f_bias_dtype = movq::dtype_of(moved, "f_bias");
  Tensor result = at::empty_like(i.f, i.layout);
  Tensor mean = at::empty({f.size(0), groups}, f.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  // clang-format off
  movq::SpatialNormForward a = {in(i.f), in(i.zq_y), in(i.zq_b), in(i.weight), in(i.bias), in(moved), out(result),
                                mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), nullptr};
  // clang-format on
  const Tensor scratch = movq::workspace(movq::spatial_norm_forward_workspace(i.problem, a), i.f);
  a.workspace = scratch.mutable_data_ptr();
  movq::spatial_norm_forward(i.problem, a, c10::cuda::getCurrentCUDAStream());
  return {result, mean, rstd};
}

// Gradients of what was not given are empty tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& f, const OptionalTensor& zq_y,
                                                            const OptionalTensor& zq_b, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                                            int64_t groups, bool silu) {
  const c10::cuda::CUDAGuard guard(f.device());
  const Inputs i(f, zq_y, zq_b, weight, bias, groups, 0, silu);
  TORCH_CHECK_VALUE(dout.sizes() == f.sizes(), "dout must have f's shape ", f.sizes(), ", got ", dout.sizes());
  check_like("dout", dout, f);
  for (const auto& [name, t] : {std::pair("mean", &mean), std::pair("rstd", &rstd)}) {
    TORCH_CHECK_VALUE(t->dim() == 2 && t->size(0) == f.size(0) && t->size(1) == groups && t->scalar_type() == at::kFloat &&
                          t->is_contiguous() && t->device() == f.device(),
                      name, " must be what the forward operator returned");
  }
  const Tensor d = dout.contiguous(i.layout);
  auto grad = [&](const Tensor& t) { return t.defined() ? at::empty_like(t) : at::empty({0}, i.f.options()); };
  Tensor df = at::empty_like(i.f, i.layout), dy = grad(i.zq_y), db = grad(i.zq_b), dweight = grad(i.weight), dbias = grad(i.bias);
  // clang-format off
  movq::SpatialNormBackward a = {in(d), in(i.f), in(i.zq_y), in(i.zq_b), in(i.weight), in(i.bias), mean.const_data_ptr<float>(),
                                 rstd.const_data_ptr<float>(), out(df), out(dy), out(db), out(dweight), out(dbias), nullptr};
  // clang-format on
  const Tensor scratch = movq::workspace(movq::spatial_norm_backward_workspace(i.problem, a), i.f);
  a.workspace = scratch.mutable_data_ptr();
  movq::spatial_norm_backward(i.problem, a, c10::cuda::getCurrentCUDAStream());
  return {df, dy, db, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(movq_ext, CUDA, m) {
  m.impl("spatial_norm_forward", &forward);
  m.impl("spatial_norm_backward", &backward);
}
