// SpatialNorm forward in three kernels: statistics of chunks of f, their merge per (image, group), and the output.
//
// Bytes: f is read twice and written once. A chunk leaves 16 bytes of statistics per group behind, under 2% of all bytes where
// there is work for 256 blocks of 4 rounds. Why not once, with f kept on chip by a cluster or a cooperative grid: up to the L2
// cache (50 MB on an H100; 256x256x256 in bfloat16 is 34 MB) the second read does not go to memory as it is, since the output's
// blocks run backwards and so begin with what the statistics read last; and the largest maps cannot be kept, for one group of
// 128x1024x1024 is 8 MB and a cluster of 8 blocks holds 1.8 MB. Between the two lie batches of middle-sized maps alone.
// Blocks: the passes cut (image, group) and (image, channels) into up to 32 and 16 rounds of 256 accesses of 16 bytes, fewer
// where that would leave fewer than 256 and 1024 blocks: 512x32x32 in bfloat16 makes 256 blocks per pass at batch 1,
// 128x1024x1024 thousands, against 32 groups.
// A bias of f costs no pass and no addition per value: it moves the mean of a channel's values and leaves their squared distances
// from it alone, and the output subtracts mean - bias. In NCHW this makes part statistics of 16 bytes per channel instead of per
// group, 0.5% of all bytes for maps of 32x32 in bfloat16.
// Registers: at most 80 (__launch_bounds__) keep 3 blocks of 256 threads on a multiprocessor, each thread with 4 (statistics) or
// 2 (output) loads of 16 bytes in flight: 24 to 48 KB, above the latency of memory times the bandwidth (about 20 KB a
// multiprocessor on an H100). See benchmarks/results/resources.md for what the compiler made of it.
#include "spatial_norm_plan.h"

namespace movq {
namespace spatial_norm {
namespace {

// Two blocks a multiprocessor keep 32 KB of loads in flight; more blocks would only leave more part results behind.
constexpr int64_t kStatisticsBlocks = 256;

// A tile (one group in NCHW, or one channel where f has a bias; whole groups side by side in NHWC) of one image as a matrix of
// accesses: `columns` wide, `pitch` elements from row to row, its elements inside [0, extent). In NCHW a group is one run of
// memory, and the matrix is that run folded to the width of a block. A thread keeps to its column, unless the tile is one group
// wider than the block.
struct Statistics {
  int64_t image_stride, tile_stride, extent, pitch, chunk;
  int tiles, chunks;
  int columns, last_columns;  // of a tile, and of the last tile, which may be smaller
  int inner, outer;           // threads along the columns, and rows at once
  int groups, tile_groups;
  int span;          // moments of one group in one row
  int column_pitch;  // of the moments in shared memory, words from column to column
  int depth;
  bool lanes_merge;           // the channels of one access belong to one group
  bool columns_are_channels;  // NHWC: column c holds channels c * V and on of the tile
  bool float_f_bias;
  int threads, shared_bytes;
};

Statistics plan_statistics(Geometry g, int lanes, bool channels_last, bool with_f_bias) {
  if (with_f_bias && !channels_last) {  // tiles of one channel each, whose mean is then moved
    g.groups = g.channels;
    g.depth = 1;
  }
  Statistics s = {};
  s.columns_are_channels = channels_last;
  s.float_f_bias = g.float_f_bias;
  s.groups = g.groups;
  s.depth = g.depth;
  s.image_stride = int64_t(g.channels) * g.pixels;
  if (channels_last) {
    const int unit = group_unit(g, lanes);
    s.tile_groups = std::min(unit * ceil_div(channel_columns(lanes) * lanes, unit * g.depth), g.groups);
    s.tile_stride = s.tile_groups * g.depth;
    s.columns = s.tile_groups * g.depth / lanes;
    s.tiles = ceil_div(g.groups, s.tile_groups);
    s.last_columns = (g.channels - (s.tiles - 1) * int(s.tile_stride)) / lanes;
    s.extent = s.image_stride;
    s.pitch = g.channels;
  } else {
    s.tile_groups = 1;
    s.tiles = g.groups;
    s.extent = s.tile_stride = int64_t(g.depth) * g.pixels;
    s.columns = s.last_columns = int(std::min<int64_t>(s.extent / lanes, kThreads));
    s.pitch = s.columns * lanes;
  }
  const int64_t rows = ceil_div(s.extent, s.pitch);
  s.inner = std::min(s.columns, kThreads);
  s.outer = channels_last ? int(std::min<int64_t>(kThreads / s.inner, rows)) : 1;
  s.lanes_merge = s.tile_groups == 1 || g.depth % lanes == 0;
  s.span = s.lanes_merge ? g.depth / lanes : g.depth;
  s.column_pitch = s.outer + (ceil_div(kWarp, s.inner) - s.outer % kWarp + kWarp) % kWarp;
  const int64_t steps = ceil_div<int64_t>(rows, s.outer), taken = rounds(steps * s.tiles * g.batch, 32, kStatisticsBlocks);
  s.chunk = taken * s.outer * s.pitch;
  s.chunks = int(ceil_div(steps, taken));
  s.threads = ceil_div(s.inner * s.outer, kWarp) * kWarp;
  s.shared_bytes = s.tile_groups == 1 ? s.threads / kWarp * int(sizeof(Moments))
                                      : s.inner * s.column_pitch * int(sizeof(float)) * (1 + 2 * (s.lanes_merge ? 1 : lanes));
  return s;
}

MOVQ_DEVICE void store_moments(float* partial, int64_t at, const Moments& m) {
  store_vec(partial + 4 * at, Vec<float, 4>{{m.mean, m.m2, m.count, 0}});
}

// Writes the moments of every (image, group, chunk) to partial[image][group][chunk]. A group is the plan's: in NCHW one channel
// where f has a bias.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3) statistics(const T* f, const void* f_bias, Statistics s, float* partial) {
  constexpr int kAhead = 4;  // loads in flight
  const int64_t block = blockIdx.x;
  const int tile = block % s.tiles, chunk = block / s.tiles % s.chunks;
  const int64_t image = block / s.tiles / s.chunks;
  const int column = threadIdx.x % s.inner, row = threadIdx.x / s.inner;
  f += image * s.image_stride + tile * s.tile_stride + chunk * s.chunk;
  const int64_t end = min(s.chunk, s.extent - chunk * s.chunk), step = s.outer * s.pitch;
  const int columns = row >= s.outer ? 0 : tile == s.tiles - 1 ? s.last_columns : s.columns;

  // Welford for each of the V elements apart: their counts are one, so the reciprocal is shared.
  float count = 0, mean[V] = {}, m2[V] = {};
  auto move_means = [&](int c, float sign) {  // by the bias of column c
    if (!f_bias || !s.columns_are_channels || count == 0) return;
#pragma unroll
    for (int i = 0; i < V; ++i) mean[i] += sign * parameter<T>(f_bias, tile * int(s.tile_stride) + c * V + i, s.float_f_bias, 0);
  };
  for (int c = column; c < columns; c += s.inner) {
    move_means(c, -1);  // what an earlier column left goes on among values without the bias
    for (int64_t at = row * s.pitch + c * V; at < end; at += kAhead * step) {
      Vec<T, V> x[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (at + u * step < end) x[u] = load_vec<V>(f + at + u * step);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (at + u * step >= end) break;
        count += 1;
        const float share = __fdividef(1.0f, count);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float value = to_float(x[u][i]), delta = value - mean[i];
          mean[i] += delta * share;
          m2[i] += delta * (value - mean[i]);
        }
      }
    }
    move_means(c, 1);
  }

  Moments mine = {mean[0], m2[0], count};
  if (s.lanes_merge) {
#pragma unroll
    for (int i = 1; i < V; ++i) mine = merge(mine, {mean[i], m2[i], count});
  }
  const int64_t first_group = image * s.groups + tile * s.tile_groups;
  if (s.tile_groups == 1) {
    mine = block_reduce(mine, Merge(), Shared<Moments>(0, blockDim.x / kWarp));
    if (threadIdx.x == 0) {
      if (f_bias && !s.columns_are_channels) mine.mean += parameter<T>(f_bias, tile, s.float_f_bias, 0);
      store_moments(partial, first_group * s.chunks + chunk, mine);
    }
    return;
  }

  // Several groups: a warp gathers each from the threads (and of their V elements those) that saw it. A column's rows lie side by
  // side, for the lanes that read them, and columns so far apart that a warp's rows of all of them are in banks of their own.
  const int plane = s.inner * s.column_pitch, place = column * s.column_pitch + row;
  const unsigned size = s.lanes_merge ? plane : V * plane;
  const Shared<float> means(0, size), m2s(means.end(), size), counts(m2s.end(), plane);
  if (row < s.outer) {
    counts.store(place, mine.count);
    means.store(place, mine.mean);
    m2s.store(place, mine.m2);
    if (!s.lanes_merge) {
#pragma unroll
      for (int i = 1; i < V; ++i) {
        means.store(i * plane + place, mean[i]);
        m2s.store(i * plane + place, m2[i]);
      }
    }
  }
  __syncthreads();
  const int groups = min(s.tile_groups, s.groups - tile * s.tile_groups), warps = blockDim.x / kWarp;
  for (int group = warp_id(); group < groups; group += warps) {
    Moments m = {};
    for (int e = lane_id(); e < s.outer * s.span; e += kWarp) {
      const int from = group * s.span + e / s.outer;  // which column, or which channel where those of a column are apart
      const int seen = (s.lanes_merge ? from : from / V) * s.column_pitch + e % s.outer;
      const int slot = seen + (s.lanes_merge ? 0 : from % V * plane);
      m = merge(m, {means.load(slot), m2s.load(slot), counts.load(seen)});
    }
    m = warp_reduce(m, Merge());
    if (lane_id() == 0) store_moments(partial, (first_group + group) * s.chunks + chunk, m);
  }
}

// One block merges the chunks of one (image, group). Always in the same order, whatever order the chunks were finished in.
__global__ void __launch_bounds__(kThreads)
    merge_statistics(const float* partial, int chunks, float eps, float* mean, float* rstd) {
  const int64_t unit = blockIdx.x;
  Moments m = {};
  for (int chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
    const auto part = load_vec<4>(partial + 4 * (unit * chunks + chunk));
    m = merge(m, {part[0], part[1], part[2]});
  }
  m = block_reduce(m, Merge(), Shared<Moments>(0, blockDim.x / kWarp));
  if (threadIdx.x == 0) {
    store(mean + unit, m.mean);
    store(rstd + unit, 1.0f / sqrtf(m.m2 / m.count + eps));
  }
}

template <class T, int V, bool Last>
__global__ void __launch_bounds__(kThreads, 3)
    modulate(Geometry g, Tiling t, const T* f, const T* zq_y, const T* zq_b, const void* weight, const void* bias,
             const void* f_bias, const float* mean, const float* rstd, T* out) {
  using Here = Place<V, Last>;
  constexpr int kAhead = 2;
  const Here here(g, t, gridDim.x - 1 - int64_t(blockIdx.x));
  if (here.idle) return;

  float centre[Here::kChannels], scale[Here::kChannels], shift[Here::kChannels];
#pragma unroll
  for (int i = 0; i < Here::kChannels; ++i) {
    const int channel = here.channel + i;
    const int64_t group = here.image * g.groups + channel / g.depth;
    centre[i] = load(mean + group) - parameter<T>(f_bias, channel, g.float_f_bias, 0);
    scale[i] = load(rstd + group) * parameter<T>(weight, channel, g.float_params, 1);
    shift[i] = parameter<T>(bias, channel, g.float_params, 0);
  }
  const int64_t base = offset<Last>(g, here.image, here.channel, 0, g.pixels);
  const int64_t pixel_stride = Last ? g.channels : 1;
  f += base;
  out += base;
  for (int pixel = here.pixel; pixel < here.last_pixel; pixel += kAhead * here.step) {
    Vec<T, V> x[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int p = pixel + u * here.step;
      if (p < here.last_pixel) x[u] = load_vec<V, Cache::kStream>(f + p * pixel_stride);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int p = pixel + u * here.step;
      if (p >= here.last_pixel) break;
      Vec<float, V> y, b, r;
      modulation<T, V, Last>(g, zq_y, zq_b, here.image, here.channel, p, true, y, b);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int c = Last ? i : 0;
        const float value = ((to_float(x[u][i]) - centre[c]) * scale[c] + shift[c]) * y[i] + b[i];
        r[i] = g.silu ? silu(value) : value;
      }
      store_vec(out + p * pixel_stride, from_float<T>(r));
    }
  }
}

int forward_access(const SpatialNormProblem& p, const Geometry& g, const SpatialNormForward& a) {
  return access(p, g, {a.f, a.out, a.zq_y, a.zq_b});
}

}  // namespace
}  // namespace spatial_norm

size_t spatial_norm_forward_workspace(const SpatialNormProblem& p, const SpatialNormForward& a) {
  using namespace spatial_norm;
  const Geometry g = geometry(p);
  const Statistics s = plan_statistics(g, forward_access(p, g, a), p.channels_last, a.f_bias);
  return 4 * sizeof(float) * g.batch * s.groups * s.chunks;
}

void spatial_norm_forward(const SpatialNormProblem& p, const SpatialNormForward& a, cudaStream_t stream) {
  using namespace spatial_norm;
  const Geometry g = geometry(p);
  const int lanes = forward_access(p, g, a);
  const Statistics s = plan_statistics(g, lanes, p.channels_last, a.f_bias);
  const int parts = s.chunks * (s.groups / g.groups);  // of one group
  const Tiling t = tiling(g, lanes, p.channels_last);
  auto* partial = static_cast<float*>(a.workspace);
  dispatch(p, lanes, [&](auto type, auto v, auto last) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(v)::value;
    constexpr bool Last = decltype(last)::value;
    const Launch first = {grid("spatial_norm statistics", g.batch * s.tiles * s.chunks), unsigned(s.threads),
                          size_t(s.shared_bytes)};
    launch(statistics<T, V>, "spatial_norm statistics", first, stream, static_cast<const T*>(a.f), a.f_bias, s, partial);
    const unsigned threads = std::min(kThreads, ceil_div(parts, kWarp) * kWarp);
    const Launch second = {grid("spatial_norm merge_statistics", g.batch * g.groups), threads, threads / kWarp * sizeof(Moments)};
    launch(merge_statistics, "spatial_norm merge_statistics", second, stream, partial, parts, p.eps, a.mean, a.rstd);
    const Launch third = {grid("spatial_norm modulate", g.batch * t.tiles * t.chunks), unsigned(t.threads())};
    launch(modulate<T, V, Last>, "spatial_norm modulate", third, stream, g, t, static_cast<const T*>(a.f),
           static_cast<const T*>(a.zq_y), static_cast<const T*>(a.zq_b), a.weight, a.bias, a.f_bias, a.mean, a.rstd,
           static_cast<T*>(a.out));
  });
}

}  // namespace movq
