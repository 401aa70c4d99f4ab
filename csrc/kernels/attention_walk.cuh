// The kernel of attention: one block walks over its units of work. A Pass computes the weights.
#pragma once

#include "attention_stream.cuh"
#include "device/math.cuh"

namespace movq {
namespace attention {

// An output. Whole row tiles go to `out`, partial ones to parts[part][row][head_size].
template <class T>
struct Destination {
  TokenView<T> out;
  float* parts;

  // Writes value(m, e, sum) for element e of mma tiles (m, n).
  template <class Shape, class Function>
  MOVQ_DEVICE void write(const Plan& plan, const Segment& segment, const typename Shape::Sums& sums, Function&& value) const {
    const int head_size = plan.extents.head_size;
#pragma unroll
    for (int m = 0; m < Shape::kSumTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int row = Shape::sum_row(m, e), token = segment.row_tile * Shape::kRows + row;
        if (token >= plan.extents.rows) continue;
        T* to = out.at(out.position(segment.image, segment.head, token));
        float* part = parts + (int64_t(segment.part) * Shape::kRows + row) * head_size;
#pragma unroll
        for (int n = 0; n < Shape::kStripes; ++n) {
          const int column = Shape::sum_column(n);
          if (column >= head_size) break;
          const Vec<float, 2> pair = {{value(m, e, sums[m][n][e]), value(m, e, sums[m][n][e + 1])}};
          if (segment.part < 0) store_vec(to + column, from_float<T>(pair));
          else store_vec(part + column, pair);
        }
      }
    }
  }
};

// A Pass has these functions, which all threads of the block call together. `synced` proves that a barrier comes before:
//   Pass(plan, arguments, segment)  may load statistics of the rows into shared memory
//   load_statistics(synced, tile)   loads the statistics of the columns, once per column tile
//   weigh(stream, tile, s, t)       stores the weights of the tile; has its own barrier
//   store_second_weights(stream, s) stores the weights of the second value, which weigh() left in s; has its own barrier
//   rescale(synced, sums)           before the values of the tile are added
//   write(synced, sums)             after the last tile
template <class Shape, class Pass>
__global__ void __launch_bounds__(kThreads, 1)
    walk(const __grid_constant__ Plan plan, const __grid_constant__ Operands<typename Shape::T> operands,
         const __grid_constant__ typename Pass::Arguments arguments) {
  using Scores = typename Shape::Scores;
  int unit = blockIdx.x * plan.schedule.share;
  const int end_unit = unit + min(plan.schedule.share, plan.schedule.units - unit);
  while (unit < end_unit) {
    const Segment segment(plan, unit, end_unit);
    Stream<Shape, Pass> stream(plan, operands, segment);
    Pass pass(plan, arguments, segment);
    typename Shape::Sums sums = {};
    for (int tile = segment.first_tile; tile < segment.end_tile; ++tile) {
      Scores s = {}, t = {};
      stream.for_each_score_chunk([&](Synced synced, int chunk) {
        stream.add_scores(synced, s, 0, chunk);
        if (chunk == 0) pass.load_statistics(synced, tile);
      });
      if constexpr (Pass::kProducts == 2) {
        stream.for_each_score_chunk([&](Synced synced, int chunk) { stream.add_scores(synced, t, 1, chunk); });
      }
      pass.weigh(stream, tile, s, t);
      stream.for_each_value_chunk([&](Synced synced, int chunk) {
        stream.add_values(synced, sums, chunk, [&] {
          if (chunk == 0) pass.rescale(synced, sums);
        });
      });
      if constexpr (Pass::kValues == 2) {
        pass.store_second_weights(stream, s);
        stream.for_each_value_chunk([&](Synced synced, int chunk) { stream.add_values(synced, sums, chunk, [] {}); });
      }
    }
    pass.write(stream.drain(), sums);
    unit += segment.end_tile - segment.first_tile;
  }
}

}  // namespace attention
}  // namespace movq
