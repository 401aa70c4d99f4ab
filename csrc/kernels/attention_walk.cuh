// The kernel of attention: one block walks over its units of work. A Pass says what the weights are.
#pragma once

#include "attention_stream.cuh"
#include "device/math.cuh"

namespace movq {
namespace attention {

// An output: whole row tiles go to `out`, partial ones to parts[part][row][head_size]. Strides in elements.
template <class T>
struct Destination {
  T* out;
  int64_t batch_stride, head_stride, token_stride;
  float* parts;

  // Writes value(m, e, sum) for element e of mma tiles (m, n).
  template <class Function>
  MOVQ_DEVICE void write(const Plan& plan, const Segment& segment, const Sums<T>& sums, Function&& value) const {
    const int head_size = plan.extents.head_size;
#pragma unroll
    for (int m = 0; m < Tile<T>::kSumTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int row = sum_row(m, e), token = segment.row_tile * Tile<T>::kRows + row;
        if (token >= plan.extents.rows) continue;
#pragma unroll
        for (int n = 0; n < kMaxStripes; ++n) {
          const int column = sum_column(plan.chunks.stripes, n);
          if (n >= plan.chunks.stripes || column >= head_size) break;
          const Vec<float, 2> pair = {{value(m, e, sums[m][n][e]), value(m, e, sums[m][n][e + 1])}};
          if (segment.part < 0) {
            T* to = out + segment.image * batch_stride + segment.head * head_stride + token * token_stride;
            store_vec(to + column, from_float<T>(pair));
          } else {
            store_vec(parts + (int64_t(segment.part) * Tile<T>::kRows + row) * head_size + column, pair);
          }
        }
      }
    }
  }
};

// A Pass has these functions, which all threads of the block call together. `synced` shows that a barrier comes before:
//   Pass(plan, arguments, segment)
//   load_statistics(synced, tile)   at the start of a column tile: loads what weigh() needs into shared memory
//   weigh(stream, tile, s, t)       stores the weights of the tile; has a barrier of its own
//   rescale(synced, sums)           before the values of the tile are added
//   write(synced, sums)             after the last tile
template <class T, class Pass>
__global__ void __launch_bounds__(kThreads, 1)
    walk(const __grid_constant__ Plan plan, const __grid_constant__ Operands<T> operands,
         const __grid_constant__ typename Pass::Arguments arguments) {
  const int score_chunks = plan.chunks.score_chunks;
  const int first_unit = plan.schedule.first_unit(blockIdx.x), end_unit = plan.schedule.first_unit(blockIdx.x + 1);
  for (int unit = first_unit; unit < end_unit;) {
    const Segment segment(plan, unit, first_unit, end_unit);
    Stream<T> stream(plan, operands, segment);
    Pass pass(plan, arguments, segment);
    Sums<T> sums = {};
    for (int tile = segment.first_tile; tile < segment.end_tile; ++tile) {
      Scores<T> s = {}, t = {};
      for (int chunk = 0; chunk < score_chunks; ++chunk) {
        const Synced synced = stream.advance();
        if (chunk == 0) pass.load_statistics(synced, tile);
        stream.add_scores(synced, s, 0, chunk);
      }
      if constexpr (Pass::kProducts == 2) {
        for (int chunk = 0; chunk < score_chunks; ++chunk) stream.add_scores(stream.advance(), t, 1, chunk);
      }
      pass.weigh(stream, tile, s, t);
      for (int token = 0; token < kColumns; token += plan.chunks.value_tokens) {
        const Synced synced = stream.advance();
        if (token == 0) pass.rescale(synced, sums);
        stream.add_values(synced, sums, token);
      }
    }
    pass.write(stream.drain(), sums);
    unit += segment.end_tile - segment.first_tile;
  }
}

}  // namespace attention
}  // namespace movq
