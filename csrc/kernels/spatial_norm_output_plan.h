// Host side of the output pass: how pixels find theirs in zq, and how the pass is cut. spatial_norm_output.cuh has the kernels.
#pragma once

#include "device/divisor.cuh"
#include "spatial_norm_plan.h"

namespace movq {
namespace spatial_norm {

// How the pixels of f find theirs in zq. kCells: by source_index(), in any case. kEvenCells: the same, but two rows, and in NCHW
// two columns, share a source. kSameGrid: zq has f's pixels. kColumnPairs: in NHWC two rows and two columns share a source, and a
// thread takes all four pixels at once. kSmallCells: in NCHW a cell has two rows and two columns, so that a thread's sources are
// adjacent.
enum class Resize { kCells, kEvenCells, kSameGrid, kColumnPairs, kSmallCells };

// How the output is cut. The threads of a block are channels x columns x row strips in NHWC, and columns x row strips x channels
// in NCHW, the fastest first. Blocks are numbered by tile of channels (fastest), columns and row strips, and image. The strips of
// all frames are numbered consecutively.
struct OutputPlan {
  Divisor inner_threads, middle_threads;  // the first two of the three
  Divisor channel_tiles, column_tiles, row_tiles;
  int channel_threads, column_threads, row_threads;
  int rows;              // of a strip: the work of one thread
  Divisor frame_strips;  // strips of a frame
  int frames, zq_frames;
  int channels, pixels, columns;  // pixels of a frame, columns of threads
  // Where rows do not matter, a clip is one frame, and a row is as wide as the block.
  int width, height, last_width;  // in pixels; the last row may be narrower
  FrameAxis source_frames;
  Axis source_rows, source_columns;
  int cell_row_bits, cell_row_mask;              // kEvenCells: a cell has 1 << cell_row_bits rows
  Divisor cell_height, cell_width;               // where zq is bordered
  int zq_width, zq_pixels;                       // of a frame
  int64_t pixel_bytes, row_bytes, zq_row_bytes;  // from one pixel or row of f, or row of zq, to the next
  int64_t out_image_stride, out_channel_stride;  // in elements
  float pre_scale;                               // what the coefficients and zq_b are multiplied by, see silu_of_scaled()
  bool silu;
  int threads() const { return round_up(channel_threads * column_threads * row_threads, kWarpSize); }
};

// About one wave on the largest GPUs, at 3 blocks per multiprocessor. Smaller problems get blocks of one row instead.
constexpr int64_t kOutputTargetBlocks = 512;

// SiLU works on v = -log2(e) * u, because 2^v = exp(-u).
constexpr float kSiluScale = -1.4426950408889634f;

// Whether all cells have the same size: by a power of two the nearest rule is exact, up to 2^24 (torch rounds to float32).
inline bool has_even_cells(int64_t size, int64_t zq_size) {
  const int64_t cell = size / zq_size;
  return cell * zq_size == size && cell > 1 && (cell & (cell - 1)) == 0 && size <= (1 << 24);
}

inline Resize choose_resize(const SpatialNormProblem& problem, int vec_size) {
  if (vec_size == 1) return Resize::kCells;
  if (problem.zq_height == 0) return Resize::kEvenCells;
  if (is_same_grid(problem)) return Resize::kSameGrid;
  const bool even_rows = has_even_cells(problem.height, problem.zq_height);
  const bool even_columns = has_even_cells(problem.width, problem.zq_width);
  return even_rows && (even_columns || problem.channels_last) && !problem.bordered ? Resize::kEvenCells : Resize::kCells;
}

// Whether rows do not matter, because no pixel looks for a source.
inline bool is_flat(const SpatialNormProblem& problem, int vec_size) {
  return problem.zq_height == 0 || choose_resize(problem, vec_size) == Resize::kSameGrid;
}

inline void set_width(OutputPlan& plan, int width, int thread_pixels, int64_t pixel_bytes) {
  plan.width = width;
  plan.height = ceil_div(plan.pixels, plan.width);
  plan.last_width = plan.pixels - (plan.height - 1) * plan.width;
  plan.columns = plan.width / thread_pixels;
  plan.pixel_bytes = pixel_bytes;
  plan.row_bytes = plan.width * pixel_bytes;
}

// The distance between pixels of a channel.
inline int64_t pixel_bytes(const SpatialNormProblem& problem) {
  return (problem.channels_last ? problem.channels : 1) * bytes(problem.dtype);
}

// kColumnPairs or kSmallCells where they can take the place of kEvenCells. A thread of kColumnPairs takes at least four accesses,
// so the map must be large.
inline Resize choose_output_resize(const SpatialNormProblem& problem, int vec_size) {
  const Resize resize = choose_resize(problem, vec_size);
  if (resize != Resize::kEvenCells || problem.zq_height == 0) return resize;
  if (!problem.channels_last) {
    return problem.height == 2 * problem.zq_height && problem.width == 2 * problem.zq_width ? Resize::kSmallCells : resize;
  }
  const int64_t accesses = problem.batch * problem.channels / vec_size * problem.pixels();
  const bool pairs = has_even_cells(problem.width, problem.zq_width) && accesses >= 4 * kOutputTargetBlocks * kThreads;
  return pairs ? Resize::kColumnPairs : resize;
}

inline OutputPlan plan_output(const SpatialNormProblem& problem, int vec_size, Resize resize) {
  OutputPlan plan = {};
  const bool nhwc = problem.channels_last;
  const int access_pixels = nhwc ? 1 : vec_size;
  const int channel_accesses = int(problem.channels) / (nhwc ? vec_size : 1);
  plan.channels = int(problem.channels);
  const bool flat = is_flat(problem, vec_size);
  plan.frames = flat ? 1 : int(problem.frames);
  plan.zq_frames = flat ? 1 : int(problem.zq_frames);
  plan.pixels = int(problem.pixels() / plan.frames);
  plan.channel_threads = nhwc ? std::min(channel_accesses, channel_threads(vec_size)) : 1;
  // Small maps get half as many threads per block, since each takes two rows at least.
  const int64_t accesses = problem.batch * channel_accesses * problem.pixels() / access_pixels;
  const int block_threads = accesses < kOutputTargetBlocks * kThreads ? kThreads / 2 : kThreads;
  const int pixel_threads = block_threads / plan.channel_threads;
  set_width(plan, flat ? std::min(plan.pixels, pixel_threads * access_pixels) : int(problem.width),
            access_pixels * (resize == Resize::kColumnPairs ? 2 : 1), pixel_bytes(problem));
  const int column_tiles = ceil_div(plan.columns, pixel_threads);
  plan.column_threads = ceil_div(plan.columns, column_tiles);
  plan.row_threads = std::min(pixel_threads / plan.column_threads, plan.frames * plan.height);
  if (!nhwc) plan.channel_threads = std::min(block_threads / (plan.column_threads * plan.row_threads), plan.channels);
  const int channel_tiles = ceil_div(channel_accesses, plan.channel_threads);

  const int steps = ceil_div(plan.frames * plan.height, plan.row_threads);
  const int64_t blocks = problem.batch * channel_tiles * column_tiles * steps;
  plan.rows = int(rounds_per_block(blocks, 16, kOutputTargetBlocks));
  // Whole units. Where cells are even, so is the height.
  if (resize != Resize::kCells) plan.rows = std::max(2, plan.rows - plan.rows % 2);
  plan.inner_threads = Divisor(nhwc ? plan.channel_threads : plan.column_threads);
  plan.middle_threads = Divisor(nhwc ? plan.column_threads : plan.row_threads);
  plan.channel_tiles = Divisor(channel_tiles);
  plan.column_tiles = Divisor(column_tiles);
  plan.frame_strips = Divisor(ceil_div(plan.height, plan.rows));
  plan.row_tiles = Divisor(ceil_div(plan.frames * plan.frame_strips.value, plan.row_threads));

  plan.zq_width = int(problem.zq_width);
  plan.zq_row_bytes = problem.zq_width * pixel_bytes(problem);
  plan.zq_pixels = int(problem.zq_pixels() / plan.zq_frames);
  plan.source_frames = flat ? FrameAxis{0, make_axis(1, 1, false)} : make_frame_axis(problem);
  plan.source_rows = make_axis(int(problem.height), int(problem.zq_height), problem.bordered);
  plan.source_columns = make_axis(int(problem.width), int(problem.zq_width), problem.bordered);
  plan.cell_row_bits = 31;  // without zq every source is 0
  while (plan.cell_row_bits > 0 && problem.zq_height > problem.height >> plan.cell_row_bits) --plan.cell_row_bits;
  plan.cell_row_mask = int((int64_t(1) << plan.cell_row_bits) - 1);
  if (plan.source_rows.cell_size) plan.cell_height = Divisor(plan.source_rows.cell_size);
  if (plan.source_columns.cell_size) plan.cell_width = Divisor(plan.source_columns.cell_size);
  plan.out_channel_stride = nhwc ? 1 : problem.out_channel_stride ? problem.out_channel_stride : problem.pixels();
  plan.out_image_stride = problem.out_image_stride ? problem.out_image_stride : problem.channels * problem.pixels();
  plan.silu = problem.silu;
  plan.pre_scale = problem.silu ? kSiluScale : 1;
  return plan;
}

inline int64_t output_blocks(const SpatialNormProblem& problem, const OutputPlan& plan) {
  return problem.batch * plan.channel_tiles.value * plan.column_tiles.value * plan.row_tiles.value;
}

}  // namespace spatial_norm
}  // namespace movq
