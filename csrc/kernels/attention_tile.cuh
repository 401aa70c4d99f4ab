// What the four kernels of attention share. Each is, for a tile of rows held by one block, a walk over tiles of 128 columns:
//   scores   s = row[0] . column[0]^T (and, for two of the gradients, t = row[1] . column[1]^T), in registers;
//   weights  a function of s and t and of statistics, rounded to T into shared memory: what differs between the kernels;
//   values   accumulated += weights . value, in registers.
//
//            rows     columns  row[0] column[0]  row[1] column[1]  value  weights
//   forward  queries  keys     q      k                            v      exp(s - running maximum)
//   dq       queries  keys     q      k          dout   v          k      p (t - delta)       p = exp(s - lse)
//   dk       keys     queries  k      q          v      dout       q      p (t - delta)
//   dv       keys     queries  k      q                            dout   p
//
// The tile, for a head of 512 and 16-bit types: 64 rows, 8 warps. What 64 x 512 sums need, 128 registers of every thread, decides
// all else. Values: warp w owns columns 64 w .. 64 w + 63 of all 64 rows, so that no value is read from shared memory twice: 8
// ldmatrix.x4 (16 keys) for 32 mma. Scores: a warp computes 32 x 32, 4 ldmatrix.x4 for 8 mma. float: 32 rows, half of everything
// per row.
// Registers: 128 for the sums, 32 for each of s and t, 24 for operands: at most 255, one block of 256 threads a multiprocessor.
// Shared memory: the rows (65 KB an operand) stay where there is room for them; columns and values stream through a ring of
// stages of 18 KB (128 tokens x 128 bytes of scores, or 16 tokens x 512 values); the weights take 17 KB.
// Limits, for a tile of 64 x 128, which is 4096 mma of 16 x 8 x 16:
//   tensor cores    2 cycles an mma on sm_80; on sm_90 about 1.6 by mma.sync (1 at wgmma's rate)
//   shared memory   2.2 cycles an mma, counted by the emulator: 1.5 for ldmatrix, 0.5 for copies from L2, the rest for weights
//   L2              256 KB, 64 flop a byte: 352 TFLOP/s on an H100 that reads 5.5 TB/s
// So some 90% of an A100's tensor-core peak and 36% of an H100's are what this tile can reach at best. More takes wgmma, whose
// operands are read from shared memory once for 4 warps, and columns that a cluster loads once for 2 blocks.
// Blocks: (row tile, column tile) pairs are units of work in one line, of which every block takes an equal, contiguous share, so
// the GPU is full whatever the number of tokens. A row tile that blocks share is combined, in order, by a second kernel.
#pragma once

#include "attention.h"
#include "device/cp_async.cuh"
#include "device/fragment.cuh"
#include "device/ldmatrix.cuh"
#include "device/math.cuh"
#include "device/memory.cuh"
#include "device/reduce.cuh"

namespace movq {
namespace attention {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kColumns = 128;
constexpr int kStripe = kWarps * 8;  // columns of the values: 8 of every warp
constexpr int kStripes = kMaxHeadSize / kStripe;
constexpr int kScorePitch = 64 + 8;  // of a score chunk, in 16-bit units; the 8 put eight rows into different banks
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

constexpr int kStatistics = 5 * 64;  // floats at the start of shared memory for the passes' own use

using Unit = uint16_t;  // what shared memory is counted in

template <class T>
struct Tile {
  static constexpr int kUnits = sizeof(T) / sizeof(Unit);
  static constexpr int kRows = 128 / sizeof(T);
  static constexpr int kHeight = kRows / 16;       // mma tiles down all rows, as one warp sees them among the values
  static constexpr int kScoreHeight = kRows / 32;  // and among the scores: two warps share the rows, four the columns
  static constexpr int kDepth = 32 / sizeof(T);    // tokens of one product
  static constexpr int kPer16 = 16 / sizeof(T);    // elements of one copy
  static constexpr int kWeightPitch = kColumns * kUnits + 8;
};

template <class T> using Scores = float[Tile<T>::kScoreHeight][4][4];
template <class T> using Sums = float[Tile<T>::kHeight][kStripes][4];

// Where the tokens of one tensor lie; read by the kernel, so const.
template <class T>
struct Source {
  const T* data;
  int64_t batch_stride, head_stride, token_stride;

  MOVQ_DEVICE const T* head(int64_t image, int64_t head) const { return data + image * batch_stride + head * head_stride; }
};

// How a problem is cut; made by plan() in attention_plan.h.
struct Plan {
  int rows, columns, size, heads;
  int row_tiles, column_tiles;
  int tiles;                // row tiles of all heads and images
  int blocks, share, rest;  // each block takes `share` of the tiles * column_tiles units, the first `rest` blocks one more
  int products;             // scores of one tile: 1 or 2
  int score_chunks;         // of one product
  int value_chunk;          // tokens of one
  int token_step;           // whole tokens of values that the block's threads copy at once
  int stripes;              // in the head size, rounded up to an even number
  int residents;            // row operands that stay in shared memory
  int resident_pitch, value_pitch;
  int weights, rows_at, stage_at, stage;  // places in shared memory, behind the statistics, and the size of a stage, in units
  int stages;
  int shared_bytes;
  float scale;
};

// The first unit of a block, and the block of a unit.
MOVQ_HOST_DEVICE int first_unit(const Plan& p, int block) { return block * p.share + min(block, p.rest); }
MOVQ_DEVICE int block_of(const Plan& p, int unit) {
  const int longer = p.rest * (p.share + 1);
  return unit < longer ? unit / (p.share + 1) : p.rest + (unit - longer) / p.share;
}

// What a block does of one row tile.
struct Segment {
  int tile, image, head, first_row;
  int begin, end;  // column tiles
  int slot;        // where its part result goes, or -1 if the result is whole

  MOVQ_DEVICE Segment(const Plan& p, int unit, int first, int last) {
    tile = unit / p.column_tiles;
    begin = unit - tile * p.column_tiles;
    end = min(p.column_tiles, begin + last - unit);
    const int pair = tile / p.row_tiles;
    image = pair / p.heads;
    head = pair - image * p.heads;
    first_row = (tile - pair * p.row_tiles);
    slot = begin == 0 && end == p.column_tiles ? -1 : 2 * int(blockIdx.x) + (unit != first);
  }
};

template <class T>
struct Operands {
  Source<T> row[2], column[2], value;
};

// The rows of a segment and the stream of chunks its walk consumes, in shared memory.
template <class T>
class Stream {
 public:
  using Sizes = Tile<T>;

  MOVQ_DEVICE Stream(const Plan& p, const Operands<T>& operands, const Segment& s)
      : p_(p), operands_(operands), segment_(s), memory_(0, p.shared_bytes / sizeof(Unit)), tile_(s.begin) {
    // The rows belong to the first group of copies.
    for (int chunk = 0; chunk < p.score_chunks; ++chunk) {
      const int first = s.first_row * Sizes::kRows, to = p.rows_at + chunk * 64, next = Sizes::kRows * p.resident_pitch;
      if (p.residents > 0) load_block<Sizes::kRows>(operands.row[0], first, p.rows, chunk, to, p.resident_pitch);
      if (p.residents > 1) load_block<Sizes::kRows>(operands.row[1], first, p.rows, chunk, to + next, p.resident_pitch);
    }
#pragma unroll 1  // it is not worth its size
    for (int i = 0; i < p.stages - 1; ++i) request();
  }

  // Makes the next chunk ready to be read, and what was written to shared memory before visible to all.
  MOVQ_DEVICE void advance() {
    switch (p_.stages) {
      case 2: cp_async_wait<0>(); break;
      case 3: cp_async_wait<1>(); break;
      default: cp_async_wait<2>(); break;
    }
    __syncthreads();
    if (++from_ == p_.stages) from_ = 0;
    ready_ = p_.stage_at + from_ * p_.stage;
    request();
  }

  // After the last chunk: nobody reads any longer.
  MOVQ_DEVICE void drain() {
    cp_async_wait<0>();
    __syncthreads();
  }

  // s += row[product] . column[product]^T over the ready chunk, which is the product's chunk of this index.
  MOVQ_DEVICE void add_scores(Scores<T>& s, int product, int chunk) const {
    const bool resident = product < p_.residents;
    const int lane = lane_id(), height = 16 * Sizes::kScoreHeight;
    const int pitch = resident ? p_.resident_pitch : kScorePitch;
    const int rows = (resident ? p_.rows_at + product * Sizes::kRows * pitch + chunk * 64 : ready_ + kColumns * kScorePitch) +
                     (warp_id() / 4 * height + lane % 16) * pitch + lane / 16 * 8;
    const int columns = ready_ + (warp_id() % 4 * 32 + lane / 16 * 8 + lane % 8) * kScorePitch + lane / 8 % 2 * 8;
#pragma unroll(sizeof(T) == 2 ? 4 : 2)  // more of float would spill on sm_100 and sm_120
    for (int k = 0; k < 64; k += 16) {
      uint32_t b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) ldmatrix(b[n], memory_, columns + n * 16 * kScorePitch + k);
      const Fragment<T, 2> right[4] = {Fragment<T, 2>(b[0]), Fragment<T, 2>(b[0] + 2), Fragment<T, 2>(b[1]),
                                       Fragment<T, 2>(b[1] + 2)};
#pragma unroll
      for (int m = 0; m < Sizes::kScoreHeight; ++m) {
        uint32_t a[4];
        ldmatrix(a, memory_, rows + m * 16 * pitch + k);
        const Fragment<T, 4> left(a);
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply(s[m][n], left, right[n]);
      }
    }
  }

  // Element (row, column), (row, column + 1) of the weights.
  MOVQ_DEVICE void store_weights(int row, int column, float left, float right) const {
    const int at = row * Sizes::kWeightPitch + column * Sizes::kUnits + p_.weights;
    if constexpr (sizeof(T) == 2) {
      Shared<uint32_t>(0, p_.shared_bytes / 4).store(at / 2, pack<T>(left, right));
    } else {
      Shared<float>(0, p_.shared_bytes / 4).store_vec(at / 2, Vec<float, 2>{{left, right}});
    }
  }

  // sums += weights . value over the ready chunk, which begins at this token of the column tile.
  MOVQ_DEVICE void add_values(Sums<T>& sums, int token) const {
    const int lane = lane_id();
    for (int t = 0; t < p_.value_chunk; t += Sizes::kDepth) {
      const int weights = p_.weights + lane % 16 * Sizes::kWeightPitch + (token + t) * Sizes::kUnits + lane / 16 * 8;
      uint32_t a[Sizes::kHeight][4];
#pragma unroll
      for (int m = 0; m < Sizes::kHeight; ++m) ldmatrix(a[m], memory_, weights + m * 16 * Sizes::kWeightPitch);
#pragma unroll
      for (int n = 0; n < kStripes; n += 2) {
        if (n >= p_.stripes) break;
        uint32_t b[4];
        load_values(b, t, warp_id() * 8 * p_.stripes + 8 * n);
        const Fragment<T, 2> left(b), right(b + 2);
#pragma unroll
        for (int m = 0; m < Sizes::kHeight; ++m) {
          const Fragment<T, 4> weight(a[m]);
          multiply(sums[m][n], weight, left);
          multiply(sums[m][n + 1], weight, right);
        }
      }
    }
  }

 private:
  // Two b operands side by side: the chunk's values from token `t` and `column` on.
  MOVQ_DEVICE void load_values(uint32_t (&b)[4], int t, int column) const {
    const int lane = lane_id();
    if constexpr (sizeof(T) == 2) {
      ldmatrix<true>(b, memory_, ready_ + (t + lane % 16) * p_.value_pitch + column + lane / 16 * 8);
    } else {  // ldmatrix moves 16-bit elements: it cannot transpose these
      const Shared<uint32_t> words(0, p_.shared_bytes / 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        b[i] = words.load((ready_ + (t + lane % 4 + i % 2 * 4) * p_.value_pitch) / 2 + column + i / 2 * 8 + lane / 4);
      }
    }
  }

  // Asks for the next chunk, if there is one; a group of copies either way.
  MOVQ_DEVICE void request() {
    if (tile_ < segment_.end) {
      const int to = p_.stage_at + into_ * p_.stage, scores = p_.products * p_.score_chunks;
      if (step_ < p_.score_chunks) {
        load_scores(operands_.row[0], operands_.column[0], to, step_, p_.residents > 0);
      } else if (step_ < scores) {
        load_scores(operands_.row[1], operands_.column[1], to, step_ - p_.score_chunks, p_.residents > 1);
      } else {
        load_tokens(operands_.value, tile_ * kColumns + (step_ - scores) * p_.value_chunk, p_.value_chunk, to);
      }
      if (++step_ == scores + kColumns / p_.value_chunk) {
        step_ = 0;
        ++tile_;
      }
      if (++into_ == p_.stages) into_ = 0;
    }
    cp_async_commit();
  }

  MOVQ_DEVICE void load_scores(const Source<T>& row, const Source<T>& column, int to, int chunk, bool resident) const {
    load_block<kColumns>(column, tile_ * kColumns, p_.columns, chunk, to, kScorePitch);
    if (!resident)
      load_block<Sizes::kRows>(row, segment_.first_row * Sizes::kRows, p_.rows, chunk, to + kColumns * kScorePitch, kScorePitch);
  }

  // Copies 128 bytes of each of `Count` tokens from `first` on; zeros beyond either end. A thread keeps to 16 bytes of the 128.
  template <int Count>
  MOVQ_DEVICE void load_block(const Source<T>& source, int first, int limit, int chunk, int to, int pitch) const {
    const int token = threadIdx.x / 8, piece = threadIdx.x % 8, element = (chunk * 8 + piece) * Sizes::kPer16;
    const T* from = source.head(segment_.image, segment_.head) + (first + token) * source.token_stride + element;
    const int tokens = element < p_.size ? limit - first - token : 0;
    to += token * pitch + piece * 8;
#pragma unroll
    for (int i = 0; i < Count; i += kThreads / 8) copy(to + i * pitch, from + i * source.token_stride, i < tokens);
  }

  // Copies `count` whole tokens from `first` on; zeros beyond either end.
  MOVQ_DEVICE void load_tokens(const Source<T>& source, int first, int count, int to) const {
    const T* from = source.head(segment_.image, segment_.head) + first * source.token_stride;
    const int width = p_.stripes * kStripe / Sizes::kPer16;
    int token = threadIdx.x / width, piece = threadIdx.x - token * width;
    while (token < count) {
      const int element = piece * Sizes::kPer16;
      copy(to + token * p_.value_pitch + piece * 8, from + token * source.token_stride + element,
           first + token < p_.columns && element < p_.size);
      token += p_.token_step;
      piece += kThreads - p_.token_step * width;
      if (piece >= width) {
        piece -= width;
        ++token;
      }
    }
  }

  MOVQ_DEVICE void copy(int to, const T* from, bool valid) const {
    cp_async<8>(memory_, to, reinterpret_cast<const Unit*>(from), valid);
  }

  const Plan& p_;
  const Operands<T>& operands_;
  const Segment& segment_;
  const Shared<Unit> memory_;
  int tile_, step_ = 0, into_ = 0;  // what is asked for next, and the stage it goes to
  int from_ = -1, ready_ = 0;       // the stage that was made ready last, and where it is
};

// Which element of a tile of scores or sums a thread's registers hold: register e of mma tile (m, n).
template <class T>
MOVQ_DEVICE int score_row(int m, int e) {
  return warp_id() / 4 * 16 * Tile<T>::kScoreHeight + m * 16 + lane_id() / 4 + e / 2 * 8;
}
MOVQ_DEVICE int score_column(int n) { return warp_id() % 4 * 32 + n * 8 + lane_id() % 4 * 2; }
MOVQ_DEVICE int sum_row(int m, int e) { return m * 16 + lane_id() / 4 + e / 2 * 8; }
MOVQ_DEVICE int sum_column(const Plan& p, int n) { return (warp_id() * p.stripes + n) * 8 + lane_id() % 4 * 2; }

// Where results go: whole tiles to `out`, parts to `parts`, [slot][row][size].
template <class T>
struct Destination {
  T* out;
  int64_t batch_stride, head_stride, token_stride;
  float* parts;

  // Calls value(row of the tile, sum) for what is written.
  template <class F>
  MOVQ_DEVICE void write(const Plan& p, const Segment& s, const Sums<T>& sums, F&& value) const {
#pragma unroll
    for (int m = 0; m < Tile<T>::kHeight; ++m) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int row = sum_row(m, e), token = s.first_row * Tile<T>::kRows + row;
        if (token >= p.rows) continue;
#pragma unroll
        for (int n = 0; n < kStripes; ++n) {
          const int column = sum_column(p, n);
          if (n >= p.stripes || column >= p.size) break;
          const Vec<float, 2> pair = {{value(m, e, sums[m][n][e]), value(m, e, sums[m][n][e + 1])}};
          if (s.slot < 0) {
            store_vec(out + s.image * batch_stride + s.head * head_stride + token * token_stride + column, from_float<T>(pair));
          } else {
            store_vec(parts + (int64_t(s.slot) * Tile<T>::kRows + row) * p.size + column, pair);
          }
        }
      }
    }
  }
};

// One block's walk. Pass says what the weights are, see attention_forward.cu:
//   Pass(plan, arguments, segment)
//   prepare(tile)         before the first chunk of a column tile is read, all threads together
//   weigh(stream, tile, s, t)
//   rescale(sums)         before the tile's values are added
//   finish(sums)
template <class T, class Pass>
__global__ void __launch_bounds__(kThreads, 1) walk(const __grid_constant__ Plan p, const __grid_constant__ Operands<T> operands,
                                                    const __grid_constant__ typename Pass::Arguments arguments) {
  const int first = first_unit(p, blockIdx.x), last = first_unit(p, blockIdx.x + 1);
  for (int unit = first; unit < last;) {
    const Segment segment(p, unit, first, last);
    Stream<T> stream(p, operands, segment);
    Pass pass(p, arguments, segment);
    Sums<T> sums = {};
    for (int tile = segment.begin; tile < segment.end; ++tile) {
      Scores<T> s = {}, t = {};
      for (int chunk = 0; chunk < p.score_chunks; ++chunk) {
        stream.advance();
        if (chunk == 0) pass.prepare(tile);
        stream.add_scores(s, 0, chunk);
      }
      if constexpr (Pass::kProducts == 2) {
        for (int chunk = 0; chunk < p.score_chunks; ++chunk) {
          stream.advance();
          stream.add_scores(t, 1, chunk);
        }
      }
      pass.weigh(stream, tile, s, t);
      for (int token = 0; token < kColumns; token += p.value_chunk) {
        stream.advance();
        if (token == 0) pass.rescale(sums);
        stream.add_values(sums, token);
      }
    }
    stream.drain();
    pass.finish(sums);
    unit += segment.end - segment.begin;
  }
}

}  // namespace attention
}  // namespace movq
