// Host side of attention: how a problem is cut. The number of blocks and the resident rows depend on the device, so the last
// bits of a result may differ between devices, but not between runs on one device.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "attention_walk.cuh"
#include "bounded_cache.h"
#include "device/launch.cuh"
#include "device/reduce.cuh"

namespace movq {
namespace attention {

template <class T>
Chunks cut_chunks(int products, int head_size) {
  Chunks chunks = {};
  chunks.products = products;
  chunks.score_chunks = ceil_div(head_size * int(sizeof(T)), kScoreChunk);
  chunks.stripes = round_up(head_size, 2 * kStripe) / kStripe;
  chunks.block_copy_tokens = kThreads / (chunks.stripes * kStripe / Tile<T>::kAccessElements);
  return chunks;
}

// Lays out shared memory and sets the value tokens of a chunk. As many row operands stay resident as leave room for three stages;
// if none do, two stages are enough.
template <class T>
SharedLayout plan_shared_memory(Chunks& chunks, const char* name) {
  using Sizes = Tile<T>;
  SharedLayout shared = {};
  shared.row_pitch = chunks.score_chunks * kScoreChunk + kBankOffset;
  shared.value_pitch =
      (chunks.stripes * kStripe + 8) * int(sizeof(T));  // 8 elements, of float too, put the rows in different banks
  const int score_stage = kColumns * kScorePitch, resident_bytes = Sizes::kRows * shared.row_pitch;
  chunks.value_tokens = kColumns;
  while (chunks.value_tokens * shared.value_pitch > score_stage) chunks.value_tokens /= 2;
  shared.weights = kStatistics;
  shared.rows = shared.weights + Sizes::kRows * Sizes::kWeightPitch;
  const int limit = shared_memory_limit(name);
  for (shared.resident_operands = chunks.products; shared.resident_operands >= 0; --shared.resident_operands) {
    shared.ring = shared.rows + shared.resident_operands * resident_bytes;
    shared.stage_bytes = score_stage + (shared.resident_operands < chunks.products ? Sizes::kRows * kScorePitch : 0);
    shared.stages = std::min((limit - shared.ring) / shared.stage_bytes, 4);
    if (shared.stages >= (shared.resident_operands ? 3 : 2)) break;
  }
  if (shared.resident_operands < 0) {
    throw std::runtime_error(std::string(name) + ": needs " + std::to_string(shared.rows + 2 * shared.stage_bytes) +
                             " bytes of shared memory per block, the device has " + std::to_string(limit));
  }
  shared.total_bytes = shared.ring + shared.stages * shared.stage_bytes;
  return shared;
}

template <class T, class Pass>
Plan make_plan(const AttentionProblem& problem, const char* name) {
  Plan plan = {};
  plan.extents.rows = int(Pass::kRowsAreKeys ? problem.keys : problem.queries);
  plan.extents.columns = int(Pass::kRowsAreKeys ? problem.queries : problem.keys);
  plan.extents.head_size = int(problem.head_size);
  plan.extents.heads = int(problem.heads);
  plan.counts.row_tiles = ceil_div(plan.extents.rows, Tile<T>::kRows);
  plan.counts.column_tiles = ceil_div(plan.extents.columns, kColumns);
  const int64_t row_tiles = problem.batch * problem.heads * plan.counts.row_tiles;
  const int64_t units = row_tiles * plan.counts.column_tiles;
  if (units > INT32_MAX) {
    throw std::runtime_error(std::string(name) + ": expected at most 2^31 - 1 tiles of scores, got " + std::to_string(units));
  }
  plan.counts.all_row_tiles = int(row_tiles);
  plan.chunks = cut_chunks<T>(Pass::kProducts, plan.extents.head_size);
  plan.shared = plan_shared_memory<T>(plan.chunks, name);
  const int resident = resident_blocks(walk<T, Pass>, name, kThreads, plan.shared.total_bytes);
  if (resident < 1) throw std::runtime_error(std::string(name) + ": a block does not fit on the device");
  plan.schedule.blocks = int(std::min<int64_t>(units, resident));
  plan.schedule.share = int(units / plan.schedule.blocks);
  plan.schedule.remainder = int(units % plan.schedule.blocks);
  return plan;
}

// make_plan(), once per device and shape.
template <class T, class Pass>
Plan cached_plan(const AttentionProblem& problem, const char* name) {
  using Key = std::array<int64_t, 6>;
  static auto& plans = *new BoundedCache<Key, Plan, 256>;  // never destroyed: threads may outlive main()
  const Key key = {current_device(name), problem.batch, problem.heads, problem.queries, problem.keys, problem.head_size};
  return plans.get(key, [&] { return make_plan<T, Pass>(problem, name); });
}

// True if blocks share a row tile, whose parts must then be combined.
inline bool has_parts(const Plan& plan) {
  for (int block = 1; block < plan.schedule.blocks; ++block) {
    if (plan.schedule.first_unit(block) % plan.counts.column_tiles) return true;
  }
  return false;
}

// Rows of all partial results: a block may leave two, of its first and of its last row tile.
template <class T>
int64_t part_rows(const Plan& plan) {
  return has_parts(plan) ? 2 * int64_t(plan.schedule.blocks) * Tile<T>::kRows : 0;
}

template <class T>
Source<T> source(const Tokens& tokens) {
  return {static_cast<const T*>(tokens.data), tokens.batch_stride, tokens.head_stride, tokens.token_stride};
}

template <class T>
Destination<T> destination(const Tokens& tokens, float* parts) {
  return {static_cast<T*>(tokens.data), tokens.batch_stride, tokens.head_stride, tokens.token_stride, parts};
}

// Combines the row tiles that blocks share, one warp per row: the sum of the parts, each times exp(part_lse - lse) if there is a
// part_lse.
template <class T>
__global__ void __launch_bounds__(kThreads)
    combine(const __grid_constant__ Plan plan, const __grid_constant__ Destination<T> to, const float* part_lse, float* lse) {
  constexpr int kRows = Tile<T>::kRows, kBlocksPerTile = kRows / kWarps;
  const TileCounts& counts = plan.counts;
  const int tile = blockIdx.x / kBlocksPerTile, row = blockIdx.x % kBlocksPerTile * kWarps + warp_id();
  const int first_unit = tile * counts.column_tiles, end_unit = first_unit + counts.column_tiles;
  const int first_block = plan.schedule.block_of(first_unit), last_block = plan.schedule.block_of(end_unit - 1);
  const int image_head = tile / counts.row_tiles, token = (tile - image_head * counts.row_tiles) * kRows + row;
  if (first_block == last_block || token >= plan.extents.rows) return;
  // Where a block left the row: this is its first part, unless it started in an earlier row tile.
  auto part_row = [&](int block) { return int64_t(2 * block + (plan.schedule.first_unit(block) < first_unit)) * kRows + row; };

  float max_lse = -INFINITY, total = 0;
  if (part_lse) {
    for (int block = first_block; block <= last_block; ++block) max_lse = max(max_lse, load(part_lse + part_row(block)));
    max_lse = finite_base(max_lse);
    for (int block = first_block; block <= last_block; ++block) total += expf(load(part_lse + part_row(block)) - max_lse);
    if (lane_id() == 0) store(lse + int64_t(image_head) * plan.extents.rows + token, max_lse + logf(total));
  }
  const float normalisation = inverse_total(total);
  const int image = image_head / plan.extents.heads, head = image_head - image * plan.extents.heads;
  T* out = to.out + image * to.batch_stride + head * to.head_stride + token * to.token_stride;
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

template <class T, class Pass>
void run(const Plan& plan, const Operands<T>& operands, const typename Pass::Arguments& arguments, const float* part_lse,
         float* lse, const char* name, cudaStream_t stream) {
  const LaunchConfig walk_config = {unsigned(plan.schedule.blocks), kThreads, size_t(plan.shared.total_bytes)};
  launch(walk<T, Pass>, name, walk_config, stream, plan, operands, arguments);
  if (has_parts(plan)) {
    const int64_t blocks = int64_t(plan.counts.all_row_tiles) * (Tile<T>::kRows / kWarps);
    const LaunchConfig combine_config = {grid_size("attention combine", blocks), kThreads};
    launch(combine<T>, "attention combine", combine_config, stream, plan, arguments.to, part_lse, lse);
  }
}

}  // namespace attention
}  // namespace movq
