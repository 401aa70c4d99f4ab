// The operators around an upsampling convolution for CUDA tensors: checks, allocation and stream around the launchers.
#include "kernels/upsampling.h"

#include <tuple>
#include <utility>

#include "tensors.h"

namespace {

using movq::empty_map;
using movq::MemoryFormat;
using movq::OptionalTensor;
using movq::shape;
using movq::Tensor;

// Returns the sizes of the problem. Refuses weights that the kernels could not index with 32 bits per channel.
movq::FoldProblem fold_problem(int64_t out_channels, int64_t in_channels, const Tensor& tensor, const char* name) {
  CHECK_ARGUMENT(0 < out_channels && out_channels < (1 << 26) && 0 < in_channels && in_channels < (1 << 26), name,
                 " must have 1 to 2^26 - 1 channels on both sides, got shape ", shape(tensor));
  movq::FoldProblem problem;
  problem.out_channels = out_channels;
  problem.in_channels = in_channels;
  problem.dtype = movq::dtype_of(tensor, name);
  return problem;
}

Tensor fold_upsampling(const Tensor& given_weight, bool windows) {
  const movq::DeviceGuard guard(given_weight.get_device_index());
  CHECK_ARGUMENT(given_weight.dim() == 4 && given_weight.size(2) == 3 && given_weight.size(3) == 3,
                 "weight must have shape (out, in, 3, 3), got ", shape(given_weight));
  const int64_t out = given_weight.size(0), in = given_weight.size(1);
  movq::FoldProblem problem = fold_problem(out, in, given_weight, "weight");
  problem.windows = windows;
  problem.channels_last = !given_weight.is_contiguous() && movq::is_dense(given_weight, MemoryFormat::ChannelsLast);
  const Tensor weight = problem.channels_last ? given_weight : movq::in_format(given_weight, MemoryFormat::Contiguous);
  const Tensor folded = windows ? empty_map({4 * out, in, 2, 2}, MemoryFormat::ChannelsLast, weight)
                                : empty_map({in, out, 4, 4}, MemoryFormat::ChannelsLast, weight);
  movq::fold_upsampling(problem, weight.const_data_ptr(), folded.mutable_data_ptr(), movq::current_stream(given_weight));
  return folded;
}

Tensor fold_upsampling_backward(const Tensor& given_dfolded, bool channels_last) {
  const movq::DeviceGuard guard(given_dfolded.get_device_index());
  CHECK_ARGUMENT(given_dfolded.dim() == 4 && given_dfolded.size(2) == 4 && given_dfolded.size(3) == 4,
                 "dfolded must have shape (in, out, 4, 4), got ", shape(given_dfolded));
  const int64_t in = given_dfolded.size(0), out = given_dfolded.size(1);
  movq::FoldProblem problem = fold_problem(out, in, given_dfolded, "dfolded");
  problem.channels_last = channels_last;
  const Tensor dfolded = movq::in_format(given_dfolded, MemoryFormat::ChannelsLast);
  const Tensor dweight =
      empty_map({out, in, 3, 3}, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous, dfolded);
  movq::fold_upsampling_backward(problem, dfolded.const_data_ptr(), dweight.mutable_data_ptr(),
                                 movq::current_stream(given_dfolded));
  return dweight;
}

// `with_statistics` sets the problem's groups and chunk size, and returns the allocated statistics, if any.
template <class WithStatistics>
std::pair<Tensor, OptionalTensor> interleave(const Tensor& given_windows, const OptionalTensor& given_bias,
                                             WithStatistics with_statistics) {
  const movq::DeviceGuard guard(given_windows.get_device_index());
  const auto sizes = given_windows.sizes();
  CHECK_ARGUMENT(sizes.size() == 4 && sizes[0] > 0 && sizes[1] > 0 && sizes[1] % 4 == 0 && sizes[2] > 1 && sizes[3] > 1,
                 "windows must have shape (batch, 4 * channels, height + 1, width + 1) and not be empty, got ",
                 shape(given_windows));
  movq::InterleaveProblem problem;
  problem.batch = sizes[0];
  problem.channels = sizes[1] / 4;
  problem.height = sizes[2] - 1;
  problem.width = sizes[3] - 1;
  problem.dtype = movq::dtype_of(given_windows, "windows");
  CHECK_ARGUMENT(sizes[1] <= INT32_MAX / sizes[3] && sizes[0] <= 65535 && problem.height <= 32767,
                 "windows must have fewer than 2^31 elements per row, at most 65535 images and at most 32768 rows, got shape ",
                 shape(given_windows));
  const Tensor windows = movq::in_format(given_windows, MemoryFormat::ChannelsLast);
  const Tensor out =
      empty_map({problem.batch, problem.channels, 2 * problem.height, 2 * problem.width}, MemoryFormat::ChannelsLast, windows);
  OptionalTensor bias;
  if (given_bias) {
    movq::check_channel_parameter("bias", *given_bias, "the upsampled map", out);
    bias = movq::contiguous_vector(*given_bias);
    problem.bias_dtype = movq::dtype_of(*bias, "bias");
  }
  const OptionalTensor statistics = with_statistics(problem);
  movq::interleave_windows(problem, windows.const_data_ptr(), movq::read_pointer(bias), out.mutable_data_ptr(),
                           statistics ? statistics->mutable_data_ptr<float>() : nullptr, movq::current_stream(given_windows));
  return {out, statistics};
}

Tensor interleave_windows(const Tensor& windows, const OptionalTensor& bias) {
  return interleave(windows, bias, [](movq::InterleaveProblem&) { return OptionalTensor(); }).first;
}

std::tuple<Tensor, Tensor> interleave_windows_statistics(const Tensor& windows, const OptionalTensor& bias, int64_t groups,
                                                         int64_t chunk_columns) {
  const auto [out, statistics] = interleave(windows, bias, [&](movq::InterleaveProblem& problem) {
    CHECK_ARGUMENT(groups > 0 && problem.channels % groups == 0,
                   "groups must be a positive divisor of the upsampled map's channels, got groups=", groups, " for ",
                   problem.channels, " channels");
    CHECK_ARGUMENT(chunk_columns > 0, "chunk_columns must be positive, got ", chunk_columns);
    problem.groups = groups;
    problem.chunk_columns = chunk_columns;
    return OptionalTensor(movq::empty_contiguous<4>({problem.batch, groups, movq::interleave_parts(problem), 4},
                                                    aoti_torch_dtype_float32(), windows));
  });
  return {out, *statistics};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(movq_ext, CUDA, m) {
  m.impl("fold_upsampling", TORCH_BOX(&fold_upsampling));
  m.impl("fold_upsampling_backward", TORCH_BOX(&fold_upsampling_backward));
  m.impl("interleave_windows", TORCH_BOX(&interleave_windows));
  m.impl("interleave_windows_statistics", TORCH_BOX(&interleave_windows_statistics));
}
