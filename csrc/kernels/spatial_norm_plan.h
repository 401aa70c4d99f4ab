// Host side of SpatialNorm: how a problem is cut into blocks. Depends on sizes and alignment alone, never on the device, so
// every GPU adds up in the same order.
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

// About one wave of blocks on the largest GPUs (8 a multiprocessor); below that a block takes the least work it can.
constexpr int64_t kBlocksWanted = 1024;

inline Axis axis(int size, int zq_size, bool bordered) {
  return {size, zq_size, float(zq_size) / float(size), bordered && zq_size != size ? size / (zq_size / 3) : 0};
}

inline Geometry geometry(const SpatialNormProblem& p) {
  Geometry g = {};
  g.batch = p.batch;
  g.channels = int(p.channels);
  g.groups = int(p.groups);
  g.depth = int(p.channels / p.groups);
  g.height = int(p.height);
  g.width = int(p.width);
  g.pixels = int(p.height * p.width);
  g.zq_height = int(p.zq_height);
  g.zq_width = int(p.zq_width);
  g.zq_pixels = int(p.zq_height * p.zq_width);
  if (g.zq_pixels == 0 || (g.zq_height == g.height && g.zq_width == g.width)) {
    g.height = 1;
    g.width = g.pixels;
    g.zq_height = g.zq_pixels ? 1 : 0;
    g.zq_width = g.zq_pixels;
  }
  g.rows = axis(g.height, g.zq_height, p.bordered);
  g.columns = axis(g.width, g.zq_width, p.bordered);
  g.silu = p.silu;
  g.float_params = p.param_dtype == DType::float32;
  g.float_f_bias = p.f_bias_dtype == DType::float32;
  return g;
}

inline bool same_grid(const Geometry& g) { return g.height == 1 && g.zq_pixels == g.pixels; }

// Groups whose channels together are whole accesses, so that a tile of them is.
inline int group_unit(const Geometry& g, int lanes) { return lanes / std::gcd(g.depth, lanes); }

// Elements in one access: 16 bytes of them, or 1.
inline int access(const SpatialNormProblem& p, const Geometry& g, std::initializer_list<const void*> pointers) {
  const int lanes = 16 / bytes(p.dtype);
  for (const void* pointer : pointers) {
    if (!is_aligned(pointer, 16)) return 1;
  }
  if (p.channels_last) {
    const int unit = group_unit(g, lanes);  // the second condition: one thread a column, see Statistics
    return p.channels % lanes == 0 && (unit == 1 || unit * g.depth / lanes <= kThreads) ? lanes : 1;
  }
  return g.width % lanes == 0 ? lanes : 1;
}

// Rounds of work per block: enough to pay for its start, unless that leaves the GPU idle.
inline int64_t rounds(int64_t blocks_of_one_round, int64_t most, int64_t blocks_wanted = kBlocksWanted) {
  return std::clamp<int64_t>(blocks_of_one_round / blocks_wanted, 1, most);
}

// Threads side by side along the channels of NHWC: 128 bytes of one pixel, or 32 single channels. Narrow tiles leave more
// threads for the pixels, and so fewer part results for the same number of blocks.
inline int channel_columns(int lanes) { return lanes > 1 ? 8 : 32; }

inline Tiling tiling(const Geometry& g, int lanes, bool channels_last) {
  Tiling t = {};
  const int pixel_slots = channels_last ? g.pixels : g.pixels / lanes;
  const int channel_slots = channels_last ? g.channels / lanes : g.channels;
  if (channels_last) {
    t.inner = std::min(channel_slots, channel_columns(lanes));
    t.outer = std::min(kThreads / t.inner, pixel_slots);
  } else {
    t.inner = std::min(pixel_slots, kThreads);
    t.outer = std::min(kThreads / t.inner, channel_slots);
  }
  const int channel_threads = channels_last ? t.inner : t.outer, pixel_threads = channels_last ? t.outer : t.inner;
  t.tiles = ceil_div(channel_slots, channel_threads);
  const int64_t steps = ceil_div(pixel_slots, pixel_threads);
  const int64_t taken = rounds(steps * t.tiles * g.batch, 16);
  t.chunks = int(ceil_div(steps, taken));
  t.chunk_pixels = int(std::min<int64_t>(taken * pixel_threads * (channels_last ? 1 : lanes), g.pixels));
  return t;
}

// Calls f(Type<T>, integral_constant<int, V>, bool_constant<Last>).
template <class F>
void dispatch(const SpatialNormProblem& p, int lanes, F&& f) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto with_lanes = [&](auto v) { p.channels_last ? f(type, v, std::true_type()) : f(type, v, std::false_type()); };
    lanes == 1 ? with_lanes(std::integral_constant<int, 1>()) : with_lanes(std::integral_constant<int, 16 / sizeof(T)>());
  });
}

}  // namespace spatial_norm
}  // namespace movq
