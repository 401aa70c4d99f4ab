// Common parts of the Hopper kernels for attention whose keys are also its values (kv). Each kernel holds a tile of 64 rows and
// walks over stages of 64 or 32 tokens, which serve twice:
//
//   scores   s = resident . stage^T                 64 x (rows of a stage), in registers
//   weights  a function of s, rounded to 16 bits    where the kernels differ
//   values   sums += weights . stage                64 x head, in registers
//
//          rows     residents  a stage                      weights
//   out    queries  q          64 keys                      exp(s - running maximum)
//   dkv    keys     kv         32 of dout over 32 of q      [p, p (t - delta)]  p = exp(s - lse), [t, s] = kv [dout, q]^T
//   dq     queries  q, dout    32 keys                      p (t - delta)       s = q kv^T, t = dout kv^T
//
// The stage of dkv makes one product of two: [p, ds]^T [dout, q] adds the gradients of the values and of the keys.
//
// Roles: warpgroups 0 and 1 compute, one thread of warpgroup 2 loads. Each of the computing warpgroups holds one half of the
// columns of the sums, 64 x 256 for a head of 512, and computes the scores and weights of every other stage. It takes its own
// weights from registers; the other's come through shared memory. While one warpgroup computes exponents, the tensor cores work
// for the other (FlashMLA calls this a seesaw: github.com/deepseek-ai/FlashMLA, docs, April 2025).
//
// Budget for out, a head of 512, and a pair of stages (64 x 128 x 512 multiply-adds in each of the two products):
//   registers      128 sums, 32 scores, 16 weights of each computing thread; at most 240 (setmaxnreg: 2 x 128 x 240 + 128 x 24)
//   shared memory  resident 64 KB, two stages of 64 KB, two tiles of weights of 8 KB, and 2 KB: 211 KB of 227
//   tensor cores   4096 cycles at 4096 flop a cycle (data sheet: 989 TFLOP/s, 132 multiprocessors at 1.83 GHz)
//   shared memory  528 KB at 128 bytes a cycle: 4224 cycles. Scores read 4 KB (both operands) in the 32 cycles of m64n64k16,
//                  values 8 or 10 KB in the 128 cycles of m64n256k16; the copies write 128 KB
//   L2             128 KB for 16.8 Mflop: 128 flop a byte, 704 TFLOP/s at 5.5 TB/s, which attention_tile.cuh assumes of an H100
// At that rate L2 sets the limit, 71% of the peak. dkv has the same budget. dq has 192 flop for each byte of L2, but its scores
// take m64n32k16, which reads 3 KB in 16 cycles: at most 75% of the peak.
//
// Multicast would halve the bytes from L2, to 256 flop a byte: two blocks of a cluster would each load half of a stage for both.
// The kernels do not use it, because the count shows no clear gain. The 5.5 TB/s were measured on an H100 PCIe with 114
// multiprocessors at its power limit. On an H100 with 132, a matmul in tiles of at most 85 flop a byte reaches 672 TFLOP/s
// without multicast and 676 with it (github.com/facebookexperimental/triton/pull/1065), so L2 delivers at least 7.9 TB/s. Here
// that would serve 1011 TFLOP/s, more than the peak. Against multicast: a stage is free only when both blocks have read it, so
// with two stages each block waits for the slower one, and pairs of blocks must walk over the same stages. Another attention
// kernel became 9% slower (github.com/gabrieldemarmiesse/torch-mojo-backend/pull/391).
// All this is calculated and counted by the emulator. An H200, whose matrix products run at 770 TFLOP/s, reaches 662 with 16384
// tokens (movq_ext/ops/attention_table.json).
#pragma once

#include <cfloat>

#include "attention_schedule.h"
#include "device/math.cuh"
#include "device/memory.cuh"
#include "device/reduce.cuh"
#include "device/swizzled_tile.cuh"
#include "device/tma.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"

namespace movq {
namespace shared_kv {

constexpr int kRows = 64;  // of a tile
constexpr int kComputeThreads = 2 * kWarpgroupSize, kThreads = kComputeThreads + kWarpgroupSize;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// How a problem is partitioned. A unit of work is a row tile and a stage. `combine` adds the parts of shared row tiles.
struct Plan {
  int rows, columns, heads;  // tokens and heads
  int row_tiles, stages;     // per head
  int all_row_tiles;         // over all heads and images
  Schedule schedule;
};

// A block's share of one row tile.
struct Segment {
  int row_tile, image, head;
  int first, end;  // stages
  int part;        // index of the partial result, or -1 if the block has the whole row tile

  MOVQ_DEVICE Segment(const Plan& plan, int unit) {
    const int first_unit = plan.schedule.first_unit(blockIdx.x), end_unit = plan.schedule.first_unit(blockIdx.x + 1);
    const int tile = unit / plan.stages, image_head = tile / plan.row_tiles;
    row_tile = tile - image_head * plan.row_tiles;
    image = image_head / plan.heads;
    head = image_head - image * plan.heads;
    first = unit - tile * plan.stages;
    end = min(plan.stages, first + end_unit - unit);
    part = first == 0 && end == plan.stages ? -1 : 2 * int(blockIdx.x) + (unit != first_unit);
  }

  MOVQ_DEVICE int units() const { return end - first; }
};

// The shared memory of a block. `n` counts the block's stages so far. It gives a stage's place in the ring and the parity of its
// barriers.
template <class T, int Head, int Residents>
struct SharedMemory {
  static constexpr int kStageRows = kRows / Residents, kStages = Head == 512 ? 2 : 4;
  using Resident = SwizzledTile<T, kRows, Head>;
  using Stage = SwizzledTile<T, kStageRows, Head>;
  using Weights = SwizzledTile<T, kRows, 64>;
  static constexpr int kPanels = Stage::kPanels;

  static constexpr unsigned kFirstStage = Residents * Resident::kBytes;
  static constexpr unsigned kFirstWeights = kFirstStage + kStages * Stage::kBytes;
  static constexpr unsigned kRowValues = kFirstWeights + kStages * Weights::kBytes;
  static constexpr unsigned kBarriers = kRowValues + (2 * kStages + 2) * kRows * sizeof(float);
  static constexpr unsigned kBarrierCount = 2 + kStages * (kPanels + 1);
  static constexpr unsigned kBytes = kBarriers + kBarrierCount * sizeof(uint64_t);

  MOVQ_DEVICE static Resident resident(int i) { return Resident(i * Resident::kBytes); }
  MOVQ_DEVICE static Stage stage(int n) { return Stage(kFirstStage + n % kStages * Stage::kBytes); }
  MOVQ_DEVICE static Weights weights(int n) { return Weights(kFirstWeights + n % kStages * Weights::kBytes); }
  // Two values per row that accompany the weights.
  MOVQ_DEVICE static Shared<float> row_values(int n, int i) {
    return Shared<float>(kRowValues + (n % kStages * 2 + i) * kRows * sizeof(float), kRows);
  }

  // One value per row from each computing warpgroup.
  MOVQ_DEVICE static Shared<float> row_totals(int side) {
    return Shared<float>(kRowValues + (2 * kStages + side) * kRows * sizeof(float), kRows);
  }

  MOVQ_DEVICE static MBarrier barrier(int i) { return MBarrier(Shared<uint64_t>(kBarriers, kBarrierCount), i); }
  MOVQ_DEVICE static MBarrier residents_full() { return barrier(0); }
  MOVQ_DEVICE static MBarrier residents_empty() { return barrier(1); }
  MOVQ_DEVICE static MBarrier stage_empty(int n) { return barrier(2 + n % kStages); }
  MOVQ_DEVICE static MBarrier panel_full(int n, int panel) { return barrier(2 + kStages + n % kStages * kPanels + panel); }
  MOVQ_DEVICE static unsigned parity(int n) { return n / kStages % 2; }

  MOVQ_DEVICE static void init_barriers() {
    constexpr int kComputeWarps = kComputeThreads / kWarpSize;
    residents_full().init(1);
    residents_empty().init(kComputeWarps);
    for (int n = 0; n < kStages; ++n) {
      stage_empty(n).init(kComputeWarps);
      for (int panel = 0; panel < kPanels; ++panel) panel_full(n, panel).init(1);
    }
    fence_proxy_async();
  }
};

// The row and column of this thread's register i in a 64-row tile (wgmma.cuh).
MOVQ_DEVICE int register_row(int i) { return threadIdx.x % kWarpgroupSize / kWarpSize * 16 + lane_id() / 4 + i / 2 % 2 * 8; }
MOVQ_DEVICE int register_column(int i) { return i / 4 * 8 + lane_id() % 4 * 2 + i % 2; }
MOVQ_DEVICE bool leads_row() { return lane_id() % 4 == 0; }  // true for one of the four lanes that share a row

// The tokens of a tensor, with strides in elements.
template <class T>
struct TokenRows {
  T* data;
  int64_t batch_stride, head_stride, token_stride;

  MOVQ_DEVICE T* row(int image, int head, int64_t token) const {
    return data + image * batch_stride + head * head_stride + token * token_stride;
  }
};

// An output. Whole row tiles go to `out`, partial ones to parts[part][row][Head].
template <class T, int Head>
struct Destination {
  TokenRows<T> out;
  float* parts;

  // Writes one half of the columns, each sum times factor(half), where half is 1 for the lower of the thread's two rows.
  template <class Function>
  MOVQ_DEVICE void write(const Plan& plan, const Segment& segment, int side, const float (&sums)[Head / 4],
                         Function&& factor) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = register_row(2 * half), token = segment.row_tile * kRows + row;
      if (token >= plan.rows) continue;
      const int first_column = side * (Head / 2) + register_column(0);
      T* to = out.row(segment.image, segment.head, token) + first_column;
      float* to_part = parts + (int64_t(segment.part) * kRows + row) * Head + first_column;
#pragma unroll
      for (int i = 2 * half; i < Head / 4; i += 4) {
        const Vec<float, 2> pair = {{sums[i] * factor(half), sums[i + 1] * factor(half)}};
        if (segment.part < 0) store_vec(to + i / 4 * 8, from_float<T>(pair));
        else store_vec(to_part + i / 4 * 8, pair);
      }
    }
  }
};

}  // namespace shared_kv
}  // namespace movq
