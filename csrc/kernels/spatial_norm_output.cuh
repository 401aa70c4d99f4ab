// The last pass of SpatialNorm's forward: out = act(((f - centre) * scale + shift) * up(zq_y) + up(zq_b)).
//
// A thread takes one access of a row of f and walks down the rows. So its channels and columns stay the same, and where rows have
// the same source in zq, so do scale' = scale * y and shift' = shift * y + b. That leaves (f - centre) * scale' + shift' and the
// activation.
// Rows are taken in units of two where they share a source. All loads of a unit, those of zq included, are issued before one is
// used.
//
// Instructions per 16 bytes, for sm_90, which tests/test_spatial_norm_machine_code.py counts:
//                                            16-bit types   float32
//   two rows that load their cell from zq        103            52
//   further rows of the cell                      77            40
//   zq on f's own grid                           121            56
// so at most 90 where a cell has four rows. A value of 16 bits takes a conversion, a subtraction, a multiply-add, 4 instructions
// for SiLU and half a conversion back; a value of zq a conversion and 2 to fold it.
// An H100 issues 128 instructions and 16 special functions per cycle and multiprocessor (CUDA C++ Programming Guide, "Arithmetic
// Instructions"): enough for 11 and 8 values. At 3.35 TB/s and 1.755 GHz (data sheet) its memory moves 3.6, of 4 bytes each.
#pragma once

#include "device/divisor.cuh"
#include "device/math.cuh"
#include "spatial_norm_plan.h"

namespace movq {
namespace spatial_norm {

// How the pixels of f find theirs in zq. kCells: by source_index(), in any case. kEvenCells: the same, but two rows, and in NCHW
// two columns, share a source. kSameGrid: zq has f's pixels.
enum class Resize { kCells, kEvenCells, kSameGrid };

// How the output is cut. The threads of a block are channels x columns x row strips in NHWC, and columns x row strips x channels
// in NCHW, the fastest first. Blocks are numbered by tile of channels (fastest), columns and row strips, and image.
struct OutputPlan {
  Divisor inner_threads, middle_threads;  // the first two of the three
  Divisor channel_tiles, column_tiles, row_tiles;
  int channel_threads, column_threads, row_threads;
  int rows;  // of a strip: the work of one thread
  int channels, pixels, columns;
  // Where rows do not matter, a row is as wide as the block.
  int width, height, last_width;  // in pixels; the last row may be narrower
  Axis source_rows, source_columns;
  int cell_row_bits, cell_row_mask;  // kEvenCells: a cell has 1 << cell_row_bits rows
  Divisor cell_height, cell_width;   // where zq is bordered
  int zq_width, zq_pixels;
  int64_t row_bytes, zq_row_bytes;  // from one row of f, or of zq, to the next
  float pre_scale;                  // what the coefficients and zq_b are multiplied by, see activation()
  bool silu;
  int threads() const { return round_up(channel_threads * column_threads * row_threads, kWarpSize); }
};

// About one wave on the largest GPUs, at 3 blocks per multiprocessor. Smaller problems get blocks of one row instead.
constexpr int64_t kOutputTargetBlocks = 512;

// SiLU works on v = -log2(e) * u, because 2^v = exp(-u).
constexpr float kSiluScale = -1.4426950408889634f;

inline Resize choose_resize(const SpatialNormProblem& problem, int vec_size) {
  if (vec_size == 1) return Resize::kCells;
  if (problem.zq_height == 0) return Resize::kEvenCells;
  if (problem.zq_height == problem.height && problem.zq_width == problem.width) return Resize::kSameGrid;
  // The nearest rule is exact by a power of two, so all cells have the same size.
  auto is_even = [](int64_t size, int64_t zq_size) {
    const int64_t cell = size / zq_size;
    return cell * zq_size == size && cell > 1 && (cell & (cell - 1)) == 0;
  };
  const bool even_rows = is_even(problem.height, problem.zq_height), even_columns = is_even(problem.width, problem.zq_width);
  return even_rows && (even_columns || problem.channels_last) && !problem.bordered ? Resize::kEvenCells : Resize::kCells;
}

// Whether rows do not matter, because no pixel looks for a source.
inline bool is_flat(const SpatialNormProblem& problem, int vec_size) {
  return problem.zq_height == 0 || choose_resize(problem, vec_size) == Resize::kSameGrid;
}

inline void set_width(OutputPlan& plan, int width, int access_pixels, int64_t pixel_bytes) {
  plan.width = width;
  plan.height = ceil_div(plan.pixels, plan.width);
  plan.last_width = plan.pixels - (plan.height - 1) * plan.width;
  plan.columns = plan.width / access_pixels;
  plan.row_bytes = plan.width * pixel_bytes;
}

// The distance between pixels of a channel.
inline int64_t pixel_bytes(const SpatialNormProblem& problem) {
  return (problem.channels_last ? problem.channels : 1) * bytes(problem.dtype);
}

inline OutputPlan plan_output(const SpatialNormProblem& problem, int vec_size) {
  OutputPlan plan = {};
  const bool nhwc = problem.channels_last;
  const int access_pixels = nhwc ? 1 : vec_size;
  const int channel_accesses = int(problem.channels) / (nhwc ? vec_size : 1);
  plan.channels = int(problem.channels);
  plan.pixels = int(problem.height * problem.width);
  plan.channel_threads = nhwc ? std::min(channel_accesses, channel_threads(vec_size)) : 1;
  // Small maps get half as many threads per block, since each takes two rows at least.
  const int64_t accesses = problem.batch * channel_accesses * plan.pixels / access_pixels;
  const int block_threads = accesses < kOutputTargetBlocks * kThreads ? kThreads / 2 : kThreads;
  const int pixel_threads = block_threads / plan.channel_threads;
  set_width(plan, is_flat(problem, vec_size) ? std::min(plan.pixels, pixel_threads * access_pixels) : int(problem.width),
            access_pixels, pixel_bytes(problem));
  const int column_tiles = ceil_div(plan.columns, pixel_threads);
  plan.column_threads = ceil_div(plan.columns, column_tiles);
  plan.row_threads = std::min(pixel_threads / plan.column_threads, plan.height);
  if (!nhwc) plan.channel_threads = std::min(block_threads / (plan.column_threads * plan.row_threads), plan.channels);
  const int channel_tiles = ceil_div(channel_accesses, plan.channel_threads);

  const int steps = ceil_div(plan.height, plan.row_threads);
  const int64_t blocks = problem.batch * channel_tiles * column_tiles * steps;
  plan.rows = int(rounds_per_block(blocks, 16, kOutputTargetBlocks));
  // Whole units. Where cells are even, so is the height.
  if (choose_resize(problem, vec_size) != Resize::kCells) plan.rows = std::max(2, plan.rows - plan.rows % 2);
  plan.inner_threads = Divisor(nhwc ? plan.channel_threads : plan.column_threads);
  plan.middle_threads = Divisor(nhwc ? plan.column_threads : plan.row_threads);
  plan.channel_tiles = Divisor(channel_tiles);
  plan.column_tiles = Divisor(column_tiles);
  plan.row_tiles = Divisor(ceil_div(steps, plan.rows));

  plan.zq_width = int(problem.zq_width);
  plan.zq_row_bytes = problem.zq_width * pixel_bytes(problem);
  plan.zq_pixels = int(problem.zq_height * problem.zq_width);
  plan.source_rows = make_axis(int(problem.height), int(problem.zq_height), problem.bordered);
  plan.source_columns = make_axis(int(problem.width), int(problem.zq_width), problem.bordered);
  plan.cell_row_bits = 31;  // without zq every source is 0
  while (plan.cell_row_bits > 0 && problem.zq_height > problem.height >> plan.cell_row_bits) --plan.cell_row_bits;
  plan.cell_row_mask = int((int64_t(1) << plan.cell_row_bits) - 1);
  if (plan.source_rows.cell_size) plan.cell_height = Divisor(plan.source_rows.cell_size);
  if (plan.source_columns.cell_size) plan.cell_width = Divisor(plan.source_columns.cell_size);
  plan.silu = problem.silu;
  plan.pre_scale = problem.silu ? kSiluScale : 1;
  return plan;
}

inline int64_t output_blocks(const SpatialNormProblem& problem, const OutputPlan& plan) {
  return problem.batch * plan.channel_tiles.value * plan.column_tiles.value * plan.row_tiles.value;
}

// Normalisation and affine parameters of a channel of an image: (f - centre) * scale + shift = pre_scale * (n * weight + bias).
// Without the centre a group far from 0 would lose digits in f * scale.
struct Coefficients { float centre, scale, shift; };

MOVQ_DEVICE void store_coefficients(float* to, int64_t index, const Coefficients& c) {
  store_vec(to + 4 * index, Vec<float, 4>{{c.centre, c.scale, c.shift, 0}});
}

MOVQ_DEVICE Coefficients load_coefficients(const float* from, int64_t index) {
  const auto values = load_vec<4>(from + 4 * index);
  return {values[0], values[1], values[2]};
}

// Those of the N channels of a thread.
template <int N>
struct ChannelCoefficients {
  Coefficients of[N];

  ChannelCoefficients() = default;
  MOVQ_DEVICE ChannelCoefficients(const float* from, int64_t index) {
#pragma unroll
    for (int i = 0; i < N; ++i) of[i] = load_coefficients(from, index + i);
  }
};

// The first element of a thread's work, and its rows.
template <int VecSize, bool ChannelsLast>
struct OutputThread {
  static constexpr int kChannels = ChannelsLast ? VecSize : 1;  // owned by the thread
  int64_t image;
  int channel, column;  // `column` is in pixels
  int row, end_row;
  bool idle;

  MOVQ_DEVICE OutputThread(const OutputPlan& plan, int block) {
    const int after_channels = block / plan.channel_tiles, after_columns = after_channels / plan.column_tiles;
    image = after_columns / plan.row_tiles;
    assign(plan, threadIdx.x, block - after_channels * plan.channel_tiles.value,
           after_channels - after_columns * plan.column_tiles.value, after_columns - int(image) * plan.row_tiles.value);
  }
  // One of the threads of a cluster, which has one tile of channels to itself.
  MOVQ_DEVICE OutputThread(const OutputPlan& plan, int thread, int64_t image, int channel_tile) : image(image) {
    assign(plan, thread, channel_tile, 0, 0);
  }

  // The offset of the thread's channels in the image at this pixel, in a tensor of f's layout with so many pixels per image.
  MOVQ_DEVICE int64_t offset(const OutputPlan& plan, int pixel, int pixels) const {
    return ChannelsLast ? (image * pixels + pixel) * plan.channels + channel : (image * plan.channels + channel) * pixels + pixel;
  }

 private:
  MOVQ_DEVICE void assign(const OutputPlan& plan, int thread, int channel_tile, int column_tile, int row_tile) {
    const int middle = thread / plan.inner_threads, inner = thread - middle * plan.inner_threads.value;
    const int outer = middle / plan.middle_threads, in_middle = middle - outer * plan.middle_threads.value;
    channel = (channel_tile * plan.channel_threads + (ChannelsLast ? inner : outer)) * kChannels;
    const int access = column_tile * plan.column_threads + (ChannelsLast ? in_middle : inner);
    column = access * (ChannelsLast ? 1 : VecSize);
    row = (row_tile * plan.row_threads + (ChannelsLast ? outer : in_middle)) * plan.rows;
    end_row = min(row + plan.rows, plan.height - (column >= plan.last_width));
    idle = outer >= (ChannelsLast ? plan.row_threads : plan.channel_threads) || channel >= plan.channels ||
           access >= plan.columns || row >= end_row;
  }
};

// The position of zq that a position of f reads.
MOVQ_DEVICE int source_index(int position, const Axis& axis, const Divisor& cell_size) {
  if (axis.cell_size == 0) return source_index(position, axis);
  const int cell = position / cell_size;
  return 3 * cell + part_of_cell(position - cell * cell_size.value, cell_size.value);
}

// SiLU of u, given v = kSiluScale * u: u / (1 + 2^v) = v / (kSiluScale + kSiluScale * 2^v). 2^v is within 2 ulp, the reciprocal
// within 1 (PTX ISA, "ex2" and "rcp"), so the result is within 4 ulp and the error of v. Where 2^v overflows, u < -88, it is 0.
MOVQ_DEVICE float silu_of_scaled(float v) { return v * fast_reciprocal(fmaf(fast_exp2(v), kSiluScale, kSiluScale)); }

template <class T, int VecSize>
MOVQ_DEVICE void store_activated(T* out, Vec<float, VecSize> values, bool silu) {
  if (silu) {
#pragma unroll
    for (int i = 0; i < VecSize; ++i) values[i] = silu_of_scaled(values[i]);
  }
  store_vec(out, from_float<T>(values));
}

template <class T>
struct OutputArrays {
  const T *f, *zq_y, *zq_b;
  const float* coefficients;
  T* out;
};

template <class T>
MOVQ_DEVICE T* add_bytes(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);  // not by integers: the compiler must see global memory
}

// scale' and shift' of each value of an access, for the rows of f that share a row of zq.
template <class T, int VecSize, bool ChannelsLast, Resize resize>
class CellCoefficients {
 public:
  static constexpr int kRun = ChannelsLast ? VecSize : resize == Resize::kEvenCells ? 2 : 1;  // values that are the same in NCHW
  static constexpr int kSources = VecSize / kRun, kLoaded = ChannelsLast ? VecSize : kSources;
  struct Row { Vec<T, kLoaded> y, b; };  // what one row of f needs from zq

  MOVQ_DEVICE CellCoefficients(const OutputPlan& plan, const OutputThread<VecSize, ChannelsLast>& thread,
                               const OutputArrays<T>& arrays, const ChannelCoefficients<ChannelsLast ? VecSize : 1>& channels)
      : channels_(channels) {
#pragma unroll
    for (int i = 0; i < VecSize; ++i) {
      scale_[i] = channels_.of[ChannelsLast ? i : 0].scale;
      shift_[i] = channels_.of[ChannelsLast ? i : 0].shift;
    }
    if (plan.zq_pixels == 0) return;
    end_row_ = thread.row;
#pragma unroll
    for (int i = 0; i < kSources; ++i)
      source_columns_[i] = source_index(thread.column + i * kRun, plan.source_columns, plan.cell_width);
    const int64_t first = thread.offset(plan, ChannelsLast ? source_columns_[0] : 0, plan.zq_pixels);
    y_ = arrays.zq_y + first;
    b_ = arrays.zq_b + first;
    if (resize == Resize::kEvenCells) skip_rows(plan, thread.row >> plan.cell_row_bits);
  }

  // Whether this row of f, after those before it, belongs to the cell that was folded last. Without zq all rows do.
  MOVQ_DEVICE bool holds(const OutputPlan& plan, int row) const {
    if (row < end_row_) return true;
    return resize == Resize::kCells && source_index(row, plan.source_rows, plan.cell_height) == source_row_;
  }

  MOVQ_DEVICE Row load_row(const OutputPlan& plan, int row) {
    if constexpr (resize == Resize::kCells) {
      const int source = source_index(row, plan.source_rows, plan.cell_height);
      skip_rows(plan, source - max(source_row_, 0));
      source_row_ = source;
    } else {
      end_row_ = (row | plan.cell_row_mask) + 1;
    }
    Row values;
    if constexpr (ChannelsLast) {
      values.y = load_vec<VecSize>(y_);
      values.b = load_vec<VecSize>(b_);
    } else {
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        values.y[i] = load(y_ + (row_start_ + source_columns_[i]));
        values.b[i] = load(b_ + (row_start_ + source_columns_[i]));
      }
    }
    if (resize == Resize::kEvenCells) skip_rows(plan, 1);
    return values;
  }

  MOVQ_DEVICE void fold(const OutputPlan& plan, const Row& values) {
    Vec<float, kLoaded> y, b;
    if constexpr (ChannelsLast) {
      y = to_float(values.y);
      b = to_float(values.b);
    } else {
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) y[i] = to_float(values.y[i]), b[i] = to_float(values.b[i]);
    }
#pragma unroll
    for (int i = 0; i < VecSize; ++i) {
      const int from = ChannelsLast ? i : i / kRun;
      const Coefficients& channel = channels_.of[ChannelsLast ? i : 0];
      scale_[i] = channel.scale * y[from];
      shift_[i] = fmaf(channel.shift, y[from], plan.pre_scale * b[from]);
    }
  }

  MOVQ_DEVICE Vec<float, VecSize> operator()(const Vec<T, VecSize>& f) const {
    Vec<float, VecSize> values = to_float(f);
#pragma unroll
    for (int i = 0; i < VecSize; ++i)
      values[i] = fmaf(values[i] - channels_.of[ChannelsLast ? i : 0].centre, scale_[i], shift_[i]);
    return values;
  }

 private:
  MOVQ_DEVICE void skip_rows(const OutputPlan& plan, int rows) {
    if constexpr (ChannelsLast) {
      y_ = add_bytes(y_, rows * plan.zq_row_bytes);
      b_ = add_bytes(b_, rows * plan.zq_row_bytes);
    } else {
      row_start_ += rows * plan.zq_width;
    }
  }

  const T *y_ = nullptr, *b_ = nullptr;  // in NHWC at the next row and this thread's column, in NCHW at the map
  int row_start_ = 0;
  int source_columns_[kSources] = {};
  int end_row_ = INT32_MAX;  // of the cell that was folded last; kCells looks at each row
  int source_row_ = -1;
  ChannelCoefficients<ChannelsLast ? VecSize : 1> channels_;
  float scale_[VecSize], shift_[VecSize];
};

// One or two rows of f at a time.
template <class T, int VecSize, int Rows>
struct Unit {
  Vec<T, VecSize> values[Rows];
  bool two;

  MOVQ_DEVICE Unit(const OutputPlan& plan, const T* f, bool two) : two(two) {
    values[0] = load_vec<VecSize, Cache::kStream>(f);
    if (two) values[Rows - 1] = load_vec<VecSize, Cache::kStream>(add_bytes(f, plan.row_bytes));
  }

  MOVQ_DEVICE Unit(const Vec<T, VecSize>& first, const Vec<T, VecSize>& second, bool two) : values{first, second}, two(two) {}

  template <class Cell>
  MOVQ_DEVICE void store(const OutputPlan& plan, const Cell& cell, T* out) const {
    store_activated(out, cell(values[0]), plan.silu);
    if (two) store_activated(add_bytes(out, plan.row_bytes), cell(values[Rows - 1]), plan.silu);
  }
};

// A unit of f and its pixels of zq, where zq has f's grid.
template <bool ChannelsLast, class T, int VecSize>
MOVQ_DEVICE void store_on_same_grid(const OutputPlan& plan, const ChannelCoefficients<ChannelsLast ? VecSize : 1>& channels,
                                    const Unit<T, VecSize, 2>& fs, const Unit<T, VecSize, 2>& ys, const Unit<T, VecSize, 2>& bs,
                                    T* out) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k == 1 && !fs.two) break;
    Vec<float, VecSize> values = to_float(fs.values[k]);
    const Vec<float, VecSize> y = to_float(ys.values[k]), b = to_float(bs.values[k]);
#pragma unroll
    for (int i = 0; i < VecSize; ++i) {
      const Coefficients& channel = channels.of[ChannelsLast ? i : 0];
      const float normalized = fmaf(values[i] - channel.centre, channel.scale, channel.shift);
      values[i] = fmaf(normalized, y[i], plan.pre_scale * b[i]);
    }
    store_activated(add_bytes(out, k * plan.row_bytes), values, plan.silu);
  }
}

template <class T, int VecSize, bool ChannelsLast>
MOVQ_DEVICE void modulate_same_grid(const OutputPlan& plan, const OutputThread<VecSize, ChannelsLast>& thread,
                                    const OutputArrays<T>& arrays, int64_t first,
                                    const ChannelCoefficients<ChannelsLast ? VecSize : 1>& channels) {
  const T *f = arrays.f + first, *zq_y = arrays.zq_y + first, *zq_b = arrays.zq_b + first;
  T* out = arrays.out + first;
  for (int row = thread.row; row < thread.end_row; row += 2) {
    const bool two = row + 1 < thread.end_row;
    const Unit<T, VecSize, 2> ys(plan, zq_y, two), bs(plan, zq_b, two), fs(plan, f, two);
    store_on_same_grid<ChannelsLast>(plan, channels, fs, ys, bs, out);
    f = add_bytes(f, 2 * plan.row_bytes);
    zq_y = add_bytes(zq_y, 2 * plan.row_bytes);
    zq_b = add_bytes(zq_b, 2 * plan.row_bytes);
    out = add_bytes(out, 2 * plan.row_bytes);
  }
}

template <class T, int VecSize, bool ChannelsLast, Resize resize>
__global__ void __launch_bounds__(kThreads, 3) modulate(OutputPlan plan, OutputArrays<T> arrays) {
  // Backwards over the blocks: see spatial_norm_forward.cu.
  const OutputThread<VecSize, ChannelsLast> thread(plan, int(gridDim.x - 1 - blockIdx.x));
  if (thread.idle) return;
  const int64_t first = thread.offset(plan, thread.row * plan.width + thread.column, plan.pixels);
  const ChannelCoefficients<ChannelsLast ? VecSize : 1> channels(arrays.coefficients,
                                                                 thread.image * plan.channels + thread.channel);
  if constexpr (resize == Resize::kSameGrid) {
    modulate_same_grid(plan, thread, arrays, first, channels);
  } else {
    constexpr int kUnitRows = resize == Resize::kEvenCells ? 2 : 1;
    CellCoefficients<T, VecSize, ChannelsLast, resize> cell(plan, thread, arrays, channels);
    const T* f = arrays.f + first;
    T* out = arrays.out + first;
    int row = thread.row;
    auto next_unit = [&] {
      f = add_bytes(f, kUnitRows * plan.row_bytes);
      out = add_bytes(out, kUnitRows * plan.row_bytes);
      row += kUnitRows;
    };
    while (true) {
      for (; row < thread.end_row && cell.holds(plan, row); next_unit()) {
        const Unit<T, VecSize, kUnitRows> unit(plan, f, kUnitRows == 2 && row + 1 < thread.end_row);
        unit.store(plan, cell, out);
      }
      if (row >= thread.end_row) return;
      const auto zq = cell.load_row(plan, row);
      const Unit<T, VecSize, kUnitRows> unit(plan, f, kUnitRows == 2);
      cell.fold(plan, zq);
      unit.store(plan, cell, out);
      next_unit();
    }
  }
}

}  // namespace spatial_norm
}  // namespace movq
