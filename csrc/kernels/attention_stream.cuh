// The data of one segment of attention in shared memory: its rows, the chunks that stream through the ring of stages, and the
// weights. All positions in shared memory are in bytes. If keys and values are one tensor, a stage may hold a whole column tile,
// which serves both products (Pass::kWholeTiles); the next tile is requested after the first products of each.
//
// One block runs per multiprocessor, so nothing hides instructions between a barrier and the products after it. Positions are
// therefore computed before the barrier, and the next chunk is requested after the first products: copying takes as long as
// three chunks of products, and its 30 instructions run while the tensor cores work.
#pragma once

#include "attention_tile.cuh"
#include "device/barrier.cuh"
#include "device/cp_async.cuh"
#include "device/fragment.cuh"
#include "device/ldmatrix.cuh"

namespace movq {
namespace attention {

template <class Shape, class Pass>
class Stream {
  using T = typename Shape::T;
  using Scores = typename Shape::Scores;
  using Sums = typename Shape::Sums;
  static constexpr bool kWholeTiles = Pass::kWholeTiles;
  static constexpr unsigned kScoreSteps = Pass::kProducts * Shape::kScoreChunks;
  static constexpr unsigned kSteps = kWholeTiles ? 1 : kScoreSteps + Pass::kValues * Shape::kValueChunks;
  static constexpr int kColumnPitch = kWholeTiles ? Shape::kValuePitch : Shape::kScorePitch;

 public:
  MOVQ_DEVICE Stream(const Plan& plan, const Operands<T>& operands, const Segment& segment)
      : plan_(plan),
        operands_(operands),
        segment_(segment),
        memory_(0, plan.ring.end),
        request_stage_(plan.ring.start),
        ready_(plan.ring.start) {
    // The resident rows belong to the first group of copies.
    for (int i = 0; i < plan.ring.resident_operands; ++i) {
      copy_rows<Shape::kPieces>(i, 0, resident_rows(i), Shape::kRowPitch);
    }
#pragma unroll 1  // unrolling gains nothing and doubles the code
    for (int i = 0; i < plan.ring.stages - plan.ring.chunks_per_barrier; ++i) request_chunk();
  }

  // Calls function(synced, chunk) for the chunks of scores, or of values, as soon as each can be read. A barrier also shows that
  // all warps have read the chunks before it, which can then be replaced. The next of whole tiles is in flight during values.
  template <class Function>
  MOVQ_DEVICE void for_each_score_chunk(Function&& function) {
    for_each_chunk<Shape::kScoreChunks, kWholeTiles ? 0 : 2>(function);
  }
  template <class Function>
  MOVQ_DEVICE void for_each_value_chunk(Function&& function) {
    for_each_chunk<Shape::kValueChunks, kWholeTiles ? 1 : 2>(function);
  }

  // After the last chunk: all copies have landed and no thread reads them any longer.
  MOVQ_DEVICE Synced drain() {
    cp_async_wait<0>();
    return block_barrier();
  }

  // s += row[product] . column[product]^T over the next chunk, which is this chunk of the product. Requests another chunk.
  MOVQ_DEVICE void add_scores(Synced, Scores& s, int product, int chunk) {
    const int lane = lane_id();
    const bool resident = kWholeTiles || row_operand(product) < plan_.ring.resident_operands;
    const int pitch = resident ? Shape::kRowPitch : Shape::kScorePitch;
    const int first_row =
        resident ? resident_rows(row_operand(product)) + chunk * Shape::kScorePieces * 16 : ready_ + Shape::kColumnStage;
    const int rows = first_row + (warp_id() / 4 * 16 * Shape::kScoreTiles + lane % 16) * pitch + lane / 16 * 16;
    const int first_column = kWholeTiles ? ready_ + chunk * Shape::kScorePieces * 16 : ready_;
    const int columns = first_column + (warp_id() % 4 * 32 + lane / 16 * 8 + lane % 8) * kColumnPitch + lane / 8 % 2 * 16;
    multiply_scores(s, rows, columns, pitch);
    if (!kWholeTiles || chunk == 0) request_chunk();
#pragma unroll(sizeof(T) == 2 ? 3 : 1)  // 3 of float would spill on sm_100 and sm_120
    for (int k = 32; k < Shape::kScorePieces * 16; k += 32) multiply_scores(s, rows + k, columns + k, pitch);
    if (!kWholeTiles) next_stage();
  }

  // Stores the weights at (row, column) and (row, column + 1).
  MOVQ_DEVICE void store_weights(Synced, int row, int column, float left, float right) const {
    const int at = Shape::kWeights + row * Shape::kWeightPitch + column * int(sizeof(T));
    if constexpr (sizeof(T) == 2) Shared<uint32_t>(at, 1).store(0, pack<T>(left, right));
    else Shared<Vec<float, 2>>(at, 1).store(0, {{left, right}});
  }

  // sums += weights . value over the next chunk, which is this chunk of the tile. Calls before_products() once operands are on
  // their way from shared memory. Requests another chunk.
  template <class Function>
  MOVQ_DEVICE void add_values(Synced, Sums& sums, int chunk, Function&& before_products) {
    const int lane = lane_id();
    const int weights =
        Shape::kWeights + lane % 16 * Shape::kWeightPitch + lane / 16 * 16 + chunk * Shape::kValueTokens * int(sizeof(T));
    const int first_token = kWholeTiles ? chunk * Shape::kValueTokens : 0;
#pragma unroll
    for (int token = 0; token < Shape::kValueTokens; token += Shape::kDepth) {
      uint32_t a[Shape::kSumTiles][4], b[Shape::kStripes / 2][4];
#pragma unroll
      for (int m = 0; m < Shape::kSumTiles; ++m) {
        ldmatrix_x4(a[m], memory_, weights + token * int(sizeof(T)) + m * 16 * Shape::kWeightPitch);
      }
#pragma unroll
      for (int n = 0; n < Shape::kStripes / 2; ++n)
        load_values(b[n], first_token + token, 8 * (warp_id() * Shape::kStripes + 2 * n));
      if (token == 0) before_products();
#pragma unroll
      for (int n = 0; n < Shape::kStripes / 2; ++n) {
        const Fragment<T, 2> left(b[n]), right(b[n] + 2);
#pragma unroll
        for (int m = 0; m < Shape::kSumTiles; ++m) {
          const Fragment<T, 4> weight(a[m]);
          multiply_add(sums[m][2 * n], weight, left);
          multiply_add(sums[m][2 * n + 1], weight, right);
        }
        if (!kWholeTiles && token == 0 && n == 0) request_chunk();
      }
    }
    if (!kWholeTiles || chunk == Shape::kValueChunks - 1) next_stage();
  }

 private:
  template <int kCount, int kPending, class Function>
  MOVQ_DEVICE void for_each_chunk(Function&& function) {
    // With two products no register is left for a variable.
    const int chunks_per_barrier = kWholeTiles ? kCount : Pass::kProducts == 1 ? plan_.ring.chunks_per_barrier : 1;
#pragma unroll 1
    for (int chunk = 0; chunk < kCount;) {
      if (!kWholeTiles && plan_.ring.stages == 3) cp_async_wait<1>();
      else cp_async_wait<kPending>();
      const Synced synced = block_barrier();
#pragma unroll 1
      for (int end = chunk + chunks_per_barrier; chunk < end; ++chunk) function(synced, chunk);
    }
  }

  MOVQ_DEVICE void next_stage() {
    ready_ += plan_.ring.stage_bytes;
    if (ready_ == plan_.ring.end) ready_ = plan_.ring.start;
  }

  // Products may share a row operand.
  MOVQ_DEVICE static int row_operand(int product) { return min(product, Pass::kRowOperands - 1); }
  MOVQ_DEVICE static int resident_rows(int operand) { return Shape::kResidentRows + operand * Shape::kOperandBytes; }

  // One product of 32 bytes of the head.
  MOVQ_DEVICE void multiply_scores(Scores& s, int rows, int columns, int row_pitch) const {
    uint32_t b[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) ldmatrix_x4(b[n], memory_, columns + n * 16 * kColumnPitch);
    const Fragment<T, 2> right[4] = {Fragment<T, 2>(b[0]), Fragment<T, 2>(b[0] + 2), Fragment<T, 2>(b[1]),
                                     Fragment<T, 2>(b[1] + 2)};
#pragma unroll
    for (int m = 0; m < Shape::kScoreTiles; ++m) {
      uint32_t a[4];
      ldmatrix_x4(a, memory_, rows + m * 16 * row_pitch);
      const Fragment<T, 4> left(a);
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply_add(s[m][n], left, right[n]);
    }
  }

  // Loads two adjacent b operands, from this token of the ready chunk and this element of the head.
  MOVQ_DEVICE void load_values(uint32_t (&b)[4], int token, int element) const {
    constexpr int kPitch = Shape::kValuePitch;
    const int lane = lane_id();
    if constexpr (sizeof(T) == 2) {
      ldmatrix_x4<true>(b, memory_, ready_ + (token + lane % 16) * kPitch + (element + lane / 16 * 8) * int(sizeof(T)));
    } else {  // ldmatrix transposes 16-bit elements only
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = token + lane % 4 + i % 2 * 4, column = element + i / 2 * 8 + lane / 4;
        b[i] = Shared<uint32_t>(ready_ + row * kPitch + column * int(sizeof(T)), 1).load(0);
      }
    }
  }

  // Starts the copies of the next chunk, if there is one. Closes a group of copies either way, so that waits can count groups.
  MOVQ_DEVICE void request_chunk() {
    const unsigned tile = segment_.first_tile + requested_ / kSteps, step = requested_ % kSteps;
    if (tile < unsigned(segment_.end_tile)) {
      const int first_column = tile * kColumns;
      if constexpr (kWholeTiles) {
        copy<Shape::kPieces, kColumns>(operands_.column[0], first_column, plan_.extents.columns, 0, request_stage_,
                                       Shape::kValuePitch);
      } else if (step < kScoreSteps) {
        const int product = step / Shape::kScoreChunks, first_piece = step % Shape::kScoreChunks * Shape::kScorePieces;
        copy<Shape::kScorePieces, kColumns>(operands_.column[product], first_column, plan_.extents.columns, first_piece,
                                            request_stage_, Shape::kScorePitch);
        if (row_operand(product) >= plan_.ring.resident_operands) {
          copy_rows<Shape::kScorePieces>(row_operand(product), first_piece, request_stage_ + Shape::kColumnStage,
                                         Shape::kScorePitch);
        }
      } else {
        const int value = (step - kScoreSteps) / Shape::kValueChunks;
        const int token = first_column + (step - kScoreSteps) % Shape::kValueChunks * Shape::kValueTokens;
        copy<Shape::kPieces, Shape::kValueTokens>(operands_.value[value], token, plan_.extents.columns, 0, request_stage_,
                                                  Shape::kValuePitch);
      }
      ++requested_;
      request_stage_ += plan_.ring.stage_bytes;
      if (request_stage_ == plan_.ring.end) request_stage_ = plan_.ring.start;
    }
    cp_async_commit();
  }

  template <int kPieces>
  MOVQ_DEVICE void copy_rows(int operand, int first_piece, int to, int pitch) const {
    copy<kPieces, Shape::kRows>(operands_.row[operand], segment_.row_tile * Shape::kRows, plan_.extents.rows, first_piece, to,
                                pitch);
  }

  // Copies `kPieces` times 16 bytes of each of `kTokens` tokens, zeros beyond the last token and the head size. A thread copies
  // the same piece of every kThreads / kPieces-th token.
  template <int kPieces, int kTokens>
  MOVQ_DEVICE void copy(const TokenView<const T>& from, int first_token, int end_token, int first_piece, int to,
                        int pitch) const {
    constexpr int kStep = kThreads / kPieces;
    const int token = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const uint32_t position = from.position(segment_.image, segment_.head, first_token + token) + first_piece + piece;
    const int tokens = first_piece + piece < plan_.extents.head_pieces ? end_token - first_token - token : 0;
    to += token * pitch + piece * 16;
#pragma unroll
    for (int i = 0; i < kTokens; i += kStep) {
      cp_async_16(memory_, to + i * pitch, from.at(position + i * from.token_stride), i < tokens);
    }
  }

  const Plan& plan_;
  const Operands<T>& operands_;
  const Segment& segment_;
  const Shared<unsigned char> memory_;
  unsigned requested_ = 0;  // chunks
  int request_stage_;       // the stage for the next
  int ready_;               // the stage to read next
};

}  // namespace attention
}  // namespace movq
