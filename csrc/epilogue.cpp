// The operators add_bias_residual_ and add_bias_residual_statistics_ for CUDA tensors: checks, layout, allocation and stream
// around the launcher.
#include "kernels/epilogue.h"

#include "tensors.h"

namespace {

using movq::MemoryFormat;
using movq::OptionalTensor;
using movq::Tensor;

MemoryFormat format_of(const Tensor& x) {
  if (x.is_contiguous()) return MemoryFormat::Contiguous;
  CHECK_ARGUMENT(movq::is_dense(x, MemoryFormat::ChannelsLast), "x must be dense in NCHW or channels_last, got strides ",
                 movq::strides(x), " for shape ", movq::shape(x));
  return MemoryFormat::ChannelsLast;
}

// `with_statistics` sets the problem's groups and chunk size, and returns the allocated statistics, if any.
template <class WithStatistics>
OptionalTensor add(const Tensor& x, const OptionalTensor& given_bias, const OptionalTensor& given_residual,
                   WithStatistics with_statistics) {
  const movq::DeviceGuard guard(x.get_device_index());
  CHECK_ARGUMENT(x.dim() == 4 && x.numel() > 0, "x must have 4 dimensions and not be empty, got shape ", movq::shape(x));
  CHECK_ARGUMENT(x.size(1) <= INT32_MAX && x.size(2) * x.size(3) <= INT32_MAX,
                 "x must have fewer than 2^31 channels and pixels, got shape ", movq::shape(x));
  CHECK_ARGUMENT(given_bias || given_residual, "bias or residual must be given, got neither");
  const MemoryFormat format = format_of(x);
  movq::EpilogueProblem problem;
  problem.batch = x.size(0);
  problem.channels = x.size(1);
  problem.pixels = x.size(2) * x.size(3);
  problem.dtype = movq::dtype_of(x, "x");
  problem.channels_last = format == MemoryFormat::ChannelsLast;
  OptionalTensor bias, residual;
  if (given_bias) {
    movq::check_channel_parameter("bias", *given_bias, "x", x);
    bias = movq::contiguous_vector(*given_bias);
    problem.bias_dtype = movq::dtype_of(*bias, "bias");
  }
  if (given_residual) {
    CHECK_ARGUMENT(given_residual->sizes().equals(x.sizes()), "residual must have x's shape ", movq::shape(x), ", got ",
                   movq::shape(*given_residual));
    movq::check_device("residual", *given_residual, "x", x);
    movq::check_dtype("residual", *given_residual, "x", x);
    residual = movq::in_format(*given_residual, format);
    movq::check_overlap("residual", *residual, "x", x);
  }
  const OptionalTensor statistics = with_statistics(problem);
  const movq::Epilogue arguments = {
      .x = x.mutable_data_ptr(),
      .bias = movq::read_pointer(bias),
      .residual = movq::read_pointer(residual),
      .statistics = statistics ? statistics->mutable_data_ptr<float>() : nullptr,
  };
  movq::add_bias_residual(problem, arguments, movq::current_stream(x));
  return statistics;
}

void add_bias_residual_(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual) {
  add(x, bias, residual, [](movq::EpilogueProblem&) { return OptionalTensor(); });
}

Tensor add_bias_residual_statistics_(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual, int64_t groups,
                                     int64_t chunk_pixels) {
  return *add(x, bias, residual, [&](movq::EpilogueProblem& problem) {
    CHECK_ARGUMENT(groups > 0 && problem.channels % groups == 0,
                   "groups must be a positive divisor of x's channels, got groups=", groups, " for ", problem.channels,
                   " channels");
    CHECK_ARGUMENT(chunk_pixels > 0, "chunk_pixels must be positive, got ", chunk_pixels);
    problem.groups = groups;
    problem.chunk_pixels = chunk_pixels;
    return OptionalTensor(
        movq::empty_contiguous<4>({problem.batch, groups, movq::epilogue_parts(problem), 4}, aoti_torch_dtype_float32(), x));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(movq_ext, CUDA, m) {
  m.impl("add_bias_residual_", TORCH_BOX(&add_bias_residual_));
  m.impl("add_bias_residual_statistics_", TORCH_BOX(&add_bias_residual_statistics_));
}
