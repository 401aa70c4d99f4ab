// SpatialNorm forward in three kernels: the statistics of chunks of f, their merge per (image, group), and the output.
//
// Bytes: f is read twice and written once. Each chunk adds 16 bytes of statistics per group, which is less than 2% of all bytes
// where there is work for 256 blocks of 4 rounds.
// Why not read f once and keep it on chip, in a cluster or a cooperative grid? Up to the size of L2 (50 MB on an H100;
// 256x256x256 in bfloat16 is 34 MB) the second read comes from the cache anyway, because the output kernel runs its blocks
// backwards and so starts with what the statistics kernel read last. The largest maps do not fit on chip: one group of
// 128x1024x1024 is 8 MB, a cluster of 8 blocks holds 1.8 MB. Only batches of medium maps lie in between.
// Blocks: statistics cuts (image, group), the output cuts (image, channels), into at most 32 and 16 rounds of 256 accesses of 16
// bytes, and fewer where that would leave fewer than 256 and 1024 blocks. For 512x32x32 in bfloat16 that is 256 blocks per pass
// at batch 1, for 128x1024x1024 thousands, although there are only 32 groups.
// f_bias costs neither a pass nor an addition per value: it shifts a channel's mean and leaves its m2 alone, and the output
// subtracts mean - bias. In NCHW the partial statistics are then per channel rather than per group: 0.5% of all bytes for maps
// of 32x32 in bfloat16.
// Registers: at most 80 (__launch_bounds__), for 3 blocks of 256 threads per multiprocessor. Each thread has 4 (statistics) or 2
// (output) loads of 16 bytes in flight, 24 to 48 KB per multiprocessor. An H100 needs about 20 KB to cover its memory latency at
// full bandwidth. benchmarks/results/resources.md lists what the compiler allocates.
#include "spatial_norm_plan.h"
#include "spatial_norm_statistics.cuh"

namespace movq {
namespace spatial_norm {
namespace {

// One block merges the partial moments of one (image, group), always in the same order.
__global__ void __launch_bounds__(kThreads)
    merge_statistics(const float* partial, int parts, float eps, float* mean, float* rstd) {
  const int64_t image_group = blockIdx.x;
  Moments moments = {};
  for (int part = threadIdx.x; part < parts; part += blockDim.x) {
    const auto values = load_vec<4>(partial + 4 * (image_group * parts + part));
    moments = merge(moments, {values[0], values[1], values[2]});
  }
  moments = block_reduce(moments, Merge(), Shared<Moments>(0, blockDim.x / kWarpSize));
  if (threadIdx.x == 0) {
    store(mean + image_group, moments.mean);
    store(rstd + image_group, 1.0f / sqrtf(moments.m2 / moments.count + eps));
  }
}

template <class T>
struct ForwardArrays {
  const T *f, *zq_y, *zq_b;
  const void *weight, *bias, *f_bias;
  const float *mean, *rstd;
  T* out;
};

template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 3) modulate(Geometry geometry, Tiling tiling, ForwardArrays<T> arrays) {
  using Thread = ThreadTile<VecSize, ChannelsLast>;
  constexpr int kLoadsInFlight = 2;
  const Thread thread(geometry, tiling, gridDim.x - 1 - int64_t(blockIdx.x));  // backwards, see the head of this file
  if (thread.idle) return;

  float centre[Thread::kChannels], scale[Thread::kChannels], shift[Thread::kChannels];
#pragma unroll
  for (int i = 0; i < Thread::kChannels; ++i) {
    const int channel = thread.channel + i;
    const int64_t group = thread.image * geometry.groups + channel / geometry.group_channels;
    centre[i] = load(arrays.mean + group) - load_parameter<T>(arrays.f_bias, channel, geometry.float_f_bias, 0);
    scale[i] = load(arrays.rstd + group) * load_parameter<T>(arrays.weight, channel, geometry.float_params, 1);
    shift[i] = load_parameter<T>(arrays.bias, channel, geometry.float_params, 0);
  }
  const int64_t first = element_offset<ChannelsLast>(geometry, thread.image, thread.channel, 0, geometry.pixels);
  const int64_t pixel_stride = ChannelsLast ? geometry.channels : 1;
  const T* f = arrays.f + first;
  T* out = arrays.out + first;
  for (int pixel = thread.pixel; pixel < thread.end_pixel; pixel += kLoadsInFlight * thread.pixel_step) {
    Vec<T, VecSize> values[kLoadsInFlight];
#pragma unroll
    for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
      const int at = pixel + ahead * thread.pixel_step;
      if (at < thread.end_pixel) values[ahead] = load_vec<VecSize, Cache::kStream>(f + at * pixel_stride);
    }
#pragma unroll
    for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
      const int at = pixel + ahead * thread.pixel_step;
      if (at >= thread.end_pixel) break;
      Vec<float, VecSize> y, b, results;
      load_modulation<T, VecSize, ChannelsLast>(geometry, arrays.zq_y, arrays.zq_b, thread.image, thread.channel, at, true, y, b);
#pragma unroll
      for (int i = 0; i < VecSize; ++i) {
        const int thread_channel = ChannelsLast ? i : 0;
        const float normalized =
            (to_float(values[ahead][i]) - centre[thread_channel]) * scale[thread_channel] + shift[thread_channel];
        const float modulated = normalized * y[i] + b[i];
        results[i] = geometry.silu ? silu(modulated) : modulated;
      }
      store_vec(out + at * pixel_stride, from_float<T>(results));
    }
  }
}

int forward_vec_size(const SpatialNormProblem& problem, const Geometry& geometry, const SpatialNormForward& tensors) {
  return choose_vec_size(problem, geometry, {tensors.f, tensors.out, tensors.zq_y, tensors.zq_b});
}

// The number of partial moments per image, over all groups.
int64_t partial_moments(const SpatialNormProblem& problem, const Geometry& geometry, int vec_size, bool with_f_bias) {
  if (problem.channels_last) {
    const InterleavedGroups plan = plan_interleaved_groups(geometry, vec_size);
    return int64_t(plan.groups) * plan.chunks;
  }
  const ContiguousGroups plan = plan_contiguous_groups(geometry, vec_size, with_f_bias);
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

size_t spatial_norm_forward_workspace(const SpatialNormProblem& problem, const SpatialNormForward& tensors) {
  using namespace spatial_norm;
  const Geometry geometry = make_geometry(problem);
  const int vec_size = forward_vec_size(problem, geometry, tensors);
  return 4 * sizeof(float) * geometry.batch * partial_moments(problem, geometry, vec_size, tensors.f_bias);
}

void spatial_norm_forward(const SpatialNormProblem& problem, const SpatialNormForward& tensors, cudaStream_t stream) {
  using namespace spatial_norm;
  const Geometry geometry = make_geometry(problem);
  const int vec_size = forward_vec_size(problem, geometry, tensors);
  const int parts = int(partial_moments(problem, geometry, vec_size, tensors.f_bias) / geometry.groups);
  const Tiling tiling = make_tiling(geometry, vec_size, problem.channels_last);
  dispatch(problem, vec_size, [&](auto type, auto vec_size_constant, auto channels_last) {
    using T = typename decltype(type)::type;
    constexpr int VecSize = decltype(vec_size_constant)::value;
    constexpr bool ChannelsLast = decltype(channels_last)::value;
    launch_statistics<T, VecSize>(problem, geometry, tensors, stream);
    const unsigned threads = std::min(kThreads, round_up(parts, kWarpSize));
    const LaunchConfig merge_config = {grid_size("spatial_norm merge_statistics", geometry.batch * geometry.groups), threads,
                                       threads / kWarpSize * sizeof(Moments)};
    launch(merge_statistics, "spatial_norm merge_statistics", merge_config, stream, static_cast<const float*>(tensors.workspace),
           parts, problem.eps, tensors.mean, tensors.rstd);
    const ForwardArrays<T> arrays = {static_cast<const T*>(tensors.f),
                                     static_cast<const T*>(tensors.zq_y),
                                     static_cast<const T*>(tensors.zq_b),
                                     tensors.weight,
                                     tensors.bias,
                                     tensors.f_bias,
                                     tensors.mean,
                                     tensors.rstd,
                                     static_cast<T*>(tensors.out)};
    const LaunchConfig output_config = {
        grid_size("spatial_norm modulate", geometry.batch * tiling.channel_tiles * tiling.pixel_chunks),
        unsigned(tiling.threads())};
    launch(modulate<T, VecSize, ChannelsLast>, "spatial_norm modulate", output_config, stream, geometry, tiling, arrays);
  });
}

}  // namespace movq
