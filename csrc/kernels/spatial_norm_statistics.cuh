// The first pass of SpatialNorm's forward: the moments of every (image, group, chunk of f).
//
// Each layout has its own kernel. In NCHW a group is one run of memory, which blocks cut into chunks (ContiguousGroups). In NHWC
// a block reads some channels of a run of pixels, usually several whole groups side by side (InterleavedGroups).
// spatial_norm_forward.cu states the budget of both.
#pragma once

#include "device/dependent_launch.cuh"
#include "spatial_norm_plan.h"

namespace movq {
namespace spatial_norm {

// Two blocks per multiprocessor keep 32 KB of loads in flight. More blocks would only leave more partial results.
constexpr int64_t kStatisticsTargetBlocks = 256;

// NCHW. With a bias of f the "groups" are single channels: the bias moves a channel's mean, and the merge adds the channels up.
struct ContiguousGroups {
  int64_t group_elements, chunk_elements;
  int groups, chunks;
  int threads;  // that load; the block is rounded up to whole warps
  bool float_f_bias;
  int block_threads() const { return round_up(threads, kWarpSize); }
  int shared_bytes() const { return block_threads() / kWarpSize * int(sizeof(Moments)); }
};

inline ContiguousGroups plan_contiguous_groups(const Geometry& geometry, int vec_size, bool with_f_bias) {
  ContiguousGroups plan = {};
  plan.groups = with_f_bias ? geometry.channels : geometry.groups;
  plan.group_elements = int64_t(with_f_bias ? 1 : geometry.group_channels) * geometry.pixels;
  plan.threads = int(std::min<int64_t>(plan.group_elements / vec_size, kThreads));
  const int64_t step_elements = plan.threads * vec_size, steps = ceil_div(plan.group_elements, step_elements);
  const int64_t rounds = rounds_per_block(steps * plan.groups * geometry.batch, 32, kStatisticsTargetBlocks);
  plan.chunk_elements = rounds * step_elements;
  plan.chunks = int(ceil_div(steps, rounds));
  plan.float_f_bias = geometry.float_f_bias;
  return plan;
}

// NHWC. A tile is a few whole groups. Its accesses form a matrix: a column is one access's channels, a row is one pixel. A thread
// keeps to one column, except where a single group is wider than the block.
struct InterleavedGroups {
  int64_t image_elements, chunk_elements;
  int channels;  // elements from one pixel to the next
  int groups, chunks;
  int tile_groups, tile_channels, tiles;
  int tile_columns, last_tile_columns;  // the last tile may be smaller
  int threads_inner, threads_outer;     // columns x rows
  bool access_in_one_group;             // all channels of an access belong to one group
  int group_columns;                    // columns of a group; its channels if not access_in_one_group
  int column_pitch;                     // floats from one column's moments in shared memory to the next's
  bool float_f_bias;
  int block_threads() const { return round_up(threads_inner * threads_outer, kWarpSize); }
  int shared_bytes(int vec_size) const {
    if (tile_groups == 1) return block_threads() / kWarpSize * int(sizeof(Moments));
    return threads_inner * column_pitch * int(sizeof(float)) * (1 + 2 * (access_in_one_group ? 1 : vec_size));
  }
};

// The distance between columns of `rows` floats at which a warp, whose threads run across the columns first, collides least in
// the banks. It adds to a column at most the rows of a warp, so that any number of groups fits in the 48 KB that every GPU has.
inline int choose_column_pitch(int columns, int rows) {
  const int lanes = std::min(columns * rows, kWarpSize);
  int best = rows, fewest = kWarpSize;
  for (int pitch = rows; pitch <= rows + ceil_div(kWarpSize, columns); ++pitch) {
    uint32_t used = 0;
    int collisions = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      const uint32_t bank = uint32_t(1) << ((lane % columns * pitch + lane / columns) % kWarpSize);
      collisions += (used & bank) != 0;
      used |= bank;
    }
    if (collisions < fewest) best = pitch, fewest = collisions;
    if (fewest == 0) break;
  }
  return best;
}

inline InterleavedGroups plan_interleaved_groups(const Geometry& geometry, int vec_size) {
  InterleavedGroups plan = {};
  plan.groups = geometry.groups;
  plan.channels = geometry.channels;
  plan.image_elements = int64_t(geometry.channels) * geometry.pixels;
  const int unit = groups_per_access(geometry, vec_size);
  const int wanted = unit * ceil_div(channel_threads(vec_size) * vec_size, unit * geometry.group_channels);
  plan.tile_groups = std::min(wanted, geometry.groups);
  plan.tile_channels = plan.tile_groups * geometry.group_channels;
  plan.tile_columns = plan.tile_channels / vec_size;
  plan.tiles = ceil_div(geometry.groups, plan.tile_groups);
  plan.last_tile_columns = (geometry.channels - (plan.tiles - 1) * plan.tile_channels) / vec_size;
  plan.threads_inner = std::min(plan.tile_columns, kThreads);
  plan.threads_outer = std::min(kThreads / plan.threads_inner, geometry.pixels);
  plan.access_in_one_group = plan.tile_groups == 1 || geometry.group_channels % vec_size == 0;
  plan.group_columns = plan.access_in_one_group ? geometry.group_channels / vec_size : geometry.group_channels;
  plan.column_pitch = choose_column_pitch(plan.threads_inner, plan.threads_outer);
  const int64_t steps = ceil_div(geometry.pixels, plan.threads_outer);
  const int64_t rounds = rounds_per_block(steps * plan.tiles * geometry.batch, 32, kStatisticsTargetBlocks);
  plan.chunk_elements = rounds * plan.threads_outer * plan.channels;
  plan.chunks = int(ceil_div(steps, rounds));
  plan.float_f_bias = geometry.float_f_bias;
  return plan;
}

// Moments of VecSize sequences of the same length, by Welford's update. The shared length costs one reciprocal per access.
template <int VecSize>
struct RunningMoments {
  float count = 0, mean[VecSize] = {}, m2[VecSize] = {};

  // Adds the accesses at first, first + step, ... below end.
  template <class T>
  MOVQ_DEVICE void add(const T* f, int64_t first, int64_t end, int64_t step) {
    constexpr int kLoadsInFlight = 4;
    for (int64_t at = first; at < end; at += kLoadsInFlight * step) {
      Vec<T, VecSize> values[kLoadsInFlight];
#pragma unroll
      for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
        if (at + ahead * step < end) values[ahead] = load_vec<VecSize>(f + at + ahead * step);
      }
#pragma unroll
      for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
        if (at + ahead * step >= end) break;
        add_access(values[ahead]);
      }
    }
  }

  template <class T>
  MOVQ_DEVICE void add_access(const Vec<T, VecSize>& values) {
    count += 1;
    const float weight = __fdividef(1.0f, count);
#pragma unroll
    for (int i = 0; i < VecSize; ++i) {
      const float value = to_float(values[i]), delta = value - mean[i];
      mean[i] += delta * weight;
      m2[i] += delta * (value - mean[i]);
    }
  }

  MOVQ_DEVICE Moments merged() const {
    Moments all = {mean[0], m2[0], count};
#pragma unroll
    for (int i = 1; i < VecSize; ++i) all = merge(all, {mean[i], m2[i], count});
    return all;
  }
};

MOVQ_DEVICE void store_moments(float* partial, int64_t index, const Moments& moments) {
  store_vec(partial + 4 * index, Vec<float, 4>{{moments.mean, moments.m2, moments.count, 0}});
}

// Both kernels write the moments of every (image, group, chunk) to partial[image][group][chunk].

template <class T, int VecSize>
__global__ void __launch_bounds__(kThreads, 3)
    contiguous_statistics(const T* f, const void* f_bias, ContiguousGroups plan, float* partial) {
  allow_next_kernel();
  const int64_t block = blockIdx.x;
  const int group = block % plan.groups, chunk = block / plan.groups % plan.chunks;
  const int64_t image_group = block / plan.groups / plan.chunks * plan.groups + group;
  f += image_group * plan.group_elements + chunk * plan.chunk_elements;
  const int64_t end = min(plan.chunk_elements, plan.group_elements - chunk * plan.chunk_elements);

  RunningMoments<VecSize> running;
  if (int(threadIdx.x) < plan.threads) running.add(f, int(threadIdx.x) * VecSize, end, plan.threads * VecSize);
  Moments moments = block_reduce(running.merged(), Merge(), Shared<Moments>(0, blockDim.x / kWarpSize));
  if (threadIdx.x == 0) {
    if (f_bias) moments.mean += load_parameter<T>(f_bias, group, plan.float_f_bias, 0);
    store_moments(partial, image_group * plan.chunks + chunk, moments);
  }
}

template <class T, int VecSize>
__global__ void __launch_bounds__(kThreads, 3)
    interleaved_statistics(const T* f, const void* f_bias, InterleavedGroups plan, float* partial) {
  allow_next_kernel();
  const int64_t block = blockIdx.x;
  const int tile = block % plan.tiles, chunk = block / plan.tiles % plan.chunks;
  const int64_t image = block / plan.tiles / plan.chunks;
  const int inner = threadIdx.x % plan.threads_inner, row = threadIdx.x / plan.threads_inner;
  const int first_channel = tile * plan.tile_channels;
  f += image * plan.image_elements + chunk * plan.chunk_elements + first_channel;
  const int64_t end = min(plan.chunk_elements, plan.image_elements - chunk * plan.chunk_elements);
  const int columns = row >= plan.threads_outer ? 0 : tile == plan.tiles - 1 ? plan.last_tile_columns : plan.tile_columns;

  RunningMoments<VecSize> running;
  auto shift_means = [&](int column, float sign) {  // by the bias of the column's channels
    if (!f_bias || running.count == 0) return;
#pragma unroll
    for (int i = 0; i < VecSize; ++i) {
      running.mean[i] += sign * load_parameter<T>(f_bias, first_channel + column * VecSize + i, plan.float_f_bias, 0);
    }
  };
  for (int column = inner; column < columns; column += plan.threads_inner) {
    shift_means(column, -1);  // f lacks the bias: take this column's out of the means, and add it again below
    running.add(f, int64_t(row) * plan.channels + column * VecSize, end, int64_t(plan.threads_outer) * plan.channels);
    shift_means(column, 1);
  }

  const int64_t first_group = image * plan.groups + tile * plan.tile_groups;
  Moments moments = {running.mean[0], running.m2[0], running.count};
  if (plan.access_in_one_group) moments = running.merged();
  if (plan.tile_groups == 1) {
    moments = block_reduce(moments, Merge(), Shared<Moments>(0, blockDim.x / kWarpSize));
    if (threadIdx.x == 0) store_moments(partial, first_group * plan.chunks + chunk, moments);
    return;
  }

  // Several groups: threads leave their moments in shared memory, in one plane per channel of an access where those belong to
  // different groups, and a warp gathers each group.
  const int plane = plan.threads_inner * plan.column_pitch, slot = inner * plan.column_pitch + row;
  const unsigned size = plan.access_in_one_group ? plane : VecSize * plane;
  const Shared<float> means(0, size), m2s(means.end(), size), counts(m2s.end(), plane);
  if (row < plan.threads_outer) {
    counts.store(slot, moments.count);
    means.store(slot, moments.mean);
    m2s.store(slot, moments.m2);
    if (!plan.access_in_one_group) {
#pragma unroll
      for (int i = 1; i < VecSize; ++i) {
        means.store(i * plane + slot, running.mean[i]);
        m2s.store(i * plane + slot, running.m2[i]);
      }
    }
  }
  __syncthreads();
  const int groups = min(plan.tile_groups, plan.groups - tile * plan.tile_groups), warps = blockDim.x / kWarpSize;
  for (int group = warp_id(); group < groups; group += warps) {
    Moments total = {};
    for (int entry = lane_id(); entry < plan.group_columns * plan.threads_outer; entry += kWarpSize) {
      const int column = group * plan.group_columns + entry / plan.threads_outer;  // or channel, if not access_in_one_group
      const int from = (plan.access_in_one_group ? column : column / VecSize) * plan.column_pitch + entry % plan.threads_outer;
      const int in_plane = from + (plan.access_in_one_group ? 0 : column % VecSize * plane);
      total = merge(total, {means.load(in_plane), m2s.load(in_plane), counts.load(from)});
    }
    total = warp_reduce(total, Merge());
    if (lane_id() == 0) store_moments(partial, (first_group + group) * plan.chunks + chunk, total);
  }
}

}  // namespace spatial_norm
}  // namespace movq
