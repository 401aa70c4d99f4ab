// The second kernel of attention, for row tiles that blocks share.
#pragma once

#include "attention_walk.cuh"
#include "device/reduce.cuh"

namespace movq {
namespace attention {

// One warp per row: the sum of the parts, each times exp(part_lse - lse) if there is a part_lse.
template <class T>
__global__ void __launch_bounds__(kThreads)
    combine(const __grid_constant__ Plan plan, const __grid_constant__ Destination<T> to, const float* part_lse, float* lse) {
  constexpr int kRows = 128 / sizeof(T), kBlocksPerTile = kRows / kWarps;
  const int share = plan.schedule.share, column_tiles = plan.counts.column_tiles.value;
  const int tile = blockIdx.x / kBlocksPerTile, row = blockIdx.x % kBlocksPerTile * kWarps + warp_id();
  const int first_unit = tile * column_tiles;
  const int first_block = first_unit / share, last_block = (first_unit + column_tiles - 1) / share;
  const Segment segment(plan, first_unit, first_unit + column_tiles);
  const int token = segment.row_tile * kRows + row;
  if (first_block == last_block || token >= plan.extents.rows) return;
  // The row of a block's part; see Segment.
  auto part_row = [&](int block) { return int64_t(2 * block + (block * share <= first_unit)) * kRows + row; };

  float max_lse = -INFINITY, total = 0;
  if (part_lse) {
    for (int block = first_block; block <= last_block; ++block) max_lse = max(max_lse, load(part_lse + part_row(block)));
    max_lse = finite_base(max_lse);
    for (int block = first_block; block <= last_block; ++block) total += expf(load(part_lse + part_row(block)) - max_lse);
    if (lane_id() == 0) store(lse + segment.token_index(plan.extents, plan.extents.rows, token), max_lse + logf(total));
  }
  const float normalisation = inverse_total(total);
  T* out = to.out.at(to.out.position(segment.image, segment.head, token));
  for (int column = lane_id() * 4; column < plan.extents.head_size; column += kWarpSize * 4) {
    Vec<float, 4> sum = {};
    for (int block = first_block; block <= last_block; ++block) {
      const float weight = part_lse ? expf(load(part_lse + part_row(block)) - max_lse) * normalisation : 1.0f;
      const Vec<float, 4> part = load_vec<4>(to.parts + part_row(block) * plan.extents.head_size + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += weight * part[i];
    }
    store_vec(out + column, from_float<T>(sum));
  }
}

}  // namespace attention
}  // namespace movq
