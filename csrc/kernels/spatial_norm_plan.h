// Host side of SpatialNorm: how a problem is cut into blocks. The cut depends on sizes and alignment, never on the device, so
// the kernels add in the same order on every GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <type_traits>

#include "device/launch.cuh"
#include "spatial_norm.cuh"
#include "spatial_norm.h"

namespace movq {
namespace spatial_norm {

// About one wave on the largest GPUs, at 8 blocks per multiprocessor. Smaller problems get blocks of the least work instead.
constexpr int64_t kTargetBlocks = 1024;

inline Axis make_axis(int size, int zq_size, bool bordered) {
  return {size, zq_size, float(zq_size) / float(size), bordered && zq_size != size ? size / (zq_size / 3) : 0};
}

inline FrameAxis make_frame_axis(const SpatialNormProblem& problem) {
  const int frames = int(problem.frames), zq_frames = int(problem.zq_frames);
  const int apart = problem.split_first_frame && frames > 1 && zq_frames > 1;
  return {apart, make_axis(frames - apart, zq_frames - apart, false)};
}

// Whether each pixel of f reads its own pixel of zq.
inline bool is_same_grid(const SpatialNormProblem& problem) {
  return problem.zq_frames == problem.frames && problem.zq_height == problem.height && problem.zq_width == problem.width;
}

// Whether pixels look for their source in zq. Otherwise a clip is one row.
inline bool has_rows(const SpatialNormProblem& problem) { return problem.zq_height && !is_same_grid(problem); }

inline Geometry make_geometry(const SpatialNormProblem& problem) {
  Geometry geometry = {};
  geometry.batch = problem.batch;
  geometry.channels = int(problem.channels);
  geometry.groups = int(problem.groups);
  geometry.group_channels = int(problem.channels / problem.groups);
  geometry.pixels = int(problem.pixels());
  geometry.zq_pixels = int(problem.zq_pixels());
  if (has_rows(problem)) {
    geometry.frames = int(problem.frames);
    geometry.height = int(problem.height);
    geometry.width = int(problem.width);
    geometry.zq_frames = int(problem.zq_frames);
    geometry.zq_height = int(problem.zq_height);
    geometry.zq_width = int(problem.zq_width);
    geometry.frame_axis = make_frame_axis(problem);
  } else {
    geometry.frames = geometry.zq_frames = geometry.height = 1;
    geometry.width = geometry.pixels;
    geometry.zq_height = geometry.zq_pixels ? 1 : 0;
    geometry.zq_width = geometry.zq_pixels;
    geometry.frame_axis = {0, make_axis(1, 1, false)};
  }
  geometry.rows = make_axis(geometry.height, geometry.zq_height, problem.bordered);
  geometry.columns = make_axis(geometry.width, geometry.zq_width, problem.bordered);
  geometry.silu = problem.silu;
  geometry.float_params = problem.param_dtype == DType::float32;
  geometry.float_f_bias = problem.f_bias_dtype == DType::float32;
  return geometry;
}

// The fewest groups whose channels are a whole number of accesses in NHWC.
inline int groups_per_access(const Geometry& geometry, int vec_size) {
  return vec_size / std::gcd(geometry.group_channels, vec_size);
}

// Elements of one access: 16 bytes, or one element.
inline int choose_vec_size(const SpatialNormProblem& problem, const Geometry& geometry,
                           std::initializer_list<const void*> pointers) {
  const int wide = 16 / bytes(problem.dtype);
  for (const void* pointer : pointers) {
    if (!is_aligned(pointer, 16)) return 1;
  }
  if (problem.channels_last) {
    const int groups = groups_per_access(geometry, wide);
    // Statistics of several groups side by side need a thread for each column of accesses.
    const bool fits_block = groups == 1 || groups * geometry.group_channels / wide <= kThreads;
    return problem.channels % wide == 0 && fits_block ? wide : 1;
  }
  return geometry.width % wide == 0 ? wide : 1;
}

// Rounds of work per block: enough to amortise its start, unless that leaves the GPU idle.
inline int64_t rounds_per_block(int64_t single_round_blocks, int64_t max_rounds, int64_t target_blocks = kTargetBlocks) {
  return std::clamp<int64_t>(single_round_blocks / target_blocks, 1, max_rounds);
}

// Threads side by side along the channels of NHWC: 128 bytes of one pixel, or 32 single channels. Narrow tiles leave more threads
// for pixels, so the same number of blocks makes fewer partial results.
constexpr int channel_threads(int vec_size) { return vec_size > 1 ? 8 : 32; }

inline Tiling make_tiling(const Geometry& geometry, int vec_size, bool channels_last) {
  Tiling tiling = {};
  const int frame_pixels = geometry.height * geometry.width;
  const int pixel_accesses = channels_last ? frame_pixels : frame_pixels / vec_size;
  const int channel_accesses = channels_last ? geometry.channels / vec_size : geometry.channels;
  if (channels_last) {
    tiling.threads_inner = std::min(channel_accesses, channel_threads(vec_size));
    tiling.threads_outer = std::min(kThreads / tiling.threads_inner, pixel_accesses);
  } else {
    tiling.threads_inner = std::min(pixel_accesses, kThreads);
    tiling.threads_outer = std::min(kThreads / tiling.threads_inner, channel_accesses);
  }
  const int across_channels = channels_last ? tiling.threads_inner : tiling.threads_outer;
  const int across_pixels = channels_last ? tiling.threads_outer : tiling.threads_inner;
  tiling.channel_tiles = ceil_div(channel_accesses, across_channels);
  const int64_t steps = ceil_div(pixel_accesses, across_pixels);
  const int64_t rounds = rounds_per_block(steps * geometry.frames * tiling.channel_tiles * geometry.batch, 16);
  tiling.frame_chunks = int(ceil_div(steps, rounds));
  tiling.pixel_chunks = geometry.frames * tiling.frame_chunks;
  tiling.chunk_pixels = int(std::min<int64_t>(rounds * across_pixels * (channels_last ? 1 : vec_size), frame_pixels));
  return tiling;
}

// Calls function(Type<T>, integral_constant<int, VecSize>, bool_constant<ChannelsLast>).
template <class Function>
void dispatch(const SpatialNormProblem& problem, int vec_size, Function&& function) {
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto with_vec_size = [&](auto constant) {
      problem.channels_last ? function(type, constant, std::true_type()) : function(type, constant, std::false_type());
    };
    if (vec_size == 1) with_vec_size(std::integral_constant<int, 1>());
    else with_vec_size(std::integral_constant<int, 16 / sizeof(T)>());
  });
}

}  // namespace spatial_norm
}  // namespace movq
