// SpatialNorm backward: gradients of f, zq_y, zq_b, weight and bias.
//
//   n = (f - mean) * rstd, v = n * w + c, u = v * Y + B, out = act(u), with Y, B the resized zq_y, zq_b, and h = dout * act'(u).
//   Over the pixels of one source cell (where Y is one number):  P = sum h,  Q = sum h n.  Everything else follows from those:
//   dzq_b = P,  dzq_y = w Q + c P,  dbias = sum Y P,  dweight = sum Y Q  (over cells and images),
//   df = rstd * (w Y h - s1 - n s2)  with  s1 = sum w Y P / N,  s2 = sum w Y Q / N  (over the cells and channels of the group).
//
// Kernels: P and Q per cell, which also writes dzq_y and dzq_b and leaves sums of Y P and Y Q per channel and chunk; those sums
// merged into s1, s2 per group; dweight and dbias; df. Every sum has one owner and one order.
// Bytes: f and dout are read twice, df is written once. A chunk leaves 8 bytes per channel, for at least 64 pixels of it where
// there is work for 1024 blocks.
// Without zq a channel is cut into made-up cells of some thousand pixels with Y = 1, B = 0, and nothing is written per cell.
// Three ways through the pixels, by the size of a cell:
//   bands   NCHW, cells narrower than 64: a thread sums a column of pixels over the rows of a cell, 16-byte accesses whatever the
//           ratio; the columns of a cell are then added from shared memory (16 KB).
//   walk    NHWC, cells up to 64 pixels: one thread takes a cell and V channels.
//   share   all else: one block takes a cell.
// Registers: at most 128: 2 blocks of 256 threads on a multiprocessor, each thread with 2 loads of f and 2 of dout in flight (1
// and 1 in the walk and share of 8 channels, and for df beside 2 of zq): 16 to 32 KB.
#include "spatial_norm_plan.h"

namespace movq {
namespace spatial_norm {
namespace {

struct alignas(8) Pair {  // one access to shared memory
  float p, q;             // sums of h and h n, or of those times Y
};
MOVQ_DEVICE Pair operator+(const Pair& a, const Pair& b) { return {a.p + b.p, a.q + b.q}; }

MOVQ_DEVICE void store_pair(float* to, int64_t at, const Pair& v) { store_vec(to + 2 * at, Vec<float, 2>{{v.p, v.q}}); }
MOVQ_DEVICE Pair load_pair(const float* from, int64_t at) {
  const auto v = load_vec<2>(from + 2 * at);
  return {v[0], v[1]};
}

template <class T>
struct Arrays {
  const T *dout, *f, *zq_y, *zq_b;
  const void *weight, *bias;
  const float *mean, *rstd;
  T *df, *dzq_y, *dzq_b;
  float* chunk_sums;    // [batch][chunk][channel] pairs: Y P and Y Q
  float* channel_sums;  // [batch][channel] pairs: those, over chunks
  float* group_sums;    // [batch][group] pairs: s1 and s2
};

struct Normal {
  float mean, rstd;

  template <class T>
  MOVQ_DEVICE void read(const Geometry& g, const Arrays<T>& a, int64_t image, int channel) {
    const int64_t group = image * g.groups + channel / g.depth;
    mean = load(a.mean + group);
    rstd = load(a.rstd + group);
  }
  MOVQ_DEVICE float operator()(float f) const { return (f - mean) * rstd; }
};

// The affine of a channel, and with the modulation of a cell: what goes into the activation is slope * n + level.
struct Affine {
  float slope, level;

  template <class T>
  MOVQ_DEVICE void read(const Geometry& g, const Arrays<T>& a, int channel) {
    slope = parameter<T>(a.weight, channel, g.float_params, 1);
    level = parameter<T>(a.bias, channel, g.float_params, 0);
  }
  MOVQ_DEVICE Affine modulated(float y, float b) const { return {slope * y, level * y + b}; }
};

MOVQ_DEVICE float through_activation(bool silu, float dout, float n, const Affine& to) {
  return silu ? dout * silu_slope(n * to.slope + to.level) : dout;
}

// V channels of a cell are finished: writes its gradients there, and turns P and Q into Y P and Y Q. `first` is its first
// channel's place in zq. Reads the small arrays again rather than keep them in registers over all pixels.
template <class T, int V>
MOVQ_DEVICE void finish_cell(const Geometry& g, const Arrays<T>& a, int channel, int64_t first, Pair (&s)[V]) {
  const Vec<float, V> y = to_float(load_vec<V>(a.zq_y + first));
  Vec<float, V> dy, db;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    Affine affine;
    affine.read(g, a, channel + i);
    dy[i] = affine.slope * s[i].q + affine.level * s[i].p;
    db[i] = s[i].p;
    s[i] = {y[i] * s[i].p, y[i] * s[i].q};
  }
  store_vec(a.dzq_y + first, from_float<T>(dy));
  store_vec(a.dzq_b + first, from_float<T>(db));
}

// --- share and walk

struct Cells {
  int count;  // in an image
  int run;    // cells of one block: 1 when it shares a cell
  int chunks;
  int stretch;  // pixels of a made-up cell
  bool share;
  int inner, outer, tiles;  // threads: channels x pixels (NHWC), pixels x 1 (NCHW)
  MOVQ_HOST_DEVICE int threads() const { return ceil_div(inner * outer, kWarp) * kWarp; }
};

// Pairs from one of a thread's V channels to the next: 16 pairs are all banks once, and V adjacent channels lie in others.
template <int V>
MOVQ_HOST_DEVICE int channel_stride(int threads) {
  return threads + kWarp / 2 / V;
}

template <class T, int V, bool Last>
__global__ void __launch_bounds__(kThreads, 2) sum_cells(Geometry g, Cells cells, Arrays<T> a) {
  constexpr int kChannels = Last ? V : 1;
  constexpr int kAhead = kChannels == 8 ? 1 : 2;  // sums and parameters of 8 channels leave no registers for more
  const int64_t block = blockIdx.x;
  const int tile = block % cells.tiles, chunk = block / cells.tiles % cells.chunks;
  const int64_t image = block / cells.tiles / cells.chunks;
  const int inner = threadIdx.x % cells.inner, outer = threadIdx.x / cells.inner;
  const int first_channel = Last ? tile * cells.inner * V : tile;
  const int channel = first_channel + (Last ? inner * V : 0);
  const bool idle = channel >= g.channels || outer >= cells.outer;
  // Which cells this thread takes, and which pixels of each.
  const int first_cell = chunk * cells.run + (cells.share ? 0 : outer), cell_step = cells.share ? 1 : cells.outer;
  const int first_pixel = !Last ? inner : cells.share ? outer : 0;
  const int pixel_step = !Last ? cells.inner : cells.share ? cells.outer : 1;

  Pair total[kChannels] = {};
  if (!idle) {
    Normal normal[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) normal[i].read(g, a, image, channel + i);
    const int64_t base = offset<Last>(g, image, channel, 0, g.pixels);
    const int64_t pixel_stride = Last ? g.channels : 1;
    for (int cell = first_cell; cell < min((chunk + 1) * cells.run, cells.count); cell += cell_step) {
      int top = 0, bottom = 1, left, right;
      Vec<float, kChannels> y, b = {};
      const int64_t at = offset<Last>(g, image, channel, cell, g.zq_pixels);
      if (g.zq_pixels == 0) {
        left = cell * cells.stretch;
        right = min(left + int64_t(cells.stretch), int64_t(g.width));
#pragma unroll
        for (int i = 0; i < kChannels; ++i) y[i] = 1;
      } else {
        const int row = cell / g.zq_width, column = cell - row * g.zq_width;
        top = first_dst(row, g.rows);
        bottom = first_dst(row + 1, g.rows);
        left = first_dst(column, g.columns);
        right = first_dst(column + 1, g.columns);
        y = to_float(load_vec<kChannels>(a.zq_y + at));
        if (g.silu) b = to_float(load_vec<kChannels>(a.zq_b + at));
      }
      Affine affine[kChannels] = {};
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        if (!g.silu) break;
        affine[i].read(g, a, channel + i);
        affine[i] = affine[i].modulated(y[i], b[i]);
      }
      // Accesses of NCHW start at multiples of V: the first and the last of a row may hold pixels of the neighbours.
      constexpr int kPixels = Last ? 1 : V;
      const int left_access = left / kPixels, width = ceil_div(right, kPixels) - left_access;
      const int accesses = right > left ? (bottom - top) * width : 0;
      Pair sum[kChannels] = {};
      for (int i = first_pixel; i < accesses; i += kAhead * pixel_step) {
        Vec<T, V> x[kAhead], dx[kAhead];
        int columns[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const int access = i + u * pixel_step;
          if (access >= accesses) break;
          const int row = access / width;
          columns[u] = (left_access + access - row * width) * kPixels;
          const int64_t from = base + (int64_t(top + row) * g.width + columns[u]) * pixel_stride;
          x[u] = load_vec<V>(a.f + from);
          dx[u] = load_vec<V>(a.dout + from);
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (i + u * pixel_step >= accesses) break;
#pragma unroll
          for (int e = 0; e < V; ++e) {
            const int c = Last ? e : 0;
            const float n = normal[c](to_float(x[u][e]));
            const float h = through_activation(g.silu, to_float(dx[u][e]), n, affine[c]);
            if (Last || (columns[u] + e >= left && columns[u] + e < right)) sum[c] = sum[c] + Pair{h, h * n};
          }
        }
      }
      if (!cells.share) finish_cell(g, a, channel, at, sum);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) total[i] = total[i] + sum[i];
    }
  }

  // What the block's threads hold of one channel becomes one: of a shared cell P and Q, else Y P and Y Q.
  auto finish = [&](int own, Pair s) {
    Pair one[1] = {s};
    if (cells.share && g.zq_pixels > 0) finish_cell(g, a, own, offset<Last>(g, image, own, chunk, g.zq_pixels), one);
    store_pair(a.chunk_sums, (image * cells.chunks + chunk) * g.channels + own, one[0]);
  };
  if (Last) {
    const int stride = channel_stride<V>(blockDim.x);
    const Shared<Pair> sums(0, V * stride);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sums.store(i * stride + threadIdx.x, total[i]);
    __syncthreads();
    for (int i = threadIdx.x; i < cells.inner * V && first_channel + i < g.channels; i += blockDim.x) {
      Pair s = {};
      for (int row = 0; row < cells.outer; ++row) s = s + sums.load(i % V * stride + row * cells.inner + i / V);
      finish(first_channel + i, s);
    }
  } else {
    const Pair s = block_reduce(total[0], Sum(), Shared<Pair>(0, blockDim.x / kWarp));
    if (threadIdx.x == 0) finish(channel, s);
  }
}

// --- bands

// A band is the pixels of one row of source cells, of `sources` columns of them, in one channel. `outer` bands at once, each
// summed down its rows by `inner` threads.
struct Bands {
  int sources, tiles;
  int inner, outer;
  int run, chunks;  // rows of cells of one block
  int capacity;     // pixels across
  MOVQ_HOST_DEVICE int threads() const { return ceil_div(inner * outer, kWarp) * kWarp; }
};

// Where the sum of a column lies. A thread that has 8 of them stores 4 at a time: every other 4 threads swap their halves, so
// that 8 threads, whose 128 bytes are stored at once, meet all banks.
template <int V>
MOVQ_DEVICE int slot(int column) {
  return V == 8 ? column ^ (column >> 3 & 4) : column;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) sum_bands(Geometry g, Bands bands, Arrays<T> a) {
  constexpr int kAhead = 2;
  const int64_t block = blockIdx.x;
  const int tile = block % bands.tiles, chunk = block / bands.tiles % bands.chunks;
  const int64_t plane = block / bands.tiles / bands.chunks, image = plane / g.channels;
  const int channel = plane - image * g.channels;
  const int inner = threadIdx.x % bands.inner, outer = threadIdx.x / bands.inner;
  const Shared<float> ps(0, bands.outer * bands.capacity), qs(ps.end(), bands.outer * bands.capacity);
  const Shared<Pair> scratch(0, blockDim.x / kWarp);  // in place of ps, when that has been read

  Normal normal;
  normal.read(g, a, image, channel);
  Affine affine;
  affine.read(g, a, channel);
  const int first_source = tile * bands.sources, last_source = min(first_source + bands.sources, g.zq_width);
  const int left = first_dst(first_source, g.columns) / V * V;
  const int right = first_dst(last_source, g.columns);
  const int column = left + inner * V;
  const int64_t base = plane * g.pixels, zq_base = plane * g.zq_pixels;

  Pair total = {};
  const int last_band = min((chunk + 1) * bands.run, g.zq_height);
  for (int first_band = chunk * bands.run; first_band < last_band; first_band += bands.outer) {
    const int band = first_band + outer;
    if (outer < bands.outer && band < last_band && column < right) {
      Vec<float, V> y = {}, b = {}, p = {}, q = {};
      const int top = first_dst(band, g.rows);
      const int bottom = first_dst(band + 1, g.rows);
      if (top < bottom) modulation<T, V, false>(g, a.zq_y, a.zq_b, image, channel, top * g.width + column, g.silu, y, b);
      Affine here[V];
#pragma unroll
      for (int i = 0; i < V; ++i) here[i] = affine.modulated(y[i], b[i]);
      for (int row = top; row < bottom; row += kAhead) {
        Vec<T, V> x[kAhead], dx[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (row + u >= bottom) break;
          const int64_t from = base + int64_t(row + u) * g.width + column;
          x[u] = load_vec<V>(a.f + from);
          dx[u] = load_vec<V>(a.dout + from);
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (row + u >= bottom) break;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float n = normal(to_float(x[u][i]));
            const float h = through_activation(g.silu, to_float(dx[u][i]), n, here[i]);
            p[i] += h;
            q[i] += h * n;
          }
        }
      }
      const int first = outer * bands.capacity + inner * V;
      if constexpr (V > 1) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
          ps.template store_vec<4>(slot<V>(first + i), {{p[i], p[i + 1], p[i + 2], p[i + 3]}});
          qs.template store_vec<4>(slot<V>(first + i), {{q[i], q[i + 1], q[i + 2], q[i + 3]}});
        }
      } else {
        ps.store(first, p[0]);
        qs.store(first, q[0]);
      }
    }
    __syncthreads();
    const int sources = last_source - first_source;
    for (int e = threadIdx.x; e < min(bands.outer, last_band - first_band) * sources; e += blockDim.x) {
      const int within = e / sources, source = first_source + e - within * sources;
      const int begin = first_dst(source, g.columns);
      const int width = first_dst(source + 1, g.columns) - begin;
      const int first = within * bands.capacity + begin - left;
      Pair s[1] = {};
      // Of a warp's cells, as many begin in one bank as the power of two in their width says: those take their columns in turn.
      int at = lane_id() * min(width & -width, kWarp) / kWarp;
#pragma unroll 4
      for (int i = 0; i < width; ++i) {
        s[0] = s[0] + Pair{ps.load(slot<V>(first + at)), qs.load(slot<V>(first + at))};
        at = at + 1 < width ? at + 1 : 0;
      }
      finish_cell(g, a, channel, zq_base + int64_t(first_band + within) * g.zq_width + source, s);
      total = total + s[0];
    }
    __syncthreads();
  }
  total = block_reduce(total, Sum(), scratch);
  if (threadIdx.x == 0) {
    const int64_t part = chunk * int64_t(bands.tiles) + tile;
    store_pair(a.chunk_sums, (image * bands.chunks * bands.tiles + part) * g.channels + channel, total);
  }
}

// --- merging, and df

// One block for one (image, group): adds the chunks of each channel, then the channels.
template <class T>
__global__ void __launch_bounds__(kThreads) merge_sums(Geometry g, int chunks, int inner, Arrays<T> a) {
  const int64_t image = blockIdx.x / g.groups;
  const int first_channel = blockIdx.x % g.groups * g.depth;
  const int outer = blockDim.x / inner;
  const Shared<Pair> sums(0, blockDim.x);
  Pair group = {};
  for (int first = 0; first < g.depth; first += inner) {
    const int channel = first + threadIdx.x % inner, row = threadIdx.x / inner;
    Pair s = {};
    if (channel < g.depth && row < outer) {
      for (int64_t chunk = row; chunk < chunks; chunk += outer) {
        s = s + load_pair(a.chunk_sums, (image * chunks + chunk) * g.channels + first_channel + channel);
      }
    }
    sums.store(threadIdx.x, s);
    __syncthreads();
    if (threadIdx.x < inner && channel < g.depth) {
      for (int r = 1; r < outer; ++r) s = s + sums.load(r * inner + threadIdx.x);
      store_pair(a.channel_sums, image * g.channels + first_channel + channel, s);
      const float w = parameter<T>(a.weight, first_channel + channel, g.float_params, 1);
      group = group + Pair{w * s.p, w * s.q};
    }
    __syncthreads();
  }
  group = block_reduce(group, Sum(), sums.slice(0, blockDim.x / kWarp));
  if (threadIdx.x == 0) {
    const float n = float(g.depth) * float(g.pixels);
    store_pair(a.group_sums, blockIdx.x, {group.p / n, group.q / n});
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    parameter_gradients(Geometry g, const float* channel_sums, void* dweight, void* dbias) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  if (channel >= g.channels) return;
  Pair s = {};
  for (int64_t image = 0; image < g.batch; ++image) s = s + load_pair(channel_sums, image * g.channels + channel);
  auto write = [&](void* to, float value) {
    if (!to) return;
    if (g.float_params) store(static_cast<float*>(to) + channel, value);
    else store(static_cast<T*>(to) + channel, from_float<T>(value));
  };
  write(dweight, s.q);
  write(dbias, s.p);
}

template <class T, int V, bool Last>
__global__ void __launch_bounds__(kThreads, 2) input_gradient(Geometry g, Tiling t, Arrays<T> a) {
  using Here = Place<V, Last>;
  // Backwards over the blocks, to begin with what sum_cells or sum_bands left in the L2 cache.
  const Here here(g, t, gridDim.x - 1 - int64_t(blockIdx.x));
  if (here.idle) return;
  Normal normal[Here::kChannels];
  Affine affine[Here::kChannels];
  Pair mean_of[Here::kChannels];
#pragma unroll
  for (int i = 0; i < Here::kChannels; ++i) {
    normal[i].read(g, a, here.image, here.channel + i);
    affine[i].read(g, a, here.channel + i);
    mean_of[i] = load_pair(a.group_sums, here.image * g.groups + (here.channel + i) / g.depth);
  }
  const int64_t base = offset<Last>(g, here.image, here.channel, 0, g.pixels);
  const int64_t pixel_stride = Last ? g.channels : 1;
  for (int pixel = here.pixel; pixel < here.last_pixel; pixel += here.step) {
    const int64_t at = base + pixel * pixel_stride;
    const Vec<T, V> x = load_vec<V, Cache::kStream>(a.f + at), dx = load_vec<V, Cache::kStream>(a.dout + at);
    Vec<float, V> y = {}, b = {}, r;
    modulation<T, V, Last>(g, a.zq_y, a.zq_b, here.image, here.channel, pixel, g.silu, y, b);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int c = Last ? i : 0;
      const float n = normal[c](to_float(x[i]));
      const Affine to = affine[c].modulated(y[i], b[i]);
      const float h = through_activation(g.silu, to_float(dx[i]), n, to);
      r[i] = normal[c].rstd * (to.slope * h - mean_of[c].p - n * mean_of[c].q);
    }
    store_vec(a.df + at, from_float<T>(r));
  }
}

// --- host

int backward_access(const SpatialNormProblem& p, const Geometry& g, const SpatialNormBackward& a) {
  return access(p, g, {a.dout, a.f, a.df, a.zq_y, a.zq_b, a.dzq_y, a.dzq_b});
}

// The first pass: one of the two kernels, and how many chunks it makes.
struct Plan {
  bool use_bands;
  Bands bands;
  Cells cells;
  int64_t chunks;
};

Plan plan_backward(const Geometry& g, int lanes, bool channels_last) {
  Plan plan = {};
  const int64_t planes = g.batch * g.channels;
  // The widest and highest cell; one more than the ratio rounded up, for float32 rounds.
  const int cell_width = g.zq_pixels ? (g.zq_width == g.width ? 1 : g.width / g.zq_width + 2) : g.width;
  const int cell_height = g.zq_pixels ? (g.zq_height == g.height ? 1 : g.height / g.zq_height + 2) : 1;
  plan.use_bands = g.zq_pixels && !channels_last && cell_width <= 64;
  if (plan.use_bands) {
    Bands& b = plan.bands;
    const int across = kThreads * lanes;
    const bool whole = g.width <= across;
    b.sources = whole ? g.zq_width : (across - 2 * lanes) / cell_width;
    b.tiles = ceil_div(g.zq_width, b.sources);
    b.inner = whole ? g.width / lanes : kThreads;
    b.outer = std::min(kThreads / b.inner, g.zq_height);
    b.capacity = b.inner * lanes;
    const int64_t steps = ceil_div(g.zq_height, b.outer), taken = rounds(planes * b.tiles * steps, 8);
    b.run = int(std::min<int64_t>(taken * b.outer, g.zq_height));
    b.chunks = ceil_div(g.zq_height, b.run);
    plan.chunks = int64_t(b.chunks) * b.tiles;
    return plan;
  }
  Cells& c = plan.cells;
  c.share = !g.zq_pixels || !channels_last || int64_t(cell_width) * cell_height > 100;  // a cell of ratio 8 counts as 10 x 10
  const int slots = channels_last ? g.channels / lanes : 0;
  c.inner = channels_last ? std::min(slots, channel_columns(lanes)) : kThreads;
  c.outer = channels_last ? kThreads / c.inner : 1;
  c.tiles = channels_last ? ceil_div(slots, c.inner) : g.channels;
  c.run = 1;
  c.count = g.zq_pixels;
  if (!g.zq_pixels) {
    const int one_round = channels_last ? c.outer : c.inner * lanes;
    const int64_t steps = ceil_div(g.pixels, one_round), taken = rounds(steps * c.tiles * g.batch, 16);
    c.stretch = int(std::min<int64_t>(taken * one_round, ceil_div(g.pixels, lanes) * int64_t(lanes)));
    c.count = ceil_div(g.pixels, c.stretch);
  } else if (!c.share) {
    c.outer = std::min(c.outer, c.count);
    const int64_t steps = ceil_div(c.count, c.outer), taken = rounds(steps * c.tiles * g.batch, 16);
    c.run = int(std::min<int64_t>(taken * c.outer, c.count));
  }
  plan.chunks = c.chunks = ceil_div(c.count, c.run);
  return plan;
}

}  // namespace
}  // namespace spatial_norm

size_t spatial_norm_backward_workspace(const SpatialNormProblem& p, const SpatialNormBackward& a) {
  using namespace spatial_norm;
  const Geometry g = geometry(p);
  const Plan plan = plan_backward(g, backward_access(p, g, a), p.channels_last);
  return 2 * sizeof(float) * g.batch * (g.channels * (plan.chunks + 1) + g.groups);
}

void spatial_norm_backward(const SpatialNormProblem& p, const SpatialNormBackward& a, cudaStream_t stream) {
  using namespace spatial_norm;
  const Geometry g = geometry(p);
  const int lanes = backward_access(p, g, a);
  const Plan plan = plan_backward(g, lanes, p.channels_last);
  const Tiling t = tiling(g, lanes, p.channels_last);
  dispatch(p, lanes, [&](auto type, auto v, auto last) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(v)::value;
    constexpr bool Last = decltype(last)::value;
    // clang-format off
    Arrays<T> arrays = {static_cast<const T*>(a.dout), static_cast<const T*>(a.f), static_cast<const T*>(a.zq_y),
                        static_cast<const T*>(a.zq_b), a.weight, a.bias, a.mean, a.rstd, static_cast<T*>(a.df),
                        static_cast<T*>(a.dzq_y), static_cast<T*>(a.dzq_b)};
    // clang-format on
    arrays.chunk_sums = static_cast<float*>(a.workspace);
    arrays.channel_sums = arrays.chunk_sums + 2 * g.batch * plan.chunks * g.channels;
    arrays.group_sums = arrays.channel_sums + 2 * g.batch * g.channels;

    if (plan.use_bands) {
      const Bands& b = plan.bands;
      const size_t shared = std::max<size_t>(2 * sizeof(float) * b.outer * b.capacity, b.threads() / kWarp * sizeof(Pair));
      const Launch how = {grid("spatial_norm sum_bands", g.batch * g.channels * plan.chunks), unsigned(b.threads()), shared};
      launch(sum_bands<T, V>, "spatial_norm sum_bands", how, stream, g, b, arrays);
    } else {
      const Cells& c = plan.cells;
      const size_t shared = sizeof(Pair) * (Last ? V * channel_stride<V>(c.threads()) : c.threads() / kWarp);
      const Launch how = {grid("spatial_norm sum_cells", g.batch * c.tiles * c.chunks), unsigned(c.threads()), shared};
      launch(sum_cells<T, V, Last>, "spatial_norm sum_cells", how, stream, g, c, arrays);
    }
    const int inner = std::min(g.depth, kThreads);
    const Launch merge = {grid("spatial_norm merge_sums", g.batch * g.groups), kThreads, kThreads * sizeof(Pair)};
    launch(merge_sums<T>, "spatial_norm merge_sums", merge, stream, g, int(plan.chunks), inner, arrays);
    if (a.dweight || a.dbias) {
      const Launch channels = {unsigned(ceil_div(g.channels, kThreads)), kThreads};
      launch(parameter_gradients<T>, "spatial_norm parameter_gradients", channels, stream, g, arrays.channel_sums, a.dweight,
             a.dbias);
    }
    const Launch pixels = {grid("spatial_norm input_gradient", g.batch * t.tiles * t.chunks), unsigned(t.threads())};
    launch(input_gradient<T, V, Last>, "spatial_norm input_gradient", pixels, stream, g, t, arrays);
  });
}

}  // namespace movq
