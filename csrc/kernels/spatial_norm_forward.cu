// SpatialNorm forward, in three kernels: the statistics of chunks of f, their merge per (image, group), and the output
// (spatial_norm_output.cuh).
//
// Where the kernel that wrote f left statistics of its chunks (chunk_statistics.cuh), the first of the three does not run, and f
// is read once.
//
// The merge writes a centre, a scale and a shift per channel, with the mean, rstd, weight, bias and f_bias in them.
// Bytes: f is read twice and written once. Each chunk adds 16 bytes of statistics per group, which is less
// than 2% of all bytes where there is work for 256 blocks of 4 rounds.
// Up to the size of L2 (50 MB on an H100; 256x256x256 in bfloat16 is 34 MB) the second read comes from the cache, because the
// output kernel runs its blocks backwards and so starts with what the statistics kernel read last.
// Blocks: statistics cuts (image, group), the output cuts (image, channels), into at most 32 and 16 rounds of 256 accesses of 16
// bytes, and fewer where that would leave fewer than 256 and 512 blocks. For 512x32x32 in bfloat16 that is 256 blocks per pass at
// batch 1, for 128x1024x1024 thousands, although there are only 32 groups.
// f_bias costs neither a pass nor an addition per value: it shifts a channel's mean and leaves its m2 alone, and the coefficients
// take mean - bias. In NCHW the partial statistics are then per channel rather than per group: 0.5% of all bytes for maps
// of 32x32 in bfloat16.
// The output, and the merge unless it comes first, are dependent launches (device/dependent_launch.cuh): from sm_90 on, their
// blocks can start before the previous kernel ends. Each merge thread loads its first channel's parameters before it waits.
// Registers: at most 80 (__launch_bounds__), for 3 blocks of 256 threads per multiprocessor. Each thread has 4 (statistics), 2
// (output) or 4 (output of large maps in NHWC with even cells) loads of 16 bytes in flight, 24 to 48 KB per multiprocessor. An
// H100 needs about 20 KB to cover its memory latency at full bandwidth. benchmarks/results/resources.md lists what the compiler
// allocates.
#include "device/dependent_launch.cuh"
#include "spatial_norm_output.cuh"
#include "spatial_norm_statistics.cuh"

namespace movq {
namespace spatial_norm {
namespace {

template <class T>
struct MergeArrays {
  const float* partial;  // [batch][group][part][4]
  const void *weight, *bias, *f_bias;
  float *mean, *rstd;
  float* coefficients;  // [batch][channel][4]
};

struct ChannelParameters { float weight, bias, f_bias; };

template <class T>
MOVQ_DEVICE ChannelParameters load_parameters(const Geometry& geometry, const MergeArrays<T>& arrays, int channel) {
  return {load_parameter<T>(arrays.weight, channel, geometry.float_params, 1),
          load_parameter<T>(arrays.bias, channel, geometry.float_params, 0),
          load_parameter<T>(arrays.f_bias, channel, geometry.float_f_bias, 0)};
}

// One block merges the partial moments of one (image, group), always in the same order, and writes the coefficients of its
// channels.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_statistics(Geometry geometry, int parts, float eps, float pre_scale, MergeArrays<T> arrays) {
  allow_next_kernel();
  const int64_t image_group = blockIdx.x;
  const int first_channel = int(blockIdx.x % unsigned(geometry.groups)) * geometry.group_channels;
  ChannelParameters parameters = {};  // of this thread's channel
  if (int(threadIdx.x) < geometry.group_channels) parameters = load_parameters(geometry, arrays, first_channel + threadIdx.x);
  wait_for_previous_kernel();
  Moments moments = {};
  for (int part = threadIdx.x; part < parts; part += blockDim.x) {
    const auto values = load_vec<4>(arrays.partial + 4 * (image_group * parts + part));
    moments = merge(moments, {values[0], values[1], values[2]});
  }
  moments = block_reduce(moments, Merge(), Shared<Moments>(0, blockDim.x / kWarpSize));
  const float rstd = 1.0f / sqrtf(moments.m2 / moments.count + eps);
  if (threadIdx.x == 0) {
    store(arrays.mean + image_group, moments.mean);
    store(arrays.rstd + image_group, rstd);
  }
  for (int i = threadIdx.x; i < geometry.group_channels; i += blockDim.x) {
    if (i >= int(blockDim.x)) parameters = load_parameters(geometry, arrays, first_channel + i);
    store_coefficients(
        arrays.coefficients, image_group * geometry.group_channels + i,
        {moments.mean - parameters.f_bias, pre_scale * rstd * parameters.weight, scaled_shift(pre_scale, parameters.bias)});
  }
}

int forward_vec_size(const SpatialNormProblem& problem, const Geometry& geometry, const SpatialNormForward& tensors) {
  const int vec_size = choose_vec_size(problem, geometry, {tensors.f, tensors.out, tensors.zq_y, tensors.zq_b});
  return problem.out_image_stride % vec_size || problem.out_channel_stride % vec_size ? 1 : vec_size;
}

// The number of partial moments per image in the workspace, over all groups.
int64_t partial_moments(const SpatialNormProblem& problem, const Geometry& geometry, int vec_size,
                        const SpatialNormForward& tensors) {
  if (tensors.statistics) return 0;
  if (problem.channels_last) {
    const InterleavedGroups plan = plan_interleaved_groups(geometry, vec_size);
    return int64_t(plan.groups) * plan.chunks;
  }
  const ContiguousGroups plan = plan_contiguous_groups(geometry, vec_size, tensors.f_bias);
  return int64_t(plan.groups) * plan.chunks;
}

template <class T, int VecSize>
void launch_statistics(const SpatialNormProblem& problem, const Geometry& geometry, const SpatialNormForward& tensors,
                       cudaStream_t stream) {
  const char* name = "spatial_norm statistics";
  auto* f = static_cast<const T*>(tensors.f);
  auto* partial = static_cast<float*>(tensors.workspace);
  if (problem.channels_last) {
    const InterleavedGroups plan = plan_interleaved_groups(geometry, VecSize);
    const LaunchConfig config = {grid_size(name, geometry.batch * plan.tiles * plan.chunks), unsigned(plan.block_threads()),
                                 size_t(plan.shared_bytes(VecSize))};
    launch(interleaved_statistics<T, VecSize>, name, config, stream, f, tensors.f_bias, plan, partial);
  } else {
    const ContiguousGroups plan = plan_contiguous_groups(geometry, VecSize, tensors.f_bias);
    const LaunchConfig config = {grid_size(name, geometry.batch * plan.groups * plan.chunks), unsigned(plan.block_threads()),
                                 size_t(plan.shared_bytes())};
    launch(contiguous_statistics<T, VecSize>, name, config, stream, f, tensors.f_bias, plan, partial);
  }
}

}  // namespace
}  // namespace spatial_norm

// The workspace: [batch][group][part][4] partial moments, unless they are given, then [batch][channel][4] coefficients.
size_t spatial_norm_forward_workspace(const SpatialNormProblem& problem, const SpatialNormForward& tensors) {
  using namespace spatial_norm;
  const Geometry geometry = make_geometry(problem);
  const int vec_size = forward_vec_size(problem, geometry, tensors);
  const int64_t moments = geometry.batch * partial_moments(problem, geometry, vec_size, tensors);
  return 4 * sizeof(float) * (moments + geometry.batch * geometry.channels);
}

void spatial_norm_forward(const SpatialNormProblem& problem, const SpatialNormForward& tensors, cudaStream_t stream) {
  using namespace spatial_norm;
  const Geometry geometry = make_geometry(problem);
  const int vec_size = forward_vec_size(problem, geometry, tensors);
  const int64_t moments = partial_moments(problem, geometry, vec_size, tensors);
  const int parts = int(tensors.statistics ? tensors.parts : moments / geometry.groups);
  float* workspace = static_cast<float*>(tensors.workspace);
  const float* partial = tensors.statistics ? tensors.statistics : workspace;
  float* coefficients = workspace + 4 * geometry.batch * moments;
  const Resize output_resize = choose_output_resize(problem, vec_size);
  const OutputPlan plan = plan_output(problem, vec_size, output_resize);
  dispatch(problem, vec_size, [&](auto type, auto vec_size_constant, auto channels_last) {
    using T = typename decltype(type)::type;
    constexpr int VecSize = decltype(vec_size_constant)::value;
    constexpr bool ChannelsLast = decltype(channels_last)::value;
    const unsigned threads = std::min(kThreads, round_up(std::max(parts, geometry.group_channels), kWarpSize));
    const LaunchConfig merge_config = {grid_size("spatial_norm merge_statistics", geometry.batch * geometry.groups), threads,
                                       threads / kWarpSize * sizeof(Moments)};
    const MergeArrays<T> merge_arrays = {partial,      tensors.weight, tensors.bias, tensors.f_bias,
                                         tensors.mean, tensors.rstd,   coefficients};
    const char* merge = "spatial_norm merge_statistics";
    if (tensors.statistics) {  // the merge is the first of the chain
      launch(merge_statistics<T>, merge, merge_config, stream, geometry, parts, problem.eps, plan.pre_scale, merge_arrays);
    } else {
      launch_statistics<T, VecSize>(problem, geometry, tensors, stream);
      launch_dependent(merge_statistics<T>, merge, merge_config, stream, geometry, parts, problem.eps, plan.pre_scale,
                       merge_arrays);
    }
    const OutputArrays<T> arrays = {static_cast<const T*>(tensors.f), static_cast<const T*>(tensors.zq_y),
                                    static_cast<const T*>(tensors.zq_b), coefficients, static_cast<T*>(tensors.out)};
    const LaunchConfig output_config = {grid_size("spatial_norm modulate", output_blocks(problem, plan)),
                                        unsigned(plan.threads())};
    auto launch_output = [&](auto kernel) {
      launch_dependent(kernel, "spatial_norm modulate", output_config, stream, plan, arrays);
    };
    if constexpr (VecSize > 1) {
      constexpr Resize small_cells = ChannelsLast ? Resize::kColumnPairs : Resize::kSmallCells;
      if (output_resize == small_cells) return launch_output(modulate<T, VecSize, ChannelsLast, small_cells>);
      if (output_resize == Resize::kSameGrid) return launch_output(modulate<T, VecSize, ChannelsLast, Resize::kSameGrid>);
      if (output_resize == Resize::kEvenCells) return launch_output(modulate<T, VecSize, ChannelsLast, Resize::kEvenCells>);
    }
    launch_output(modulate<T, VecSize, ChannelsLast, Resize::kCells>);
  });
}

}  // namespace movq
