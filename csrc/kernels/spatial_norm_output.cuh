// The last pass of SpatialNorm's forward: out = act(((f - centre) * scale + shift) * up(zq_y) + up(zq_b)).
//
// A thread takes one access of a row of f and walks down the rows. So its channels and columns stay the same, and where rows have
// the same source in zq, so do scale' = scale * y and shift' = shift * y + b. That leaves (f - centre) * scale' + shift' and the
// activation.
// Rows are taken in units of two where they share a source. In NHWC two columns of a cell share it too: on large maps a thread
// takes both, and a unit is a square of 2x2 pixels. All loads of a unit, those of zq included, are issued before one is used.
// In units of one row, so with two loads of f in flight instead of four, such maps took up to 15% longer on an H200 (bfloat16,
// statistics given): 342.6 us instead of 314.1 for 256x1024x1024, 23.6 instead of 20.6 for 128x256x256.
//
// Instructions per 16 bytes, for sm_90, which tests/test_spatial_norm_machine_code.py counts:
//                                               16-bit types   float32
//   a unit that loads its cell from zq              103            52
//   further units of the cell                        77            40
//   a cell of 2x2 pixels in NHWC (kColumnPairs)      88            45
//   further squares of a cell in NHWC                73            35
//   a cell of 2x2 pixels in NCHW (kSmallCells)       87            41
//   zq on f's own grid                              110            50
// so at most 90 where a cell has four rows or, except on small maps in NHWC, 2x2 pixels. A value of 16 bits takes a conversion, a
// subtraction, a multiply-add, 4 instructions for SiLU and half a conversion back: 60 for 8 values. Folding takes 5 per source:
// 2 conversions, 2 multiplications and a multiply-add. The rest are memory accesses, addresses and the loop.
// On f's own grid each value has its own source, and 90 are out of reach: 8 values take 92, the 4 accesses and their 64-bit
// addresses 12, and the loop the rest. That pass is still further from the limit, because it moves twice as many bytes per value.
// Without the subtraction (8) a constant group would not give exactly its bias, and `tanh.approx` for SiLU (16) has only 11 bits.
// An H100 issues 128 instructions and 16 special functions per cycle and multiprocessor (CUDA C++ Programming Guide, "Arithmetic
// Instructions"): enough for 11 and 8 values. At 3.35 TB/s and 1.755 GHz (data sheet) its memory moves 3.6, of 4 bytes each.
#pragma once

#include "device/dependent_launch.cuh"
#include "device/math.cuh"
#include "spatial_norm_output_plan.h"

namespace movq {
namespace spatial_norm {

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

// The bias or zq_b times pre_scale. Rounding towards zero costs no instruction and never overflows. Otherwise SiLU of a bias of
// -3e38 would be inf * -0 = NaN, and of 3e38 inf; now they are -0, and 2.36e38 (the largest float / log2(e)).
MOVQ_DEVICE float scaled_shift(float pre_scale, float shift) { return __fmul_rz(pre_scale, shift); }

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

// The first element of a thread's work, and its rows. In NHWC a thread has one column or two.
template <int VecSize, bool ChannelsLast, int Columns = 1>
struct OutputThread {
  static constexpr int kChannels = ChannelsLast ? VecSize : 1;  // owned by the thread
  static constexpr int kPixels = ChannelsLast ? Columns : VecSize;
  int64_t image;
  int channel, column;  // `column` is in pixels
  int frame;
  int row, end_row;  // in the frame
  bool idle;

  MOVQ_DEVICE OutputThread(const OutputPlan& plan, int block) {
    const int after_channels = block / plan.channel_tiles, after_columns = after_channels / plan.column_tiles;
    image = after_columns / plan.row_tiles;
    const int channel_tile = block - after_channels * plan.channel_tiles.value;
    const int column_tile = after_channels - after_columns * plan.column_tiles.value;
    const int row_tile = after_columns - int(image) * plan.row_tiles.value;
    const int thread = threadIdx.x;
    const int middle = thread / plan.inner_threads, inner = thread - middle * plan.inner_threads.value;
    const int outer = middle / plan.middle_threads, in_middle = middle - outer * plan.middle_threads.value;
    channel = (channel_tile * plan.channel_threads + (ChannelsLast ? inner : outer)) * kChannels;
    const int thread_column = column_tile * plan.column_threads + (ChannelsLast ? in_middle : inner);
    column = thread_column * kPixels;
    const int strip = row_tile * plan.row_threads + (ChannelsLast ? outer : in_middle);
    frame = strip / plan.frame_strips;
    row = (strip - frame * plan.frame_strips.value) * plan.rows;
    end_row = min(row + plan.rows, plan.height - (column >= plan.last_width));
    idle = outer >= (ChannelsLast ? plan.row_threads : plan.channel_threads) || channel >= plan.channels ||
           thread_column >= plan.columns || frame >= plan.frames || row >= end_row;
  }

  // The offsets of the thread's channels at a pixel of its frame in f and out, and of its source frame in zq.
  MOVQ_DEVICE int64_t offset(const OutputPlan& plan, int pixel) const {
    return offset(plan, frame * plan.pixels + pixel, plan.frames * plan.pixels);
  }
  MOVQ_DEVICE int64_t out_offset(const OutputPlan& plan, int pixel) const {
    return image * plan.out_image_stride + channel * plan.out_channel_stride +
           int64_t(frame * plan.pixels + pixel) * (ChannelsLast ? plan.channels : 1);
  }
  MOVQ_DEVICE int64_t zq_offset(const OutputPlan& plan, int pixel) const {
    return offset(plan, source_frame(frame, plan.source_frames) * plan.zq_pixels + pixel, plan.zq_frames * plan.zq_pixels);
  }

 private:
  // In a tensor of f's layout with so many pixels per image.
  MOVQ_DEVICE int64_t offset(const OutputPlan& plan, int pixel, int pixels) const {
    return ChannelsLast ? (image * pixels + pixel) * plan.channels + channel : (image * plan.channels + channel) * pixels + pixel;
  }
};

// The position of zq that a position of f reads.
MOVQ_DEVICE int source_index(int position, const Axis& axis, const Divisor& cell_size) {
  if (axis.cell_size == 0) return source_index(position, axis);
  const int cell = position / cell_size;
  return 3 * cell + part_of_cell(position - cell * cell_size.value, cell_size.value);
}

// SiLU of u, given v = kSiluScale * u: u / (1 + 2^v) = v / (kSiluScale + kSiluScale * 2^v). 2^v is within 2 ulp, the reciprocal
// within 1 (PTX ISA, "ex2" and "rcp"), so the result is within 4 ulp and the error of v. Below u = -86.9 the result is 0 (off by
// less than 2e-36).
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
  static constexpr bool kSmallCells = resize == Resize::kSmallCells;
  static constexpr bool kHasEvenRows = resize == Resize::kEvenCells || resize == Resize::kColumnPairs || kSmallCells;
  static constexpr bool kOneAccess = ChannelsLast || kSmallCells;             // holds what a thread needs from a row of zq
  static constexpr int kRun = ChannelsLast ? VecSize : kHasEvenRows ? 2 : 1;  // values with the same source
  static constexpr int kSources = VecSize / kRun, kLoaded = ChannelsLast ? VecSize : kSources;
  struct Row { Vec<T, kLoaded> y, b; };  // what one row of f needs from zq

  template <class Thread>
  MOVQ_DEVICE CellCoefficients(const OutputPlan& plan, const Thread& thread, const OutputArrays<T>& arrays,
                               const ChannelCoefficients<ChannelsLast ? VecSize : 1>& channels)
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
    const int64_t first = thread.zq_offset(plan, kOneAccess ? source_columns_[0] : 0);
    y_ = arrays.zq_y + first;
    b_ = arrays.zq_b + first;
    if (kHasEvenRows) skip_rows(plan, thread.row >> plan.cell_row_bits);
  }

  // Whether this row of f, after those before it, belongs to the cell that was folded last. Without zq all rows do.
  MOVQ_DEVICE bool holds(const OutputPlan& plan, int row) const {
    if (kSmallCells) return false;  // a unit is a whole cell
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
    if constexpr (kOneAccess) {
      values.y = load_vec<kLoaded>(y_);
      values.b = load_vec<kLoaded>(b_);
    } else {
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        values.y[i] = load(y_ + (row_start_ + source_columns_[i]));
        values.b[i] = load(b_ + (row_start_ + source_columns_[i]));
      }
    }
    if (kHasEvenRows) skip_rows(plan, 1);
    return values;
  }

  MOVQ_DEVICE void fold(const OutputPlan& plan, const Row& values) {
    Vec<float, kLoaded> y, b;
    if constexpr (kOneAccess) {
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
      shift_[i] = fmaf(channel.shift, y[from], scaled_shift(plan.pre_scale, b[from]));
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
    if constexpr (kOneAccess) {
      y_ = add_bytes(y_, rows * plan.zq_row_bytes);
      b_ = add_bytes(b_, rows * plan.zq_row_bytes);
    } else {
      row_start_ += rows * plan.zq_width;
    }
  }

  const T *y_ = nullptr, *b_ = nullptr;  // at the next row and this thread's column if kOneAccess, otherwise at the map
  int row_start_ = 0;
  int source_columns_[kSources] = {};
  int end_row_ = INT32_MAX;  // of the cell that was folded last; kCells looks at each row
  int source_row_ = -1;
  ChannelCoefficients<ChannelsLast ? VecSize : 1> channels_;
  float scale_[VecSize], shift_[VecSize];
};

// The accesses of f that a thread loads at once: one, those of two rows, or those of two rows and, in NHWC, two columns.
enum class UnitShape { kOne, kTwoRows, kSquare };

template <class T, int VecSize, UnitShape shape>
struct Unit {
  static constexpr int kAccesses = shape == UnitShape::kOne ? 1 : shape == UnitShape::kTwoRows ? 2 : 4;
  Vec<T, VecSize> values[kAccesses];
  bool whole;  // otherwise it has its first access only

  MOVQ_DEVICE Unit(const OutputPlan& plan, const T* f, bool whole) : whole(whole) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (i == 0 || whole) values[i] = load_vec<VecSize, Cache::kStream>(access(plan, f, i));
    }
  }

  template <class Cell>
  MOVQ_DEVICE void store(const OutputPlan& plan, const Cell& cell, T* out) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (i == 0 || whole) store_activated(access(plan, out, i), cell(values[i]), plan.silu);
    }
  }

 private:
  template <class Pointer>
  MOVQ_DEVICE static Pointer access(const OutputPlan& plan, Pointer first, int i) {
    if (shape == UnitShape::kSquare) return add_bytes(first, i / 2 * plan.row_bytes + i % 2 * plan.pixel_bytes);
    return add_bytes(first, i * plan.row_bytes);
  }
};

template <class T, int VecSize>
using RowPair = Unit<T, VecSize, UnitShape::kTwoRows>;

// A unit of f and its pixels of zq, where zq has f's grid.
template <bool ChannelsLast, class T, int VecSize>
MOVQ_DEVICE void store_on_same_grid(const OutputPlan& plan, const ChannelCoefficients<ChannelsLast ? VecSize : 1>& channels,
                                    const RowPair<T, VecSize>& fs, const RowPair<T, VecSize>& ys, const RowPair<T, VecSize>& bs,
                                    T* out) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k == 1 && !fs.whole) break;
    Vec<float, VecSize> values = to_float(fs.values[k]);
    const Vec<float, VecSize> y = to_float(ys.values[k]), b = to_float(bs.values[k]);
#pragma unroll
    for (int i = 0; i < VecSize; ++i) {
      const Coefficients& channel = channels.of[ChannelsLast ? i : 0];
      const float normalized = fmaf(values[i] - channel.centre, channel.scale, channel.shift);
      values[i] = fmaf(normalized, y[i], scaled_shift(plan.pre_scale, b[i]));
    }
    store_activated(add_bytes(out, k * plan.row_bytes), values, plan.silu);
  }
}

template <class T, int VecSize, bool ChannelsLast>
MOVQ_DEVICE void modulate_same_grid(const OutputPlan& plan, const OutputThread<VecSize, ChannelsLast>& thread,
                                    const OutputArrays<T>& arrays, int first_pixel,
                                    const ChannelCoefficients<ChannelsLast ? VecSize : 1>& channels) {
  const int64_t first = thread.offset(plan, first_pixel);
  T* out = arrays.out + (thread.out_offset(plan, first_pixel) - first);  // so that all tensors share one running offset
  int64_t at = first * int64_t(sizeof(T));
  auto store_unit = [&](bool whole) {
    const RowPair<T, VecSize> ys(plan, add_bytes(arrays.zq_y, at), whole), bs(plan, add_bytes(arrays.zq_b, at), whole),
        fs(plan, add_bytes(arrays.f, at), whole);
    store_on_same_grid<ChannelsLast>(plan, channels, fs, ys, bs, add_bytes(out, at));
  };
  int row = thread.row;  // An odd last row follows the loop: conditional loads inside it would cost copies of registers.
  for (; row + 1 < thread.end_row; row += 2, at += 2 * plan.row_bytes) store_unit(true);
  if (row < thread.end_row) store_unit(false);
}

template <class T, int VecSize, bool ChannelsLast, Resize resize>
__global__ void __launch_bounds__(kThreads, 3) modulate(OutputPlan plan, OutputArrays<T> arrays) {
  constexpr bool kPairs = resize == Resize::kColumnPairs;
  // Backwards over the blocks: see spatial_norm_forward.cu.
  const OutputThread<VecSize, ChannelsLast, kPairs ? 2 : 1> thread(plan, int(gridDim.x - 1 - blockIdx.x));
  const int first_pixel = thread.row * plan.width + thread.column;
  const int64_t first = thread.offset(plan, first_pixel);
  wait_for_previous_kernel();
  if (thread.idle) return;
  const ChannelCoefficients<ChannelsLast ? VecSize : 1> channels(arrays.coefficients,
                                                                 thread.image * plan.channels + thread.channel);
  if constexpr (resize == Resize::kSameGrid) {
    modulate_same_grid(plan, thread, arrays, first_pixel, channels);
  } else {
    constexpr UnitShape kShape = kPairs ? UnitShape::kSquare : resize == Resize::kCells ? UnitShape::kOne : UnitShape::kTwoRows;
    constexpr int kUnitRows = kShape == UnitShape::kOne ? 1 : 2;
    CellCoefficients<T, VecSize, ChannelsLast, resize> cell(plan, thread, arrays, channels);
    const T* f = arrays.f + first;
    T* out = arrays.out + thread.out_offset(plan, first_pixel);
    int row = thread.row;
    auto next_unit = [&] {
      f = add_bytes(f, kUnitRows * plan.row_bytes);
      out = add_bytes(out, kUnitRows * plan.row_bytes);
      row += kUnitRows;
    };
    while (true) {
      for (; row < thread.end_row && cell.holds(plan, row); next_unit()) {
        // Only without zq can the last row of a thread have no second one: even cells make an even height.
        const Unit<T, VecSize, kShape> unit(plan, f, kShape != UnitShape::kTwoRows || row + 1 < thread.end_row);
        unit.store(plan, cell, out);
      }
      if (row >= thread.end_row) return;
      const auto zq = cell.load_row(plan, row);
      const Unit<T, VecSize, kShape> unit(plan, f, true);
      cell.fold(plan, zq);
      unit.store(plan, cell, out);
      next_unit();
    }
  }
}

}  // namespace spatial_norm
}  // namespace movq
