// Host side of the Hopper kernels: partitioning, tensor maps and launches. The number of blocks depends on the device, so
// the last bits of a result may differ between devices, but not between runs on one device.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "device/launch.cuh"
#include "shared_kv_attention.h"
#include "shared_kv_walk.cuh"

namespace movq {
namespace shared_kv {

// Calls function(Type<T>, integral_constant<Head>) for a dtype and a head size that the kernels have.
template <class Function>
void with_kernel(const AttentionProblem& problem, const char* name, Function&& function) {
  auto with_head = [&](auto type) {
    switch (problem.head_size) {
      case 128: return function(type, std::integral_constant<int, 128>());
      case 256: return function(type, std::integral_constant<int, 256>());
      case 512: return function(type, std::integral_constant<int, 512>());
    }
    throw std::runtime_error(std::string(name) + ": expected a head size of 128, 256 or 512, got " +
                             std::to_string(problem.head_size));
  };
  if (problem.dtype == DType::float16) return with_head(Type<__half>());
  if (problem.dtype == DType::bfloat16) return with_head(Type<__nv_bfloat16>());
  throw std::runtime_error(std::string(name) + ": expected float16 or bfloat16");
}

template <int Head, class Pass>
Plan make_plan(const AttentionProblem& problem, const char* name) {
  constexpr int kStageRows = kRows / Pass::kResidents, kTokens = kStageRows / Pass::kSources;
  Plan plan = {};
  plan.rows = int(Pass::kRowsAreKeys ? problem.keys : problem.queries);
  plan.columns = int(Pass::kRowsAreKeys ? problem.queries : problem.keys);
  plan.heads = int(problem.heads);
  plan.row_tiles = ceil_div(plan.rows, kRows);
  plan.stages = ceil_div(plan.columns, kTokens);
  const int64_t all_row_tiles = problem.batch * problem.heads * plan.row_tiles, units = all_row_tiles * plan.stages;
  if (units > INT32_MAX) {
    throw std::runtime_error(std::string(name) + ": expected at most 2^31 - 1 tiles of scores, got " + std::to_string(units));
  }
  plan.all_row_tiles = int(all_row_tiles);
  constexpr double kFlop = 2.0 * kRows * kStageRows * Head * (Pass::kResidents + 1), kFlopPerCycle = 4096;
  constexpr UnitCost kCost = {kFlop / kFlopPerCycle, 2.0 * kRows * Head * sizeof(float)};
  // Registers leave room for one block on each multiprocessor. Stages come in pairs: one for each computing warpgroup.
  plan.schedule = plan_schedule(all_row_tiles, plan.stages, multiprocessors(name), kCost, 2);
  return plan;
}

// make_plan(), once per device and shape.
template <int Head, class Pass>
Plan cached_plan(const AttentionProblem& problem, const char* name) {
  using Key = std::array<int64_t, 5>;
  static auto& plans = *new BoundedCache<Key, Plan, 256>;  // never destroyed: threads may outlive main()
  const Key key = {current_device(name), problem.batch, problem.heads, problem.queries, problem.keys};
  return plans.get(key, [&] { return make_plan<Head, Pass>(problem, name); });
}

inline bool has_parts(const Plan& plan) { return has_parts(plan.schedule, plan.stages); }

// Rows of all partial results: a block may leave two, of its first and of its last row tile.
inline int64_t part_rows(const Plan& plan) { return has_parts(plan) ? 2 * int64_t(plan.schedule.blocks) * kRows : 0; }

// `tokens` tokens of every head and image, in boxes of `box_tokens`.
inline TensorMap token_map(const AttentionProblem& problem, const Tokens& tensor, int64_t tokens, int box_tokens,
                           const char* name) {
  const auto head_size = uint64_t(problem.head_size);
  auto stride = [&](int64_t size, int64_t elements) { return (size == 1 ? head_size : uint64_t(elements)) * sizeof(uint16_t); };
  const TensorShape shape = {{head_size, uint64_t(tokens), uint64_t(problem.heads), uint64_t(problem.batch)},
                             {stride(tokens, tensor.token_stride), stride(problem.heads, tensor.head_stride),
                              stride(problem.batch, tensor.batch_stride)},
                             {64, uint32_t(box_tokens), 1, 1}};
  return tensor_map(tensor.data, shape, name);
}

template <class T>
TokenRows<T> token_rows(const Tokens& tensor) {
  return {static_cast<T*>(tensor.data), tensor.batch_stride, tensor.head_stride, tensor.token_stride};
}

// The factor that normalises a row's sums, given the total of its weights: 0 if all scores are -inf, as in PyTorch.
MOVQ_DEVICE float inverse_total(float total) { return total == 0 ? 0.0f : 1 / total; }

constexpr int kCombineWarps = 8;

// Combines the row tiles that blocks share, one warp per row: the sum of the parts, each times exp(part_lse - lse) if there is a
// part_lse.
template <class T, int Head>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize)
    combine(const __grid_constant__ Plan plan, const __grid_constant__ Destination<T, Head> to, const float* part_lse,
            float* lse) {
  constexpr int kBlocksPerTile = kRows / kCombineWarps;
  const int tile = blockIdx.x / kBlocksPerTile, row = blockIdx.x % kBlocksPerTile * kCombineWarps + warp_id();
  const int first_unit = tile * plan.stages, end_unit = first_unit + plan.stages;
  const int first_block = first_unit / plan.schedule.share, last_block = (end_unit - 1) / plan.schedule.share;
  const int image_head = tile / plan.row_tiles, token = (tile - image_head * plan.row_tiles) * kRows + row;
  if (first_block == last_block || token >= plan.rows) return;
  // A block's part of this row is its first part, unless it started in an earlier row tile.
  auto part_row = [&](int block) { return int64_t(2 * block + (plan.schedule.first_unit(block) < first_unit)) * kRows + row; };

  float base = 0, factor = 1;
  if (part_lse) {
    float max_lse = -INFINITY, total = 0;
    for (int block = first_block; block <= last_block; ++block) max_lse = max(max_lse, load(part_lse + part_row(block)));
    base = max_lse == -INFINITY ? 0 : max_lse;
    for (int block = first_block; block <= last_block; ++block) total += expf(load(part_lse + part_row(block)) - base);
    factor = inverse_total(total);
    if (lane_id() == 0) store(lse + int64_t(image_head) * plan.rows + token, base + logf(total));
  }
  const int image = image_head / plan.heads;
  T* out = to.out.row(image, image_head - image * plan.heads, token);
  for (int column = lane_id() * 4; column < Head; column += kWarpSize * 4) {
    Vec<float, 4> sum = {};
    for (int block = first_block; block <= last_block; ++block) {
      const float weight = part_lse ? expf(load(part_lse + part_row(block)) - base) * factor : 1.0f;
      const Vec<float, 4> part = load_vec<4>(to.parts + part_row(block) * Head + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += weight * part[i];
    }
    store_vec(out + column, from_float<T>(sum));
  }
}

template <class T, int Head, class Pass>
void launch_pass(const Plan& plan, const Maps& maps, const typename Pass::Arguments& arguments, const float* part_lse, float* lse,
                 const char* name, cudaStream_t stream) {
  const LaunchConfig config = {unsigned(plan.schedule.blocks), kThreads, SharedMemory<T, Head, Pass::kResidents>::kBytes};
  launch(walk<T, Head, Pass>, name, config, stream, plan, maps, arguments);
  if (has_parts(plan)) {
    const int64_t blocks = int64_t(plan.all_row_tiles) * (kRows / kCombineWarps);
    const LaunchConfig combine_config = {grid_size("shared_kv combine", blocks), kCombineWarps * kWarpSize};
    launch(combine<T, Head>, "shared_kv combine", combine_config, stream, plan, arguments.to, part_lse, lse);
  }
}

}  // namespace shared_kv
}  // namespace movq
