// SpatialNorm backward: gradients of f, zq_y, zq_b, weight and bias.
//
//   n = (f - mean) * rstd, v = n * w + c, u = v * Y + B, out = act(u), with Y and B the resized zq_y and zq_b.
//   h = dout * act'(u). Over the pixels of one cell, where Y is one number:  P = sum h,  Q = sum h n.  The rest follows:
//   dzq_b = P,  dzq_y = w Q + c P,  dbias = sum Y P,  dweight = sum Y Q  (over cells and images),
//   df = rstd * (w Y h - s1 - n s2)  with  s1 = sum w Y P / N,  s2 = sum w Y Q / N  (over the group's N values).
//
// Four passes. The first sums P and Q per cell, writes dzq_y and dzq_b, and leaves the sums of Y P and Y Q per channel and
// chunk; how depends on the layout and the size of a cell, see spatial_norm_bands.cuh and spatial_norm_cells.cuh. The second
// merges those into s1 and s2. The third adds dweight and dbias, the fourth writes df (spatial_norm_input_gradient.cuh). Each sum
// has one owner and one order, so every run gives the same bits. All but the first are dependent launches.
// Bytes: f and dout are read twice, df is written once. A chunk leaves 8 bytes per channel, for at least 64 pixels where there
// is work for 1024 blocks.
// Registers: at most 128, for 2 blocks of 256 threads per multiprocessor. Each file states the bytes that these keep in flight.
#include "device/dependent_launch.cuh"
#include "spatial_norm_backward.cuh"
#include "spatial_norm_bands.cuh"
#include "spatial_norm_cells.cuh"
#include "spatial_norm_input_gradient.cuh"

namespace movq {
namespace spatial_norm {
namespace {

// One block per (image, group) adds the chunks of each channel, then the channels.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_sums(Geometry geometry, int chunks, int threads_inner, BackwardArrays<T> arrays) {
  allow_next_kernel();
  const int64_t image = blockIdx.x / geometry.groups;
  const int first_channel = blockIdx.x % geometry.groups * geometry.group_channels;
  const int threads_outer = blockDim.x / threads_inner;
  const int inner = threadIdx.x % threads_inner, outer = threadIdx.x / threads_inner;
  const Shared<GradientSums> shared(0, blockDim.x);
  wait_for_previous_kernel();
  GradientSums group_sum = {};
  for (int first = 0; first < geometry.group_channels; first += threads_inner) {
    const int channel = first + inner;
    GradientSums sum = {};
    if (channel < geometry.group_channels && outer < threads_outer) {
      for (int64_t chunk = outer; chunk < chunks; chunk += threads_outer) {
        sum = sum + load_sums(arrays.chunk_sums, (image * chunks + chunk) * geometry.channels + first_channel + channel);
      }
    }
    shared.store(threadIdx.x, sum);
    __syncthreads();
    if (outer == 0 && channel < geometry.group_channels) {
      for (int other = 1; other < threads_outer; ++other) sum = sum + shared.load(other * threads_inner + inner);
      store_sums(arrays.channel_sums, image * geometry.channels + first_channel + channel, sum);
      const float weight = load_parameter<T>(arrays.weight, first_channel + channel, geometry.float_params, 1);
      group_sum = group_sum + GradientSums{weight * sum.p, weight * sum.q};
    }
    __syncthreads();
  }
  group_sum = block_reduce(group_sum, Sum(), Shared<GradientSums>(0, blockDim.x / kWarpSize));
  if (threadIdx.x == 0) {
    const float values = float(geometry.group_channels) * float(geometry.pixels);
    store_sums(arrays.group_sums, blockIdx.x, {group_sum.p / values, group_sum.q / values});
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_parameter_gradients(Geometry geometry, const float* channel_sums, void* dweight, void* dbias) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  if (channel >= geometry.channels) return;
  GradientSums sum = {};
  for (int64_t image = 0; image < geometry.batch; ++image)
    sum = sum + load_sums(channel_sums, image * geometry.channels + channel);
  auto write = [&](void* to, float value) {
    if (!to) return;
    if (geometry.float_params) store(static_cast<float*>(to) + channel, value);
    else store(static_cast<T*>(to) + channel, from_float<T>(value));
  };
  write(dweight, sum.q);
  write(dbias, sum.p);
}

int backward_vec_size(const SpatialNormProblem& problem, const Geometry& geometry, const SpatialNormBackward& tensors) {
  return choose_vec_size(problem, geometry,
                         {tensors.dout, tensors.f, tensors.df, tensors.zq_y, tensors.zq_b, tensors.dzq_y, tensors.dzq_b});
}

// The first pass: which kernel sums P and Q, and the chunks it leaves per image and channel.
struct FirstPass {
  bool use_bands;
  BandPlan bands;
  CellPlan cells;
  int64_t chunks;
};

FirstPass plan_first_pass(const Geometry& geometry, int vec_size, bool channels_last) {
  FirstPass plan = {};
  // A bound: the source rule rounds, so a cell may be one pixel wider than the ratio rounded up.
  const int cell_width = geometry.zq_width == geometry.width ? 1 : geometry.zq_width ? geometry.width / geometry.zq_width + 2 : 0;
  plan.use_bands = geometry.zq_pixels && !channels_last && cell_width <= kMaxBandCellWidth;
  if (plan.use_bands) {
    plan.bands = plan_bands(geometry, vec_size, cell_width);
    plan.chunks = int64_t(plan.bands.chunks) * plan.bands.tiles;
  } else {
    plan.cells = plan_cells(geometry, vec_size, channels_last);
    plan.chunks = plan.cells.chunks;
  }
  return plan;
}

}  // namespace
}  // namespace spatial_norm

size_t spatial_norm_backward_workspace(const SpatialNormProblem& problem, const SpatialNormBackward& tensors) {
  using namespace spatial_norm;
  const Geometry geometry = make_geometry(problem);
  const FirstPass plan = plan_first_pass(geometry, backward_vec_size(problem, geometry, tensors), problem.channels_last);
  return sizeof(GradientSums) * geometry.batch * (geometry.channels * (plan.chunks + 1) + geometry.groups);
}

void spatial_norm_backward(const SpatialNormProblem& problem, const SpatialNormBackward& tensors, cudaStream_t stream) {
  using namespace spatial_norm;
  const Geometry geometry = make_geometry(problem);
  const int vec_size = backward_vec_size(problem, geometry, tensors);
  const FirstPass plan = plan_first_pass(geometry, vec_size, problem.channels_last);
  const Tiling tiling = make_tiling(geometry, vec_size, problem.channels_last);
  dispatch(problem, vec_size, [&](auto type, auto vec_size_constant, auto channels_last) {
    using T = typename decltype(type)::type;
    constexpr int VecSize = decltype(vec_size_constant)::value;
    constexpr bool ChannelsLast = decltype(channels_last)::value;
    BackwardArrays<T> arrays = {};
    arrays.dout = static_cast<const T*>(tensors.dout);
    arrays.f = static_cast<const T*>(tensors.f);
    arrays.zq_y = static_cast<const T*>(tensors.zq_y);
    arrays.zq_b = static_cast<const T*>(tensors.zq_b);
    arrays.weight = tensors.weight;
    arrays.bias = tensors.bias;
    arrays.mean = tensors.mean;
    arrays.rstd = tensors.rstd;
    arrays.df = static_cast<T*>(tensors.df);
    arrays.dzq_y = static_cast<T*>(tensors.dzq_y);
    arrays.dzq_b = static_cast<T*>(tensors.dzq_b);
    arrays.chunk_sums = static_cast<float*>(tensors.workspace);
    arrays.channel_sums = arrays.chunk_sums + 2 * geometry.batch * plan.chunks * geometry.channels;
    arrays.group_sums = arrays.channel_sums + 2 * geometry.batch * geometry.channels;

    if constexpr (!ChannelsLast) {
      if (plan.use_bands) launch_band_sums<T, VecSize>(geometry, plan.bands, arrays, stream);
    }
    if (!plan.use_bands) launch_cell_sums<T, VecSize, ChannelsLast>(geometry, plan.cells, arrays, stream);
    const LaunchConfig merge_config = {grid_size("spatial_norm merge_sums", geometry.batch * geometry.groups), kThreads,
                                       kThreads * sizeof(GradientSums)};
    launch_dependent(merge_sums<T>, "spatial_norm merge_sums", merge_config, stream, geometry, int(plan.chunks),
                     std::min(geometry.group_channels, kThreads), arrays);
    if (tensors.dweight || tensors.dbias) {
      const LaunchConfig channel_config = {unsigned(ceil_div(geometry.channels, kThreads)), kThreads};
      launch_dependent(sum_parameter_gradients<T>, "spatial_norm sum_parameter_gradients", channel_config, stream, geometry,
                       arrays.channel_sums, tensors.dweight, tensors.dbias);
    }
    launch_input_gradient<T, VecSize, ChannelsLast>(geometry, tiling, arrays, stream);
  });
}

}  // namespace movq
