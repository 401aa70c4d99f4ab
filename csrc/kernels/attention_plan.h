// Host side of attention: how a problem is cut. The number of blocks and the room for rows depend on the device, so the last bits
// of a result may differ between devices, never between runs on one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "attention_tile.cuh"
#include "device/launch.cuh"

namespace movq {
namespace attention {

inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// Lays out shared memory: as many row operands as leave room for three stages stay, or none if there is room for two.
template <class T>
void lay_out(Plan& p, const char* name) {
  using Sizes = Tile<T>;
  p.score_chunks = ceil_div(p.size * int(sizeof(T)), 128);
  p.stripes = int(round_up(p.size, 2 * kStripe)) / kStripe;
  p.resident_pitch = p.score_chunks * 64 + 8;
  p.value_pitch = p.stripes * kStripe * Sizes::kUnits + 8 * Sizes::kUnits;
  const int score_stage = kColumns * kScorePitch;
  p.value_chunk = kColumns;
  while (p.value_chunk * p.value_pitch > score_stage) p.value_chunk /= 2;
  p.token_step = kThreads / (p.stripes * kStripe / Sizes::kPer16);
  p.weights = kStatistics * int(sizeof(float) / sizeof(Unit));
  p.rows_at = p.weights + Sizes::kRows * Sizes::kWeightPitch;
  const int room = shared_memory_limit() / int(sizeof(Unit)), kept = Sizes::kRows * p.resident_pitch;
  for (p.residents = p.products; p.residents >= 0; --p.residents) {
    p.stage_at = p.rows_at + p.residents * kept;
    p.stage = score_stage + (p.residents < p.products ? Sizes::kRows * kScorePitch : 0);
    p.stages = std::min((room - p.stage_at) / p.stage, 4);
    if (p.stages >= (p.residents ? 3 : 2)) break;
  }
  if (p.residents < 0) {
    throw std::runtime_error(std::string(name) + ": needs " + std::to_string((p.rows_at + 2 * p.stage) * sizeof(Unit)) +
                             " bytes of shared memory a block, the device has " + std::to_string(shared_memory_limit()));
  }
  p.shared_bytes = (p.stage_at + p.stages * p.stage) * int(sizeof(Unit));
}

template <class T, class Pass>
Plan plan(const AttentionProblem& problem, const char* name) {
  Plan p = {};
  p.products = Pass::kProducts;
  p.rows = int(Pass::kRowsAreKeys ? problem.keys : problem.queries);
  p.columns = int(Pass::kRowsAreKeys ? problem.queries : problem.keys);
  p.size = int(problem.size);
  p.heads = int(problem.heads);
  p.scale = problem.scale;
  p.row_tiles = ceil_div(p.rows, Tile<T>::kRows);
  p.column_tiles = ceil_div(p.columns, kColumns);
  const int64_t tiles = problem.batch * problem.heads * p.row_tiles, units = tiles * p.column_tiles;
  if (units > INT32_MAX) throw std::runtime_error(std::string(name) + ": more than 2^31 tiles of scores");
  p.tiles = int(tiles);
  lay_out<T>(p, name);
  const int resident = resident_blocks(walk<T, Pass>, name, kThreads, p.shared_bytes);
  if (resident < 1) throw std::runtime_error(std::string(name) + ": the device has no room for a block of it");
  p.blocks = int(std::min<int64_t>(units, resident));
  p.share = int(units / p.blocks);
  p.rest = int(units % p.blocks);
  return p;
}

// Whether blocks share a row tile.
inline bool has_parts(const Plan& p) {
  for (int block = 1; block < p.blocks; ++block) {
    if (first_unit(p, block) % p.column_tiles) return true;
  }
  return false;
}

// Floats behind the parts: of a block's first and last row tile.
template <class T>
int64_t part_rows(const Plan& p) {
  return has_parts(p) ? 2 * int64_t(p.blocks) * Tile<T>::kRows : 0;
}

template <class T>
Source<T> source(const Tokens& t) {
  return {static_cast<const T*>(t.data), t.batch_stride, t.head_stride, t.token_stride};
}

template <class T>
Destination<T> destination(const Tokens& t, float* parts) {
  return {static_cast<T*>(t.data), t.batch_stride, t.head_stride, t.token_stride, parts};
}

// Puts together the row tiles that blocks share, a warp a row: sum of parts, weighed by exp(part_lse - lse) where there is
// part_lse.
template <class T>
__global__ void __launch_bounds__(kThreads)
    combine(const __grid_constant__ Plan p, const __grid_constant__ Destination<T> to, const float* part_lse, float* lse) {
  constexpr int kBlocksATile = Tile<T>::kRows / kWarps;
  const int tile = blockIdx.x / kBlocksATile, row = blockIdx.x % kBlocksATile * kWarps + warp_id();
  const int first = tile * p.column_tiles, from = block_of(p, first), until = block_of(p, first + p.column_tiles - 1);
  const int pair = tile / p.row_tiles, token = (tile - pair * p.row_tiles) * Tile<T>::kRows + row;
  if (from == until || token >= p.rows) return;
  // Where block b left the row: its first row tile has the first of its two places.
  auto place = [&](int b) { return int64_t(2 * b + (first_unit(p, b) < first)) * Tile<T>::kRows + row; };

  float top = -INFINITY, total = 0;
  if (part_lse) {
    for (int b = from; b <= until; ++b) top = max(top, load(part_lse + place(b)));
    for (int b = from; b <= until; ++b) total += expf(load(part_lse + place(b)) - top);
    if (lane_id() == 0) store(lse + int64_t(pair) * p.rows + token, top + logf(total));
  }
  const int image = pair / p.heads, head = pair - image * p.heads;
  T* out = to.out + image * to.batch_stride + head * to.head_stride + token * to.token_stride;
  for (int column = lane_id() * 4; column < p.size; column += kWarp * 4) {
    Vec<float, 4> sum = {};
    for (int b = from; b <= until; ++b) {
      const float share = part_lse ? expf(load(part_lse + place(b)) - top) / total : 1.0f;
      const Vec<float, 4> part = load_vec<4>(to.parts + place(b) * p.size + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += share * part[i];
    }
    store_vec(out + column, from_float<T>(sum));
  }
}

template <class T, class Pass>
void run(const Plan& p, const Operands<T>& operands, const typename Pass::Arguments& arguments, const float* part_lse, float* lse,
         const char* name, cudaStream_t stream) {
  launch(walk<T, Pass>, name, Launch{unsigned(p.blocks), kThreads, size_t(p.shared_bytes)}, stream, p, operands, arguments);
  if (has_parts(p)) {
    const Launch how = {grid("attention combine", int64_t(p.tiles) * (Tile<T>::kRows / kWarps)), kThreads};
    launch(combine<T>, "attention combine", how, stream, p, arguments.to, part_lse, lse);
  }
}

}  // namespace attention
}  // namespace movq
