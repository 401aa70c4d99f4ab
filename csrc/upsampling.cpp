// The operators around an upsampling convolution for CUDA tensors: checks, allocation and stream around the launchers.
#include "kernels/upsampling.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "tensors.h"

namespace {

using at::Tensor;

Tensor empty_channels_last(at::IntArrayRef shape, const Tensor& like) {
  return at::empty(shape, like.options(), at::MemoryFormat::ChannelsLast);
}

// Channels of a 3x3 weight whose folded form has fewer than 2^31 elements per channel, so that kernels index it with 32 bits.
movq::FoldProblem fold_problem(int64_t out_channels, int64_t in_channels, const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(0 < out_channels && out_channels < (1 << 26) && 0 < in_channels && in_channels < (1 << 26), name,
                    " must have 1 to 2^26 - 1 channels on both sides, got shape ", tensor.sizes());
  movq::FoldProblem problem;
  problem.out_channels = out_channels;
  problem.in_channels = in_channels;
  problem.dtype = movq::dtype_of(tensor, name);
  return problem;
}

Tensor fold_upsampling(const Tensor& given_weight, bool windows) {
  const c10::cuda::CUDAGuard guard(given_weight.device());
  TORCH_CHECK_VALUE(given_weight.dim() == 4 && given_weight.size(2) == 3 && given_weight.size(3) == 3,
                    "weight must have shape (out, in, 3, 3), got ", given_weight.sizes());
  const int64_t out = given_weight.size(0), in = given_weight.size(1);
  movq::FoldProblem problem = fold_problem(out, in, given_weight, "weight");
  problem.windows = windows;
  problem.channels_last = !given_weight.is_contiguous() && given_weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor weight = problem.channels_last ? given_weight : given_weight.contiguous();
  const Tensor folded = windows ? empty_channels_last({4 * out, in, 2, 2}, weight) : empty_channels_last({in, out, 4, 4}, weight);
  movq::fold_upsampling(problem, weight.const_data_ptr(), folded.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  return folded;
}

Tensor fold_upsampling_backward(const Tensor& given_dfolded, bool channels_last) {
  const c10::cuda::CUDAGuard guard(given_dfolded.device());
  TORCH_CHECK_VALUE(given_dfolded.dim() == 4 && given_dfolded.size(2) == 4 && given_dfolded.size(3) == 4,
                    "dfolded must have shape (in, out, 4, 4), got ", given_dfolded.sizes());
  const int64_t in = given_dfolded.size(0), out = given_dfolded.size(1);
  movq::FoldProblem problem = fold_problem(out, in, given_dfolded, "dfolded");
  problem.channels_last = channels_last;
  const Tensor dfolded = given_dfolded.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor dweight =
      channels_last ? empty_channels_last({out, in, 3, 3}, dfolded) : at::empty({out, in, 3, 3}, dfolded.options());
  movq::fold_upsampling_backward(problem, dfolded.const_data_ptr(), dweight.mutable_data_ptr(),
                                 c10::cuda::getCurrentCUDAStream());
  return dweight;
}

Tensor interleave_windows(const Tensor& given_windows, const std::optional<Tensor>& given_bias) {
  const c10::cuda::CUDAGuard guard(given_windows.device());
  const auto shape = given_windows.sizes();
  TORCH_CHECK_VALUE(shape.size() == 4 && shape[0] > 0 && shape[1] > 0 && shape[1] % 4 == 0 && shape[2] > 1 && shape[3] > 1,
                    "windows must have shape (batch, 4 * channels, height + 1, width + 1) and not be empty, got ", shape);
  movq::InterleaveProblem problem;
  problem.batch = shape[0];
  problem.channels = shape[1] / 4;
  problem.height = shape[2] - 1;
  problem.width = shape[3] - 1;
  problem.dtype = movq::dtype_of(given_windows, "windows");
  TORCH_CHECK_VALUE(shape[1] <= INT32_MAX / shape[3] && shape[0] <= 65535 && problem.height <= 32767,
                    "windows must have fewer than 2^31 elements per row, at most 65535 images and at most 32768 rows, got shape ",
                    shape);
  const Tensor windows = given_windows.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor out = empty_channels_last({problem.batch, problem.channels, 2 * problem.height, 2 * problem.width}, windows);
  Tensor bias;
  if (given_bias) {
    movq::check_channel_parameter("bias", *given_bias, "the upsampled map", out);
    bias = given_bias->contiguous();
    problem.bias_dtype = movq::dtype_of(bias, "bias");
  }
  movq::interleave_windows(problem, windows.const_data_ptr(), movq::read_pointer(bias), out.mutable_data_ptr(),
                           c10::cuda::getCurrentCUDAStream());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(movq_ext, CUDA, m) {
  m.impl("fold_upsampling", &fold_upsampling);
  m.impl("fold_upsampling_backward", &fold_upsampling_backward);
  m.impl("interleave_windows", &interleave_windows);
}
