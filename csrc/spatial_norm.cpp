// The operators spatial_norm_forward, spatial_norm_into and spatial_norm_backward for CUDA tensors: checks, layout, allocation
// and stream around the launchers. A clip is a map whose rows are the rows of all frames.
#include "kernels/spatial_norm.h"

#include <tuple>

#include "tensors.h"

namespace {

using movq::MemoryFormat;
using movq::OptionalTensor;
using movq::read_pointer;
using movq::ScalarType;
using movq::shape;
using movq::Tensor;
using movq::write_pointer;

// The format for the kernels: f's own if it is dense in NCHW or NHWC, else the one that its order of strides suggests, as
// torch._prims_common.suggest_memory_format does. The other tensors are converted to it.
MemoryFormat format_of(const Tensor& f) {
  if (f.is_contiguous()) return MemoryFormat::Contiguous;
  if (f.stride(1) == 0) return MemoryFormat::Contiguous;
  int64_t smallest = 0;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (f.stride(dim) < smallest) return MemoryFormat::Contiguous;
    smallest = f.stride(dim) * f.size(dim);
  }
  return MemoryFormat::ChannelsLast;
}

// As format_of(), but the batch stride of a single image does not matter. For spatial_norm_into only: where a result is
// allocated, its format must be the one that PyTorch suggests.
MemoryFormat format_of_given_memory(const Tensor& f) {
  const bool is_nhwc = !f.is_contiguous() && movq::is_dense(f, MemoryFormat::ChannelsLast);
  return is_nhwc ? MemoryFormat::ChannelsLast : format_of(f);
}

// How the rows of f and of zq divide into frames.
struct Clip {
  int64_t frames, latent_frames;
  bool split_first_frame;
};

// The arguments of both forward and backward, checked and in f's format.
struct Inputs {
  Tensor f;
  OptionalTensor zq_y, zq_b, weight, bias;
  MemoryFormat format;
  movq::SpatialNormProblem problem;

  Inputs(const Tensor& given_f, const OptionalTensor& given_zq_y, const OptionalTensor& given_zq_b,
         const OptionalTensor& given_weight, const OptionalTensor& given_bias, int64_t groups, double eps, bool silu,
         const Clip& clip, MemoryFormat (*choose_format)(const Tensor&) = format_of) {
    CHECK_ARGUMENT(given_f.dim() == 4 && given_f.numel() > 0, "f must have 4 dimensions and not be empty, got shape ",
                   shape(given_f));
    CHECK_ARGUMENT(groups > 0 && given_f.size(1) % groups == 0,
                   "groups must be a positive divisor of f's channels, got groups=", groups, " for ", given_f.size(1),
                   " channels");
    CHECK_ARGUMENT(given_f.size(1) <= INT32_MAX && given_f.size(2) * given_f.size(3) <= movq::kMaxMapPixels,
                   "f must have fewer than 2^31 channels and at most ", movq::kMaxMapPixels, " pixels, got shape ",
                   shape(given_f));
    CHECK_ARGUMENT(given_zq_y.has_value() == given_zq_b.has_value(),
                   "zq_y and zq_b must be given together or not at all, got only ", given_zq_y ? "zq_y" : "zq_b");
    format = choose_format(given_f);
    f = movq::in_format(given_f, format);
    problem.dtype = movq::dtype_of(f, "f");
    problem.batch = f.size(0);
    problem.channels = f.size(1);
    problem.frames = clip.frames;
    problem.height = rows_of_frame("frames", clip.frames, "f", f);
    problem.width = f.size(3);
    problem.groups = groups;
    problem.channels_last = format == MemoryFormat::ChannelsLast;
    problem.silu = silu;
    problem.eps = static_cast<float>(eps);
    if (given_zq_y) {
      zq_y = checked_zq("zq_y", *given_zq_y);
      zq_b = checked_zq("zq_b", *given_zq_b);
      CHECK_ARGUMENT(zq_y->sizes().equals(zq_b->sizes()), "zq_y and zq_b must have the same shape, got ", shape(*zq_y), " and ",
                     shape(*zq_b));
      problem.zq_frames = clip.latent_frames;
      problem.zq_height = rows_of_frame("latent_frames", clip.latent_frames, "zq_y", *zq_y);
      problem.zq_width = zq_y->size(3);
      problem.split_first_frame = clip.split_first_frame;
    }
    weight = checked_parameter("weight", given_weight);
    bias = checked_parameter("bias", given_bias);
    if (weight && bias) movq::check_dtype("bias", *bias, "weight", *weight);
    problem.param_dtype = weight ? movq::dtype_of(*weight, "weight") : bias ? movq::dtype_of(*bias, "bias") : problem.dtype;
  }

  static int64_t rows_of_frame(const char* argument, int64_t frames, const char* name, const Tensor& x) {
    CHECK_ARGUMENT(frames > 0 && x.size(2) % frames == 0, argument, " must be a positive divisor of ", name, "'s ", x.size(2),
                   " rows, got ", frames);
    return x.size(2) / frames;
  }

  Tensor checked_zq(const char* name, const Tensor& zq) const {
    CHECK_ARGUMENT(zq.dim() == 4 && zq.numel() > 0, name, " must have 4 dimensions and not be empty, got shape ", shape(zq));
    CHECK_ARGUMENT(zq.size(0) == f.size(0) && zq.size(1) == f.size(1), name, " must have f's batch and channels (", f.size(0),
                   ", ", f.size(1), "), got shape ", shape(zq));
    movq::check_device(name, zq, "f", f);
    movq::check_dtype(name, zq, "f", f);
    return movq::in_format(zq, format);
  }

  OptionalTensor checked_parameter(const char* name, const OptionalTensor& parameter) const {
    if (!parameter) return {};
    movq::check_channel_parameter(name, *parameter, "f", f);
    return movq::contiguous_vector(*parameter);
  }
};

void check_statistics(const Tensor& statistics, const Inputs& inputs, bool with_f_bias) {
  const movq::SpatialNormProblem& problem = inputs.problem;
  CHECK_ARGUMENT(statistics.dim() == 4 && statistics.size(0) == problem.batch && statistics.size(1) == problem.groups &&
                     statistics.size(2) > 0 && statistics.size(2) <= INT32_MAX && statistics.size(3) == 4,
                 "statistics must have shape (", problem.batch, ", ", problem.groups, ", parts, 4), got ", shape(statistics));
  CHECK_ARGUMENT(statistics.is_contiguous(), "statistics must be contiguous, got strides ", movq::strides(statistics));
  CHECK_ARGUMENT(statistics.scalar_type() == ScalarType::Float, "statistics must be float32, got ", statistics.scalar_type());
  movq::check_device("statistics", statistics, "f", inputs.f);
  const auto address = reinterpret_cast<uintptr_t>(statistics.const_data_ptr());
  CHECK_ARGUMENT(address % 16 == 0, "statistics must be aligned to 16 bytes, got an address that is ", address % 16,
                 " modulo 16");
  CHECK_ARGUMENT(!with_f_bias, "statistics must not be given with f_bias: they are those of f alone");
}

void check_bordered(const Inputs& inputs) {
  const movq::SpatialNormProblem& problem = inputs.problem;
  auto fits = [](int64_t size, int64_t zq_size) {
    return zq_size > 0 && zq_size % 3 == 0 && size % (zq_size / 3) == 0 && size / (zq_size / 3) > 1;
  };
  CHECK_ARGUMENT(problem.frames == 1 && problem.zq_frames == 1, "bordered zq_y must be an image, got frames=", problem.frames,
                 " and latent_frames=", problem.zq_frames);
  CHECK_ARGUMENT(fits(problem.height, problem.zq_height) && fits(problem.width, problem.zq_width),
                 "bordered zq_y must have three rows and columns for each cell of at least 2x2 of f's ", problem.height, " x ",
                 problem.width, " pixels, got shape ", inputs.zq_y ? shape(*inputs.zq_y) : "none");
}

// Launches the kernels; returns mean and rstd.
std::tuple<Tensor, Tensor> launch_forward(const Inputs& inputs, const OptionalTensor& f_bias, const OptionalTensor& statistics,
                                          const Tensor& out) {
  const movq::SpatialNormProblem& problem = inputs.problem;
  const Tensor mean = movq::empty_contiguous<2>({problem.batch, problem.groups}, aoti_torch_dtype_float32(), inputs.f),
               rstd = movq::empty_like(mean);
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
      .statistics = statistics ? statistics->const_data_ptr<float>() : nullptr,
      .parts = statistics ? statistics->size(2) : 0,
  };
  const size_t bytes = movq::spatial_norm_forward_workspace(problem, arguments);
  const Tensor workspace = movq::allocate_workspace(bytes, inputs.f);
  arguments.workspace = workspace.mutable_data_ptr();
  movq::spatial_norm_forward(problem, arguments, movq::current_stream(inputs.f));
  return {mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& f, const OptionalTensor& zq_y, const OptionalTensor& zq_b,
                                           const OptionalTensor& weight, const OptionalTensor& bias, int64_t groups, double eps,
                                           bool silu, const OptionalTensor& given_f_bias, bool bordered,
                                           const OptionalTensor& statistics, int64_t frames, int64_t latent_frames,
                                           bool split_first_frame) {
  const movq::DeviceGuard guard(f.get_device_index());
  Inputs inputs(f, zq_y, zq_b, weight, bias, groups, eps, silu, {frames, latent_frames, split_first_frame});
  if (bordered) check_bordered(inputs);
  inputs.problem.bordered = bordered;
  const OptionalTensor f_bias = inputs.checked_parameter("f_bias", given_f_bias);
  if (f_bias) inputs.problem.f_bias_dtype = movq::dtype_of(*f_bias, "f_bias");
  if (statistics) check_statistics(*statistics, inputs, f_bias.has_value());
  const Tensor out = movq::empty_like(inputs.f);
  const auto [mean, rstd] = launch_forward(inputs, f_bias, statistics, out);
  return {out, mean, rstd};
}

// Checks `out` and sets its strides in the problem.
void set_output(Inputs& inputs, const Tensor& out) {
  const Tensor& f = inputs.f;
  CHECK_ARGUMENT(out.sizes().equals(f.sizes()), "out must have f's shape ", shape(f), ", got ", shape(out));
  movq::check_device("out", out, "f", f);
  movq::check_dtype("out", out, "f", f);
  const bool channels_last = inputs.format == MemoryFormat::ChannelsLast;
  const int64_t channels = f.size(1), pixels = f.size(2) * f.size(3), pixel = channels_last ? channels : 1;
  auto has_stride = [&](int64_t dim, int64_t stride) { return out.size(dim) == 1 || out.stride(dim) == stride; };
  auto is_apart = [&](int64_t dim, int64_t size) { return out.size(dim) == 1 || out.stride(dim) >= size; };
  CHECK_ARGUMENT(has_stride(3, pixel) && has_stride(2, f.size(3) * pixel) &&
                     (channels_last ? has_stride(1, 1) : is_apart(1, pixels)) &&
                     is_apart(0, channels * (channels_last || channels == 1 ? pixels : out.stride(1))),
                 "out must have f's layout, ", channels_last ? "channels_last" : "NCHW", ", with adjacent rows, got strides ",
                 movq::strides(out), " for shape ", shape(out));
  const bool is_dense = movq::is_dense(out, inputs.format);
  inputs.problem.out_image_stride = is_dense || f.size(0) == 1 ? 0 : out.stride(0);
  inputs.problem.out_channel_stride = is_dense || channels_last || channels == 1 ? 0 : out.stride(1);
  movq::check_overlap("f", f, "out", out);
}

void forward_into(const Tensor& out, const Tensor& f, const OptionalTensor& zq_y, const OptionalTensor& zq_b,
                  const OptionalTensor& weight, const OptionalTensor& bias, int64_t groups, double eps, bool silu, int64_t frames,
                  int64_t latent_frames, bool split_first_frame) {
  const movq::DeviceGuard guard(f.get_device_index());
  Inputs inputs(f, zq_y, zq_b, weight, bias, groups, eps, silu, {frames, latent_frames, split_first_frame},
                format_of_given_memory);
  set_output(inputs, out);
  launch_forward(inputs, {}, {}, out);
}

// The gradient of an argument that was not given is an empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& given_dout, const Tensor& f, const OptionalTensor& zq_y,
                                                            const OptionalTensor& zq_b, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                                            int64_t groups, bool silu, int64_t frames, int64_t latent_frames,
                                                            bool split_first_frame) {
  const movq::DeviceGuard guard(f.get_device_index());
  const Inputs inputs(f, zq_y, zq_b, weight, bias, groups, 0, silu, {frames, latent_frames, split_first_frame});
  CHECK_ARGUMENT(given_dout.sizes().equals(f.sizes()), "dout must have f's shape ", shape(f), ", got ", shape(given_dout));
  movq::check_device("dout", given_dout, "f", f);
  movq::check_dtype("dout", given_dout, "f", f);
  for (const auto& [name, statistic] : {std::pair("mean", &mean), std::pair("rstd", &rstd)}) {
    CHECK_ARGUMENT(statistic->dim() == 2 && statistic->size(0) == f.size(0) && statistic->size(1) == groups, name,
                   " must have the shape (", f.size(0), ", ", groups, ") that forward returned, got ", shape(*statistic));
    CHECK_ARGUMENT(statistic->is_contiguous(), name, " must be contiguous, got strides ", movq::strides(*statistic));
    CHECK_ARGUMENT(statistic->scalar_type() == ScalarType::Float, name, " must be float32, got ", statistic->scalar_type());
    movq::check_device(name, *statistic, "f", f);
  }
  const Tensor dout = movq::in_format(given_dout, inputs.format);
  auto gradient_of = [](const OptionalTensor& x) { return x ? OptionalTensor(movq::empty_like(*x)) : std::nullopt; };
  const Tensor df = movq::empty_like(inputs.f);
  const OptionalTensor dzq_y = gradient_of(inputs.zq_y), dzq_b = gradient_of(inputs.zq_b);
  const OptionalTensor dweight = gradient_of(inputs.weight), dbias = gradient_of(inputs.bias);
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
  movq::spatial_norm_backward(inputs.problem, arguments, movq::current_stream(f));
  auto or_empty = [&](const OptionalTensor& x) { return x ? *x : movq::empty_contiguous<1>({0}, movq::dtype_code(f), f); };
  return {df, or_empty(dzq_y), or_empty(dzq_b), or_empty(dweight), or_empty(dbias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(movq_ext, CUDA, m) {
  m.impl("spatial_norm_forward", TORCH_BOX(&forward));
  m.impl("spatial_norm_into", TORCH_BOX(&forward_into));
  m.impl("spatial_norm_backward", TORCH_BOX(&backward));
}
