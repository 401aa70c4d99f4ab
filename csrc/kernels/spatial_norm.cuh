// What the forward and the backward kernels of SpatialNorm share: the sizes, torch's nearest rule, and which elements a thread
// owns.
//
// In both layouts a thread owns the same channels for as long as it runs and walks over pixels, so whatever depends on the
// channel is read once. An access is V adjacent elements (16 bytes, or 1 element where alignment or sizes forbid more): V pixels
// of one channel in NCHW, V channels of one pixel in NHWC (`Last`: channels last).
#pragma once

#include "device/convert.cuh"
#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/reduce.cuh"

namespace movq {
namespace spatial_norm {

constexpr int kThreads = 256;

// How the positions of f along one side find theirs in zq: by torch's nearest rule or, where zq is bordered, by cells.
struct Axis {
  int size, zq_size;
  float scale;  // zq_size / size
  int cell;     // bordered: positions of f for three of zq, the first, those between and the last; else 0
};

struct Geometry {
  int64_t batch;
  int channels, groups, depth;         // depth: channels per group
  int height, width, pixels;           // (1, pixels) where rows do not matter: without zq, or with one of the same grid
  int zq_height, zq_width, zq_pixels;  // all 0 without zq
  Axis rows, columns;
  bool silu;
  bool float_params;  // weight and bias are float32, else of f's type
  bool float_f_bias;
};

// Blocks are numbered by channel tile (fastest), pixel chunk, image. A block is `inner` x `outer` threads: channels x pixels in
// NHWC, pixels x channels in NCHW, so that neighbours read neighbouring memory.
struct Tiling {
  int inner, outer;
  int tiles, chunks;
  int chunk_pixels;
  MOVQ_HOST_DEVICE int threads() const { return ceil_div(inner * outer, kWarp) * kWarp; }
};

template <int V, bool Last>
struct Place {
  static constexpr int kChannels = Last ? V : 1;  // owned by one thread
  static constexpr int kPixels = Last ? 1 : V;    // in one access
  int64_t image;
  int channel;
  int pixel, last_pixel, step;  // this thread's pixels
  bool idle;

  MOVQ_DEVICE Place(const Geometry& g, const Tiling& t, int64_t block) {
    const int inner = threadIdx.x % t.inner, outer = threadIdx.x / t.inner;
    const int tile = block % t.tiles, chunk = block / t.tiles % t.chunks;
    image = block / t.tiles / t.chunks;
    channel = (tile * (Last ? t.inner : t.outer) + (Last ? inner : outer)) * kChannels;
    pixel = chunk * t.chunk_pixels + (Last ? outer : inner) * kPixels;
    last_pixel = int(min(int64_t(g.pixels), (chunk + 1) * int64_t(t.chunk_pixels)));
    step = (Last ? t.outer : t.inner) * kPixels;
    idle = outer >= t.outer || channel >= g.channels;
  }
};

// Where the element lies in a tensor of f's layout with `pixels` pixels an image.
template <bool Last>
MOVQ_DEVICE int64_t offset(const Geometry& g, int64_t image, int channel, int pixel, int pixels) {
  return Last ? (image * pixels + pixel) * g.channels + channel : (image * g.channels + channel) * pixels + pixel;
}

// torch's nearest rule in float32, as torch computes it; or the rule of bordered cells. Neither ever goes back.
MOVQ_DEVICE int source(int dst, const Axis& a) {
  if (a.cell == 0) return min(int(floorf(__fmul_rn(float(dst), a.scale))), a.zq_size - 1);
  const int cell = unsigned(dst) / unsigned(a.cell), place = dst - cell * a.cell;
  return 3 * cell + (place == 0 ? 0 : place == a.cell - 1 ? 2 : 1);
}

// The first position whose source is not before `src`: source cell i is [first_dst(i), first_dst(i + 1)), which is empty where a
// larger zq is thinned out, or between the borders of a cell of two. Division finds it up to rounding, then the rule decides.
MOVQ_DEVICE int first_dst(int src, const Axis& a) {
  if (src >= a.zq_size) return a.size;
  if (a.zq_size == a.size) return src;
  if (a.cell != 0) {
    const int cell = unsigned(src) / 3u, part = src - 3 * cell;
    return cell * a.cell + (part == 2 ? a.cell - 1 : part);
  }
  int dst = min(int(ceilf(float(src) / a.scale)), a.size);
  while (dst > 0 && source(dst - 1, a) >= src) --dst;
  while (dst < a.size && source(dst, a) < src) ++dst;
  return dst;
}

template <class T>
MOVQ_DEVICE float parameter(const void* p, int channel, bool is_float, float otherwise) {
  if (!p) return otherwise;
  return is_float ? load(static_cast<const float*>(p) + channel) : to_float(load(static_cast<const T*>(p) + channel));
}

// up(zq_y) and up(zq_b) for one access; 1 and 0 without zq. `want_b` spares the second where nobody looks at it.
template <class T, int V, bool Last>
MOVQ_DEVICE void modulation(const Geometry& g, const T* zq_y, const T* zq_b, int64_t image, int channel, int pixel, bool want_b,
                            Vec<float, V>& y, Vec<float, V>& b) {
  if (g.zq_pixels == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = 1, b[i] = 0;
    return;
  }
  const bool same_grid = g.zq_pixels == g.pixels && g.height == 1;
  int row = 0, column = pixel, source_row = 0;
  if (!same_grid) {
    row = unsigned(pixel) / unsigned(g.width);
    column = pixel - row * g.width;
    source_row = source(row, g.rows) * g.zq_width;
  }
  if (Last || same_grid) {
    const int cell = same_grid ? pixel : source_row + source(column, g.columns);
    const int64_t at = offset<Last>(g, image, channel, cell, g.zq_pixels);
    y = to_float(load_vec<V>(zq_y + at));
    if (want_b) b = to_float(load_vec<V>(zq_b + at));
    return;
  }
  const int64_t at = offset<Last>(g, image, channel, source_row, g.zq_pixels);
  int previous = -1;
#pragma unroll
  for (int i = 0; i < V; ++i) {  // adjacent pixels mostly share their source: it is read once
    const int cell = source(column + i, g.columns);
    if (i > 0) y[i] = y[i - 1], b[i] = b[i - 1];
    if (cell != previous) {
      y[i] = to_float(load(zq_y + at + cell));
      if (want_b) b[i] = to_float(load(zq_b + at + cell));
      previous = cell;
    }
  }
}

MOVQ_DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
MOVQ_DEVICE float silu(float x) { return x * sigmoid(x); }
MOVQ_DEVICE float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

}  // namespace spatial_norm
}  // namespace movq
