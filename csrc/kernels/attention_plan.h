// Host side of attention: partitioning and launches. The number of blocks and the resident rows depend on the device, so the last
// bits of a result may differ between devices, but not between runs on one device.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "attention_combine.cuh"
#include "bounded_cache.h"
#include "device/launch.cuh"

namespace movq {
namespace attention {

// Calls function(Shape()) with the smallest shape that holds a head.
template <class Function>
void with_shape(const AttentionProblem& problem, Function&& function) {
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (problem.head_size <= 128) function(Shape<T, 128>());
    else if (problem.head_size <= 256) function(Shape<T, 256>());
    else function(Shape<T, kMaxHeadSize>());
  });
}

// Keeps as many row operands resident as leave room for three stages. With room for six, half of the barriers are saved.
template <class Shape, class Pass>
Ring plan_ring(const char* name) {
  const int limit = shared_memory_limit(name);
  if (Pass::kWholeTiles) {
    const int start = Shape::kResidentRows + Shape::kOperandBytes;
    return {1, 2, 1, start, Shape::kTileStage, start + 2 * Shape::kTileStage};
  }
  Ring ring = {};
  for (ring.resident_operands = Pass::kRowOperands; ring.resident_operands >= 0; --ring.resident_operands) {
    ring.start = Shape::kResidentRows + ring.resident_operands * Shape::kOperandBytes;
    ring.stage_bytes = Shape::kColumnStage + (ring.resident_operands < Pass::kRowOperands ? Shape::kStreamedRows : 0);
    ring.stages = (limit - ring.start) / ring.stage_bytes;
    ring.stages = ring.stages >= 6 && Pass::kProducts == 1 ? 6 : std::min(ring.stages, 4);
    ring.chunks_per_barrier = ring.stages == 6 ? 2 : 1;
    ring.end = ring.start + ring.stages * ring.stage_bytes;
    if (ring.stages >= 3) return ring;
  }
  throw std::runtime_error(std::string(name) + ": needs " + std::to_string(ring.start + 3 * ring.stage_bytes) +
                           " bytes of shared memory per block, the device has " + std::to_string(limit));
}

// Cycles per mma of 16-bit types. The shared memory of a block tells the devices apart: 99 KB on GeForce GPUs (8.6, 8.9, 12.0),
// whose tensor cores have a quarter of an A100's rate (NVIDIA's Ada whitepaper), 163 KB on an A100, and 227 KB on an H100.
inline double cycles_per_mma(const char* name) {
  const int limit = shared_memory_limit(name);
  return limit < 100 << 10 ? 8 : limit <= 163 << 10 ? 2 : 1.6;
}

template <class Shape, class Pass>
UnitCost unit_cost(int64_t head_size, const char* name) {
  constexpr int kSize = sizeof(typename Shape::T), kProducts = Pass::kProducts + Pass::kValues;
  constexpr int kMultiplyAdds = 16 * 8 * 32 / kSize;  // of one mma; float takes three for each product (mma.cuh)
  constexpr double kMma = double(kProducts) * Shape::kRows * kColumns * Shape::kHeadSize / kMultiplyAdds * (kSize == 4 ? 3 : 1);
  return {kMma * cycles_per_mma(name), double(2 * Shape::kRows * head_size * int64_t(sizeof(float)))};
}

template <class Shape, class Pass>
Plan make_plan(const AttentionProblem& problem, const char* name) {
  Plan plan = {};
  plan.extents.rows = int(Pass::kRowsAreKeys ? problem.keys : problem.queries);
  plan.extents.columns = int(Pass::kRowsAreKeys ? problem.queries : problem.keys);
  plan.extents.head_size = int(problem.head_size);
  plan.extents.head_pieces = int(problem.head_size * sizeof(typename Shape::T) / 16);
  plan.extents.heads = Divisor(int(problem.heads));
  plan.counts.row_tiles = Divisor(ceil_div(plan.extents.rows, Shape::kRows));
  plan.counts.column_tiles = Divisor(ceil_div(plan.extents.columns, kColumns));
  const int64_t row_tiles = problem.batch * problem.heads * plan.counts.row_tiles.value;
  const int64_t units = row_tiles * plan.counts.column_tiles.value;
  if (units > INT32_MAX) {
    throw std::runtime_error(std::string(name) + ": expected at most 2^31 - 1 tiles of scores, got " + std::to_string(units));
  }
  plan.counts.all_row_tiles = int(row_tiles);
  plan.ring = plan_ring<Shape, Pass>(name);
  const int resident = resident_blocks(walk<Shape, Pass>, name, kThreads, plan.ring.end);
  if (resident < 1) throw std::runtime_error(std::string(name) + ": a block does not fit on the device");
  plan.schedule =
      plan_schedule(row_tiles, plan.counts.column_tiles.value, resident, unit_cost<Shape, Pass>(problem.head_size, name));
  return plan;
}

// make_plan(), once per device and shape.
template <class Shape, class Pass>
Plan cached_plan(const AttentionProblem& problem, const char* name) {
  using Key = std::array<int64_t, 6>;
  static auto& plans = *new BoundedCache<Key, Plan, 256>;  // never destroyed: threads may outlive main()
  const Key key = {current_device(name), problem.batch, problem.heads, problem.queries, problem.keys, problem.head_size};
  return plans.get(key, [&] { return make_plan<Shape, Pass>(problem, name); });
}

inline bool has_parts(const Plan& plan) { return has_parts(plan.schedule, plan.counts.column_tiles.value); }

// Rows of all partial results: a block may leave two, of its first and of its last row tile.
template <class Shape>
int64_t part_rows(const Plan& plan) {
  return has_parts(plan) ? 2 * int64_t(plan.schedule.blocks) * Shape::kRows : 0;
}

// `T` is const for an input.
template <class T>
TokenView<T> view(const Tokens& tokens, const AttentionProblem& problem, int64_t count, const char* name) {
  constexpr int64_t kUnit = 16 / sizeof(T);
  const int64_t strides[3] = {tokens.batch_stride / kUnit, tokens.head_stride / kUnit, tokens.token_stride / kUnit};
  const int64_t extent = problem.batch * strides[0] + problem.heads * strides[1] + count * strides[2];
  if (extent > UINT32_MAX) throw std::runtime_error(std::string(name) + ": expected tensors that span less than 64 GB");
  return {static_cast<T*>(tokens.data), uint32_t(strides[0]), uint32_t(strides[1]), uint32_t(strides[2])};
}

template <class Shape, class Pass>
void launch_pass(const Plan& plan, const Operands<typename Shape::T>& operands, const typename Pass::Arguments& arguments,
                 const float* part_lse, float* lse, const char* name, cudaStream_t stream) {
  using T = typename Shape::T;
  const LaunchConfig walk_config = {unsigned(plan.schedule.blocks), kThreads, size_t(plan.ring.end)};
  launch(walk<Shape, Pass>, name, walk_config, stream, plan, operands, arguments);
  if (has_parts(plan)) {
    const int64_t blocks = int64_t(plan.counts.all_row_tiles) * (Shape::kRows / kWarps);
    const LaunchConfig combine_config = {grid_size("attention combine", blocks), kThreads};
    launch(combine<T>, "attention combine", combine_config, stream, plan, arguments.to, part_lse, lse);
  }
}

}  // namespace attention
}  // namespace movq
