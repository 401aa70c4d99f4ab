// Common parts of the five kernels of attention. Each walks a tile of rows, held by one block, over tiles of 128 columns:
//   scores   s = row[0] . column[0]^T (and for two of the gradients t = row[1] . column[1]^T), in registers;
//   weights  a function of s, t and statistics, rounded to T, in shared memory: this is where the kernels differ;
//   values   sums += weights . value, in registers.
//
//            rows     columns  row[0] column[0]  row[1] column[1]  value  weights
//   forward  queries  keys     q      k                            v      exp(s - running maximum)
//   dq       queries  keys     q      k          dout   v          k      p (t - delta)       p = exp(s - lse)
//   dk       keys     queries  k      q          v      dout       q      p (t - delta)
//   dv       keys     queries  k      q                            dout   p
//   dkv      keys     queries  kv     q          kv     dout       both of the last two, if keys and values are one tensor
// If keys and values are one tensor, forward copies each column tile to shared memory once, if that has room for two whole tiles:
//   head 128   103 KB: A100 (163 KB) and H100 (227 KB)      head 256   183 KB: H100
//   head 512   343 KB, so it copies every tile twice. Tiles of 64 columns would fit on an H100, and of 32 on an A100. But fewer
//              scores would share an operand: shared memory would take 2.5 or 3.0 rather than 2.2 cycles per mma.
//
// The tile, for a head of 512 and 16-bit types, has 64 rows and 8 warps. Its 64 x 512 sums take 128 registers of every thread,
// and everything else follows from that. Scores: a warp computes 32 x 32, and 4 ldmatrix.x4 feed 8 mma. Values: warp w owns
// columns 64 w to 64 w + 63 of all 64 rows, so no value is read from shared memory twice, and 8 ldmatrix.x4 (16 keys) feed 32
// mma. float has 32 rows, and half of everything per row. The same code has tiles of 64 x 256 and 64 x 128.
// Registers: 128 for the sums, 32 for each of s and t, 32 for operands. The limit is 255, for one block of 256 threads per
// multiprocessor. 224 to 255 are used (benchmarks/results/resources.md).
// Shared memory: the rows (65 KB per operand) stay resident if there is room. Columns and values stream through a ring of 3, 4 or
// 6 stages of 18 KB (128 tokens x 128 bytes for scores, 16 tokens x 512 elements of values). The weights take 17 KB.
// Limits, for a tile of 64 x 128, which is 4096 mma of 16 x 8 x 16:
//   tensor cores    2 cycles per mma on an A100 (1024 multiply-adds per cycle: NVIDIA's A100 whitepaper); on an H100 about 1.6
//                   with mma.sync, which reaches 63% of the peak (arXiv:2402.13499), and 1 with wgmma
//   shared memory   2.2 cycles per mma, counted by the emulator: 1.5 for ldmatrix, 0.5 for copies from L2, 0.2 for weights
//   L2              256 KB, 64 flop per byte: 352 TFLOP/s on an H100 that reads 5.5 TB/s (chipsandcheese.com, "Nvidia's H100:
//                   Funny L2, and Tons of Bandwidth")
// So this tile can reach at most about 90% of an A100's tensor-core peak and 36% of an H100's. More would take wgmma, which reads
// operands from shared memory once for 4 warps, and clusters, in which 2 blocks share the loads of the columns.
// Between a barrier and the next ldmatrix the compiler leaves 3 to 16 instructions (tests/test_attention_machine_code.py).
// Blocks take equal shares of the (row tile, column tile) pairs (attention_schedule.h). A second kernel combines the row tiles
// that blocks share, in order.
#pragma once

#include "attention.h"
#include "attention_schedule.h"
#include "device/divisor.cuh"
#include "device/memory.cuh"

namespace movq {
namespace attention {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kColumns = 128;        // tokens of a column tile
constexpr int kStripe = kWarps * 8;  // elements of the head that all warps cover together, 8 each
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The tile of one dtype and head size, and its layout in shared memory. Smaller heads run in the next size, padded with zeros:
// the copies to shared memory write them and read nothing.
template <class T_, int kHeadSize_>
struct Shape {
  using T = T_;
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr int kRows = 128 / sizeof(T);
  static constexpr int kSumTiles = kRows / 16;                // mma tiles down the sums of a warp, which has all rows
  static constexpr int kScoreTiles = kRows / 32;              // and down its scores: two warps share the rows, four the columns
  static constexpr int kStripes = kHeadSize / kStripe;        // and across its sums
  static constexpr int kDepth = 32 / sizeof(T);               // tokens or elements of one product
  static constexpr int kPieces = kHeadSize * sizeof(T) / 16;  // copies of 16 bytes per token

  // Chunks: 128 bytes of every column, or whole tokens of values.
  static constexpr int kScorePieces = 8, kScoreChunks = kPieces / kScorePieces;
  static constexpr int kValueTokens = kColumns * kScorePieces / kPieces, kValueChunks = kColumns / kValueTokens;

  // Shared memory, in bytes: statistics for the Pass, weights, resident rows, and the ring of stages. 16 bytes are added to a
  // pitch, or 8 elements to the values' pitch, so that the rows that one access reads lie in different banks.
  static constexpr int kScorePitch = kScorePieces * 16 + 16;
  static constexpr int kWeightPitch = kColumns * sizeof(T) + 16;
  static constexpr int kRowPitch = kPieces * 16 + 16;
  static constexpr int kValuePitch = (kHeadSize + 8) * sizeof(T);
  static constexpr int kStatistics = 4 * 64 * sizeof(float);
  static constexpr int kWeights = kStatistics, kResidentRows = kWeights + kRows * kWeightPitch;
  static constexpr int kOperandBytes = kRows * kRowPitch;      // of one resident row operand
  static constexpr int kColumnStage = kColumns * kScorePitch;  // of one chunk of columns or values
  static constexpr int kStreamedRows = kRows * kScorePitch;    // of one chunk of rows, if they are not resident
  static constexpr int kTileStage = kColumns * kValuePitch;    // of a whole column tile, in the layout of values
  // A column tile that is also the value tile stays whole, and is read once, if two fit beside the rows. The pitch of float
  // values has bank conflicts as columns.
  static constexpr int kWholeTileBytes = kResidentRows + kOperandBytes + 2 * kTileStage;
  static constexpr bool kHasWholeTiles = sizeof(T) == 2 && kHeadSize <= 256;
  static_assert(kHeadSize % (2 * kStripe) == 0 && kValueTokens % kDepth == 0 && kValueTokens * kValuePitch <= kColumnStage);

  using Scores = float[kScoreTiles][4][4];
  using Sums = float[kSumTiles][kStripes][4];

  // Where a thread's registers lie in the tile: element e of mma tile (m, n) holds this row, and this column or the next (odd e).
  MOVQ_DEVICE static int score_row(int m, int e) { return warp_id() / 4 * 16 * kScoreTiles + m * 16 + lane_id() / 4 + e / 2 * 8; }
  MOVQ_DEVICE static int score_column(int n) { return warp_id() % 4 * 32 + n * 8 + lane_id() % 4 * 2; }
  MOVQ_DEVICE static int sum_row(int m, int e) { return m * 16 + lane_id() / 4 + e / 2 * 8; }
  MOVQ_DEVICE static int sum_column(int n) { return (warp_id() * kStripes + n) * 8 + lane_id() % 4 * 2; }
};

// The base of a row's exponents, given its maximum: 0 while all scores are -inf, so that their weights are 0 rather
// than NaN.
MOVQ_DEVICE float finite_base(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// The factor that normalises a row's sums, given the total of its weights: 0 if all scores are -inf, as in PyTorch.
MOVQ_DEVICE float inverse_total(float total) { return total == 0 ? 0.0f : 1 / total; }

// Sizes of the problem, as rows and columns.
struct Extents {
  int rows, columns;  // tokens
  int head_size;      // elements
  int head_pieces;    // of 16 bytes
  Divisor heads;
};

// Tiles per head.
struct TileCounts {
  Divisor row_tiles, column_tiles;
  int all_row_tiles;  // over all heads and images
};

// The part of shared memory that depends on the device, in bytes.
struct Ring {
  int resident_operands;   // row operands that stay; the others stream together with the columns
  int stages;              // 3, 4 or 6; or 2 whole column tiles
  int chunks_per_barrier;  // 1, or 2 if there are 6 stages
  int start, stage_bytes, end;
};

// How a problem is partitioned; see make_plan() in attention_plan.h.
struct Plan {
  Extents extents;
  TileCounts counts;
  Schedule schedule;
  Ring ring;
};

// The tokens of a tensor, with strides in units of 16 bytes: 32-bit arithmetic reaches 64 GB.
template <class T>
struct TokenView {
  T* data;
  uint32_t batch_stride, head_stride, token_stride;

  MOVQ_DEVICE uint32_t position(int image, int head, int token) const {
    return image * batch_stride + head * head_stride + token * token_stride;
  }
  MOVQ_DEVICE T* at(uint32_t position) const { return data + uint64_t(position) * (16 / sizeof(T)); }
};

template <class T>
struct Operands {
  TokenView<const T> row[2], column[2], value[2];
};

// A block's share of one row tile.
struct Segment {
  int tile, image, head;     // tile counts the row tiles of all heads and images
  int row_tile;              // row tile within the head
  int first_tile, end_tile;  // column tiles [first_tile, end_tile)
  int part;                  // index of the partial result, or -1 if this block has the whole row tile

  // `unit` is the block's next unit, and `end_unit` the end of its share. A block has at most two parts: of a row tile that an
  // earlier block started, and of one that a later block ends.
  MOVQ_DEVICE Segment(const Plan& plan, int unit, int end_unit) {
    const Divisor &row_tiles = plan.counts.row_tiles, &column_tiles = plan.counts.column_tiles;
    tile = unit / column_tiles;
    first_tile = unit - tile * column_tiles.value;
    end_tile = min(column_tiles.value, first_tile + end_unit - unit);
    const int image_head = tile / row_tiles;
    row_tile = tile - image_head * row_tiles.value;
    image = image_head / plan.extents.heads;
    head = image_head - image * plan.extents.heads.value;
    part = first_tile == 0 && end_tile == column_tiles.value ? -1 : 2 * int(blockIdx.x) + (first_tile == 0);
  }

  // The index of a token of this head among the tokens of all heads and images.
  MOVQ_DEVICE int64_t token_index(const Extents& extents, int tokens_per_head, int token) const {
    return (int64_t(image) * extents.heads.value + head) * tokens_per_head + token;
  }
};

}  // namespace attention
}  // namespace movq
