// SpatialNorm's forward in one kernel, for maps whose groups fit into the registers of a cluster of 8 blocks.
//
// A cluster takes one (image, group). Each thread loads up to 8 accesses of 16 bytes, all at once, and keeps them: 256 KB per
// cluster, so 8 MB for a map of 32 groups. Blocks merge their moments, then read those of the other blocks from distributed
// shared memory, in a fixed tree. Then each thread writes its rows as in spatial_norm_output.cuh.
// Bytes: f is read once and out is written once; nothing else is written but the statistics. In NHWC a pixel of a group has 2 *
// channels / groups bytes in 16-bit types: from 16 channels a group on, whole sectors. With 8 channels two clusters each request
// one half of every sector of 32 bytes.
// Registers: at most 128, for 2 blocks per multiprocessor: 256 blocks, the 32 groups of one image, run at once on an H100.
// Shared memory: the moments of 8 warps and of the block, 108 bytes.
#pragma once

#include "device/cluster.cuh"
#include "spatial_norm_output.cuh"
#include "spatial_norm_statistics.cuh"

namespace movq {
namespace spatial_norm {

constexpr int kClusterBlocks = 8, kHeldRows = 8;
constexpr int kClusterSharedBytes = (kThreads / kWarpSize + 1) * int(sizeof(Moments));

// The threads of a cluster are cut as those of a block in plan_output(). Returns a plan of more than kHeldRows rows if a group is
// too large.
inline OutputPlan plan_cluster(const SpatialNormProblem& problem, int vec_size) {
  OutputPlan plan = plan_output(problem, vec_size, choose_resize(problem, vec_size));
  const bool nhwc = problem.channels_last;
  const int threads = kClusterBlocks * kThreads, access_pixels = nhwc ? 1 : vec_size;
  const int channels = int(problem.channels / problem.groups) / (nhwc ? vec_size : 1);
  plan.rows = kHeldRows + 1;
  if (channels > threads) return plan;
  const int pixel_threads = threads / channels;
  if (is_flat(problem, vec_size)) {
    // As few rows as hold all pixels, of the same width.
    const int accesses = plan.pixels / access_pixels, rows = ceil_div(accesses, pixel_threads);
    set_width(plan, ceil_div(accesses, rows) * access_pixels, access_pixels, pixel_bytes(problem));
  }
  if (plan.columns > pixel_threads) return plan;
  plan.channel_threads = channels;
  plan.column_threads = plan.columns;
  auto strips = [&](int rows) { return plan.frames * ceil_div(plan.height, rows); };
  plan.rows = 2;
  while (plan.rows <= kHeldRows && strips(plan.rows) > pixel_threads / plan.columns) plan.rows += 2;
  plan.row_threads = strips(plan.rows);
  plan.frame_strips = Divisor(ceil_div(plan.height, plan.rows));
  plan.inner_threads = Divisor(nhwc ? channels : plan.columns);
  plan.middle_threads = Divisor(nhwc ? plan.columns : plan.row_threads);
  return plan;
}

template <class T>
struct ClusterArrays {
  OutputArrays<T> output;
  const void *weight, *bias, *f_bias;
  float *mean, *rstd;
};

MOVQ_DEVICE float broadcast_first(float value) { return __shfl_sync(kAllLanes, value, 0); }

// The moments of the whole cluster, in every thread.
MOVQ_DEVICE Moments cluster_reduce(const Moments& moments) {
  const Shared<Moments> warps(0, kThreads / kWarpSize), block(warps.end(), 1);
  const Moments own = block_reduce(moments, Merge(), warps);
  if (threadIdx.x == 0) block.store(0, own);
  cluster_sync();
  Moments all = {};
  if (lane_id() < kClusterBlocks) all = cluster_load(block, 0, lane_id());
  all = warp_reduce(all, Merge());
  return {broadcast_first(all.mean), broadcast_first(all.m2), broadcast_first(all.count)};
}

template <class T, int VecSize, bool ChannelsLast, Resize resize>
__global__ void __launch_bounds__(kThreads, 2)
    norm_in_cluster(OutputPlan plan, Geometry geometry, float eps, ClusterArrays<T> arrays) {
  const int64_t image_group = blockIdx.x / kClusterBlocks;
  const int64_t image = image_group / geometry.groups;
  const int group = int(image_group - image * geometry.groups);
  const OutputThread<VecSize, ChannelsLast> thread(plan, int(cluster_rank() * kThreads + threadIdx.x), image, group);
  const int rows = thread.idle ? 0 : thread.end_row - thread.row;
  const int first_pixel = thread.row * plan.width + thread.column;
  const int64_t first = rows ? thread.offset(plan, first_pixel) : 0;

  Vec<T, VecSize> f[kHeldRows];
#pragma unroll
  for (int k = 0; k < kHeldRows; ++k) {
    if (k < rows) f[k] = load_vec<VecSize, Cache::kStream>(add_bytes(arrays.output.f + first, k * plan.row_bytes));
  }
  constexpr int kChannels = ChannelsLast ? VecSize : 1;
  float weight[kChannels], bias[kChannels], f_bias[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int channel = rows ? thread.channel + i : 0;
    weight[i] = load_parameter<T>(arrays.weight, channel, geometry.float_params, 1);
    bias[i] = load_parameter<T>(arrays.bias, channel, geometry.float_params, 0);
    f_bias[i] = load_parameter<T>(arrays.f_bias, channel, geometry.float_f_bias, 0);
  }
  RunningMoments<VecSize> running;
#pragma unroll
  for (int k = 0; k < kHeldRows; ++k) {
    if (k < rows) running.add_access(f[k]);
  }
#pragma unroll
  for (int i = 0; i < VecSize; ++i) {
    if (rows) running.mean[i] += f_bias[ChannelsLast ? i : 0];  // a NaN would pass through a merge with a count of 0
  }
  const Moments moments = cluster_reduce(running.merged());
  const float rstd = 1.0f / sqrtf(moments.m2 / moments.count + eps);
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    store(arrays.mean + image_group, moments.mean);
    store(arrays.rstd + image_group, rstd);
  }
  ChannelCoefficients<kChannels> channels;
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
    channels.of[i] = {moments.mean - f_bias[i], plan.pre_scale * rstd * weight[i], scaled_shift(plan.pre_scale, bias[i])};
  if (rows) {
    const int64_t out_first = thread.out_offset(plan, first_pixel);
    CellCoefficients<T, VecSize, ChannelsLast, resize> cell(plan, thread, arrays.output, channels);
#pragma unroll
    for (int k = 0; k < kHeldRows; k += 2) {
      if (k >= rows) break;
      const RowPair<T, VecSize> unit(f[k], f[k + 1], k + 1 < rows);
      T* out = add_bytes(arrays.output.out + out_first, k * plan.row_bytes);
      if constexpr (resize == Resize::kSameGrid) {
        const RowPair<T, VecSize> ys(plan, add_bytes(arrays.output.zq_y + first, k * plan.row_bytes), unit.two);
        const RowPair<T, VecSize> bs(plan, add_bytes(arrays.output.zq_b + first, k * plan.row_bytes), unit.two);
        store_on_same_grid<ChannelsLast>(plan, channels, unit, ys, bs, out);
      } else {
        if (!cell.holds(plan, thread.row + k)) cell.fold(plan, cell.load_row(plan, thread.row + k));
        unit.store(plan, cell, out);
      }
    }
  }
  cluster_sync();  // no block may end while others read its moments
}

}  // namespace spatial_norm
}  // namespace movq
