// SpatialNorm forward in three kernels: the statistics of chunks of f, their merge per (image, group), and the output.
//
// The merge writes one scale and one shift per channel, with the mean, rstd, weight, bias and f_bias in them. So the output is
// two multiply-adds per value, silu((f * scale + shift) * up(zq_y) + up(zq_b)). The shift is rounded to float32: where a group's
// mean is m standard deviations from 0, its values are shifted by up to m * 2^-24, as in torch's GroupNorm on a GPU.
// Bytes: f is read twice and written once. Each chunk adds 16 bytes of statistics per group, which is less than 2% of all bytes
// where there is work for 256 blocks of 4 rounds.
// Why not read f once and keep it on chip, in a cluster or a cooperative grid? Up to the size of L2 (50 MB on an H100;
// 256x256x256 in bfloat16 is 34 MB) the second read comes from the cache anyway, because the output kernel runs its blocks
// backwards and so starts with what the statistics kernel read last. The largest maps do not fit on chip: one group of
// 128x1024x1024 is 8 MB, a cluster of 8 blocks holds 1.8 MB. Only batches of medium maps lie in between.
// Blocks: statistics cuts (image, group), the output cuts (image, channels), into at most 32 and 16 rounds of 256 accesses of 16
// bytes, and fewer where that would leave fewer than 256 and 1024 blocks. For 512x32x32 in bfloat16 that is 256 blocks per pass
// at batch 1, for 128x1024x1024 thousands, although there are only 32 groups.
// f_bias costs neither a pass nor an addition per value: it shifts a channel's mean and leaves its m2 alone, and the coefficients
// take mean - bias. In NCHW the partial statistics are then per channel rather than per group: 0.5% of all bytes for maps
// of 32x32 in bfloat16.
// Registers: at most 80 (__launch_bounds__), for 3 blocks of 256 threads per multiprocessor. Each thread has 4 (statistics) or 2
// (output) loads of 16 bytes in flight, 24 to 48 KB per multiprocessor. An H100 needs about 20 KB to cover its memory latency at
// full bandwidth. benchmarks/results/resources.md lists what the compiler allocates.
#include "spatial_norm_plan.h"
#include "spatial_norm_statistics.cuh"

namespace movq {
namespace spatial_norm {
namespace {

// Normalisation and affine parameters of one channel of one image: n * weight + bias = f * scale + shift.
struct Coefficients { float scale, shift; };

MOVQ_DEVICE void store_coefficients(float* to, int64_t index, const Coefficients& coefficients) {
  store_vec(to + 2 * index, Vec<float, 2>{{coefficients.scale, coefficients.shift}});
}

// Those of N adjacent channels, in accesses of up to 16 bytes.
template <int N>
MOVQ_DEVICE void load_coefficients(const float* from, int64_t index, Coefficients (&coefficients)[N]) {
  constexpr int kPairs = N > 1 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < N; i += kPairs) {
    const auto values = load_vec<2 * kPairs>(from + 2 * (index + i));
#pragma unroll
    for (int k = 0; k < kPairs; ++k) coefficients[i + k] = {values[2 * k], values[2 * k + 1]};
  }
}

template <class T>
struct MergeArrays {
  const float* partial;  // [batch][group][part][4]
  const void *weight, *bias, *f_bias;
  float *mean, *rstd;
  float* coefficients;  // [batch][channel][2]
};

// One block merges the partial moments of one (image, group), always in the same order, and writes the coefficients of its
// channels.
template <class T>
__global__ void __launch_bounds__(kThreads) merge_statistics(Geometry geometry, int parts, float eps, MergeArrays<T> arrays) {
  const int64_t image_group = blockIdx.x;
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
  const int first_channel = int(blockIdx.x % unsigned(geometry.groups)) * geometry.group_channels;
  for (int i = threadIdx.x; i < geometry.group_channels; i += blockDim.x) {
    const int channel = first_channel + i;
    const float scale = rstd * load_parameter<T>(arrays.weight, channel, geometry.float_params, 1);
    const float centre = moments.mean - load_parameter<T>(arrays.f_bias, channel, geometry.float_f_bias, 0);
    const float shift = fmaf(-centre, scale, load_parameter<T>(arrays.bias, channel, geometry.float_params, 0));
    store_coefficients(arrays.coefficients, image_group * geometry.group_channels + i, {scale, shift});
  }
}

template <class T>
struct OutputArrays {
  const T *f, *zq_y, *zq_b;
  const float* coefficients;
  T* out;
};

template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 3) modulate(Geometry geometry, Tiling tiling, OutputArrays<T> arrays) {
  using Thread = ThreadTile<VecSize, ChannelsLast>;
  constexpr int kLoadsInFlight = 2;
  const Thread thread(geometry, tiling, gridDim.x - 1 - int64_t(blockIdx.x));  // backwards, see the head of this file
  if (thread.idle) return;

  Coefficients coefficients[Thread::kChannels];
  load_coefficients(arrays.coefficients, thread.image * geometry.channels + thread.channel, coefficients);
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
        const Coefficients& channel = coefficients[ChannelsLast ? i : 0];
        const float normalized = fmaf(to_float(values[ahead][i]), channel.scale, channel.shift);
        const float modulated = fmaf(normalized, y[i], b[i]);
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

// The workspace: [batch][group][part][4] partial moments, then [batch][channel][2] coefficients.
size_t spatial_norm_forward_workspace(const SpatialNormProblem& problem, const SpatialNormForward& tensors) {
  using namespace spatial_norm;
  const Geometry geometry = make_geometry(problem);
  const int vec_size = forward_vec_size(problem, geometry, tensors);
  const int64_t moments = geometry.batch * partial_moments(problem, geometry, vec_size, tensors.f_bias);
  return sizeof(float) * (4 * moments + 2 * geometry.batch * geometry.channels);
}

void spatial_norm_forward(const SpatialNormProblem& problem, const SpatialNormForward& tensors, cudaStream_t stream) {
  using namespace spatial_norm;
  const Geometry geometry = make_geometry(problem);
  const int vec_size = forward_vec_size(problem, geometry, tensors);
  const int64_t moments = partial_moments(problem, geometry, vec_size, tensors.f_bias);
  const int parts = int(moments / geometry.groups);
  float* partial = static_cast<float*>(tensors.workspace);
  float* coefficients = partial + 4 * geometry.batch * moments;
  const Tiling tiling = make_tiling(geometry, vec_size, problem.channels_last);
  dispatch(problem, vec_size, [&](auto type, auto vec_size_constant, auto channels_last) {
    using T = typename decltype(type)::type;
    constexpr int VecSize = decltype(vec_size_constant)::value;
    constexpr bool ChannelsLast = decltype(channels_last)::value;
    launch_statistics<T, VecSize>(problem, geometry, tensors, stream);
    const unsigned threads = std::min(kThreads, round_up(std::max(parts, geometry.group_channels), kWarpSize));
    const LaunchConfig merge_config = {grid_size("spatial_norm merge_statistics", geometry.batch * geometry.groups), threads,
                                       threads / kWarpSize * sizeof(Moments)};
    const MergeArrays<T> merge_arrays = {partial,      tensors.weight, tensors.bias, tensors.f_bias,
                                         tensors.mean, tensors.rstd,   coefficients};
    launch(merge_statistics<T>, "spatial_norm merge_statistics", merge_config, stream, geometry, parts, problem.eps,
           merge_arrays);
    const OutputArrays<T> arrays = {static_cast<const T*>(tensors.f), static_cast<const T*>(tensors.zq_y),
                                    static_cast<const T*>(tensors.zq_b), coefficients, static_cast<T*>(tensors.out)};
    const LaunchConfig output_config = {
        grid_size("spatial_norm modulate", geometry.batch * tiling.channel_tiles * tiling.pixel_chunks),
        unsigned(tiling.threads())};
    launch(modulate<T, VecSize, ChannelsLast>, "spatial_norm modulate", output_config, stream, geometry, tiling, arrays);
  });
}

}  // namespace movq
