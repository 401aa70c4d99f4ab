// What the four kernels of attention share. Each walks a tile of rows, held by one block, over tiles of 128 columns:
//   scores   s = row[0] . column[0]^T (and for two of the gradients t = row[1] . column[1]^T), in registers;
//   weights  a function of s, t and statistics, rounded to T, in shared memory: this is where the kernels differ;
//   values   sums += weights . value, in registers.
//
//            rows     columns  row[0] column[0]  row[1] column[1]  value  weights
//   forward  queries  keys     q      k                            v      exp(s - running maximum)
//   dq       queries  keys     q      k          dout   v          k      p (t - delta)       p = exp(s - lse)
//   dk       keys     queries  k      q          v      dout       q      p (t - delta)
//   dv       keys     queries  k      q                            dout   p
//
// The tile, for a head of 512 and 16-bit types, has 64 rows and 8 warps. Its 64 x 512 sums take 128 registers of every thread,
// and everything else follows from that. Scores: a warp computes 32 x 32, and 4 ldmatrix.x4 feed 8 mma. Values: warp w owns
// columns 64 w to 64 w + 63 of all 64 rows, so no value is read from shared memory twice, and 8 ldmatrix.x4 (16 keys) feed 32
// mma. float has 32 rows, and half of everything per row.
// Registers: 128 for the sums, 32 for each of s and t, 24 for operands. The limit is 255, for one block of 256 threads per
// multiprocessor.
// Shared memory: the rows (65 KB per operand) stay resident if there is room. Columns and values stream through a ring of stages
// of 18 KB (128 tokens x 128 bytes for scores, 16 tokens x 512 elements of values). The weights take 17 KB.
// Limits, for a tile of 64 x 128, which is 4096 mma of 16 x 8 x 16:
//   tensor cores    2 cycles per mma on sm_80; on sm_90 about 1.6 with mma.sync (1 with wgmma)
//   shared memory   2.2 cycles per mma, counted by the emulator: 1.5 for ldmatrix, 0.5 for copies from L2, 0.2 for weights
//   L2              256 KB, 64 flop per byte: 352 TFLOP/s on an H100 that reads 5.5 TB/s
// So this tile can reach at most about 90% of an A100's tensor-core peak and 36% of an H100's. More would take wgmma, which reads
// operands from shared memory once for 4 warps, and clusters, in which 2 blocks share the loads of the columns.
// Blocks: the (row tile, column tile) pairs are units of work in one line. Each block takes an equal, contiguous share, so any
// number of tokens fills the GPU. A second kernel combines the row tiles that blocks share, in order.
#pragma once

#include "attention.h"
#include "device/memory.cuh"

namespace movq {
namespace attention {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kColumns = 128;        // tokens of a column tile
constexpr int kStripe = kWarps * 8;  // elements of the head that all warps cover together, 8 each
constexpr int kMaxStripes = kMaxHeadSize / kStripe;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Shared memory, in bytes.
constexpr int kBankOffset = 16;  // added to the pitch of rows, so that the 8 rows of an ldmatrix lie in different banks
constexpr int kScoreChunk = 128, kScorePitch = kScoreChunk + kBankOffset;  // bytes of one token in a chunk for scores
constexpr int kStatistics = 5 * 64 * sizeof(float);                        // bytes for the Pass, at the start of shared memory

template <class T>
struct Tile {
  static constexpr int kRows = 128 / sizeof(T);
  static constexpr int kSumTiles = kRows / 16;            // mma tiles down the sums of a warp, which has all rows
  static constexpr int kScoreTiles = kRows / 32;          // and down its scores: two warps share the rows, four the columns
  static constexpr int kDepth = 32 / sizeof(T);           // tokens of one product
  static constexpr int kAccessElements = 16 / sizeof(T);  // elements per 16-byte copy
  static constexpr int kWeightPitch = kColumns * sizeof(T) + kBankOffset;  // bytes
};

template <class T> using Scores = float[Tile<T>::kScoreTiles][4][4];
template <class T> using Sums = float[Tile<T>::kSumTiles][kMaxStripes][4];

// What to subtract from a row's exponents, given its maximum: 0 while all scores are -inf, so that their weights are 0 rather
// than NaN.
MOVQ_DEVICE float finite_base(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// What to multiply a row's sums by, given the total of its weights: 0 if all scores are -inf, as in PyTorch.
MOVQ_DEVICE float inverse_total(float total) { return total == 0 ? 0.0f : 1 / total; }

// Where a thread's registers lie in the tile: element e of mma tile (m, n) holds this row, and this column or the next (odd e).
template <class T>
MOVQ_DEVICE int score_row(int m, int e) {
  return warp_id() / 4 * 16 * Tile<T>::kScoreTiles + m * 16 + lane_id() / 4 + e / 2 * 8;
}
MOVQ_DEVICE int score_column(int n) { return warp_id() % 4 * 32 + n * 8 + lane_id() % 4 * 2; }
MOVQ_DEVICE int sum_row(int m, int e) { return m * 16 + lane_id() / 4 + e / 2 * 8; }
MOVQ_DEVICE int sum_column(int stripes, int n) { return (warp_id() * stripes + n) * 8 + lane_id() % 4 * 2; }

// The problem as the walk sees it.
struct Extents {
  int rows, columns;  // tokens
  int head_size;      // elements
  int heads;
};

struct TileCounts {
  int row_tiles, column_tiles;  // tiles per head
  int all_row_tiles;            // row tiles over all heads and images
};

// Units of work and the blocks that take them: `share` units each, and the first `remainder` blocks one more.
struct Schedule {
  int blocks, share, remainder;

  MOVQ_HOST_DEVICE int first_unit(int block) const { return block * share + min(block, remainder); }
  MOVQ_DEVICE int block_of(int unit) const {
    const int in_longer_shares = remainder * (share + 1);
    return unit < in_longer_shares ? unit / (share + 1) : remainder + (unit - in_longer_shares) / share;
  }
};

// How a column tile is streamed: the chunks of each product's scores, then those of the values.
struct Chunks {
  int products;           // products that make scores: 1 or 2
  int score_chunks;       // chunks per product, of kScoreChunk bytes of every token
  int value_tokens;       // whole tokens per chunk of values
  int block_copy_tokens;  // whole tokens of values that the block's threads copy at once
  int stripes;            // the head size in stripes, rounded up to an even number
};

// Offsets and sizes in bytes. Statistics come first, then the weights, the resident rows, and the ring of stages.
struct SharedLayout {
  int resident_operands;  // row operands that stay; the others stream together with the columns
  int row_pitch, value_pitch;
  int weights, rows, ring;
  int stage_bytes, stages;
  int total_bytes;
};

// How a problem is cut; see make_plan() in attention_plan.h.
struct Plan {
  Extents extents;
  TileCounts counts;
  Schedule schedule;
  Chunks chunks;
  SharedLayout shared;
};

// The tokens of an input; strides in elements.
template <class T>
struct Source {
  const T* data;
  int64_t batch_stride, head_stride, token_stride;

  MOVQ_DEVICE const T* head(int64_t image, int64_t head) const { return data + image * batch_stride + head * head_stride; }
};

template <class T>
struct Operands {
  Source<T> row[2], column[2], value;
};

// What a block does of one row tile.
struct Segment {
  int tile, image, head;     // tile counts the row tiles of all heads and images
  int row_tile;              // row tile within the head
  int first_tile, end_tile;  // column tiles [first_tile, end_tile)
  int part;                  // the index of the partial result, or -1 if this block has the whole row tile

  // `unit` is the next of the block's units [first_unit, end_unit).
  MOVQ_DEVICE Segment(const Plan& plan, int unit, int first_unit, int end_unit) {
    const TileCounts& counts = plan.counts;
    tile = unit / counts.column_tiles;
    first_tile = unit - tile * counts.column_tiles;
    end_tile = min(counts.column_tiles, first_tile + end_unit - unit);
    image = image_head(counts) / plan.extents.heads;
    head = image_head(counts) - image * plan.extents.heads;
    row_tile = tile - image_head(counts) * counts.row_tiles;
    part = first_tile == 0 && end_tile == counts.column_tiles ? -1 : 2 * int(blockIdx.x) + (unit != first_unit);
  }

  // The index of the head among those of all images. Not stored, because registers are short.
  MOVQ_DEVICE int image_head(const TileCounts& counts) const { return tile / counts.row_tiles; }
};

}  // namespace attention
}  // namespace movq
