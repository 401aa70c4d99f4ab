// The data of one segment of attention in shared memory: its rows, the chunks that stream through the ring of stages, and the
// weights. All positions in shared memory are in bytes.
#pragma once

#include "attention_tile.cuh"
#include "device/barrier.cuh"
#include "device/cp_async.cuh"
#include "device/fragment.cuh"
#include "device/ldmatrix.cuh"
#include "device/memory.cuh"

namespace movq {
namespace attention {

template <class T>
class Stream {
  using Sizes = Tile<T>;

 public:
  MOVQ_DEVICE Stream(const Plan& plan, const Operands<T>& operands, const Segment& segment)
      : plan_(plan),
        operands_(operands),
        segment_(segment),
        memory_(0, plan.shared.total_bytes),
        request_tile_(segment.first_tile) {
    // The resident rows belong to the first group of copies.
    const SharedLayout& shared = plan.shared;
    for (int chunk = 0; chunk < plan.chunks.score_chunks; ++chunk) {
      const int to = shared.rows + chunk * kScoreChunk, next = Sizes::kRows * shared.row_pitch;
      if (shared.resident_operands > 0) copy_row_chunk(operands.row[0], chunk, to, shared.row_pitch);
      if (shared.resident_operands > 1) copy_row_chunk(operands.row[1], chunk, to + next, shared.row_pitch);
    }
#pragma unroll 1  // unrolling gains nothing and doubles the code
    for (int i = 0; i < shared.stages - 1; ++i) request_chunk();
  }

  // Waits until the next chunk can be read, and requests the chunk that replaces the previous one.
  MOVQ_DEVICE Synced advance() {
    switch (plan_.shared.stages) {
      case 2: cp_async_wait<0>(); break;
      case 3: cp_async_wait<1>(); break;
      default: cp_async_wait<2>(); break;
    }
    const Synced synced = block_barrier();
    if (++ready_stage_ == plan_.shared.stages) ready_stage_ = 0;
    ready_ = plan_.shared.ring + ready_stage_ * plan_.shared.stage_bytes;
    request_chunk();
    return synced;
  }

  // After the last chunk: all copies have landed and no thread reads them any longer.
  MOVQ_DEVICE Synced drain() {
    cp_async_wait<0>();
    return block_barrier();
  }

  // s += row[product] . column[product]^T over the ready chunk, which is this chunk of the product.
  MOVQ_DEVICE void add_scores(Synced, Scores<T>& s, int product, int chunk) const {
    const bool resident = product < plan_.shared.resident_operands;
    const int lane = lane_id(), height = 16 * Sizes::kScoreTiles;
    const int pitch = resident ? plan_.shared.row_pitch : kScorePitch;
    const int first_row =
        resident ? plan_.shared.rows + product * Sizes::kRows * pitch + chunk * kScoreChunk : ready_ + kColumns * kScorePitch;
    const int rows = first_row + (warp_id() / 4 * height + lane % 16) * pitch + lane / 16 * 16;
    const int columns = ready_ + (warp_id() % 4 * 32 + lane / 16 * 8 + lane % 8) * kScorePitch + lane / 8 % 2 * 16;
#pragma unroll(sizeof(T) == 2 ? 4 : 2)  // 4 of float would spill on sm_100 and sm_120
    for (int k = 0; k < kScoreChunk; k += 32) {
      uint32_t b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) ldmatrix_x4(b[n], memory_, columns + n * 16 * kScorePitch + k);
      const Fragment<T, 2> right[4] = {Fragment<T, 2>(b[0]), Fragment<T, 2>(b[0] + 2), Fragment<T, 2>(b[1]),
                                       Fragment<T, 2>(b[1] + 2)};
#pragma unroll
      for (int m = 0; m < Sizes::kScoreTiles; ++m) {
        uint32_t a[4];
        ldmatrix_x4(a, memory_, rows + m * 16 * pitch + k);
        const Fragment<T, 4> left(a);
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_add(s[m][n], left, right[n]);
      }
    }
  }

  // Stores the weights at (row, column) and (row, column + 1).
  MOVQ_DEVICE void store_weights(Synced, int row, int column, float left, float right) const {
    const int at = plan_.shared.weights + row * Sizes::kWeightPitch + column * int(sizeof(T));
    if constexpr (sizeof(T) == 2) Shared<uint32_t>(at, 1).store(0, pack<T>(left, right));
    else Shared<Vec<float, 2>>(at, 1).store(0, {{left, right}});
  }

  // sums += weights . value over the ready chunk, which starts at this token of the column tile.
  MOVQ_DEVICE void add_values(Synced, Sums<T>& sums, int first_token) const {
    const int lane = lane_id(), stripes = plan_.chunks.stripes;
    const int weights = plan_.shared.weights + lane % 16 * Sizes::kWeightPitch + first_token * int(sizeof(T)) + lane / 16 * 16;
    for (int token = 0; token < plan_.chunks.value_tokens; token += Sizes::kDepth) {
      uint32_t a[Sizes::kSumTiles][4];
#pragma unroll
      for (int m = 0; m < Sizes::kSumTiles; ++m) {
        ldmatrix_x4(a[m], memory_, weights + token * int(sizeof(T)) + m * 16 * Sizes::kWeightPitch);
      }
#pragma unroll
      for (int n = 0; n < kMaxStripes; n += 2) {
        if (n >= stripes) break;
        uint32_t b[4];
        load_values(b, token, warp_id() * 8 * stripes + 8 * n);
        const Fragment<T, 2> left(b), right(b + 2);
#pragma unroll
        for (int m = 0; m < Sizes::kSumTiles; ++m) {
          const Fragment<T, 4> weight(a[m]);
          multiply_add(sums[m][n], weight, left);
          multiply_add(sums[m][n + 1], weight, right);
        }
      }
    }
  }

 private:
  // Loads two adjacent b operands, from this token of the ready chunk and this element of the head.
  MOVQ_DEVICE void load_values(uint32_t (&b)[4], int token, int element) const {
    const int lane = lane_id(), pitch = plan_.shared.value_pitch;
    if constexpr (sizeof(T) == 2) {
      ldmatrix_x4<true>(b, memory_, ready_ + (token + lane % 16) * pitch + (element + lane / 16 * 8) * int(sizeof(T)));
    } else {  // ldmatrix transposes 16-bit elements only
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = token + lane % 4 + i % 2 * 4, column = element + i / 2 * 8 + lane / 4;
        b[i] = Shared<uint32_t>(ready_ + row * pitch + column * int(sizeof(T)), 1).load(0);
      }
    }
  }

  // Starts the copies of the next chunk, if there is one. Closes a group of copies either way, so that waits can count groups.
  MOVQ_DEVICE void request_chunk() {
    if (request_tile_ < segment_.end_tile) {
      const Chunks& chunks = plan_.chunks;
      const int to = plan_.shared.ring + request_stage_ * plan_.shared.stage_bytes;
      const int scores = chunks.products * chunks.score_chunks;
      if (request_step_ < chunks.score_chunks) {
        copy_scores(0, request_step_, to);
      } else if (request_step_ < scores) {
        copy_scores(1, request_step_ - chunks.score_chunks, to);
      } else {
        copy_values(request_tile_ * kColumns + (request_step_ - scores) * chunks.value_tokens, to);
      }
      if (++request_step_ == scores + kColumns / chunks.value_tokens) {
        request_step_ = 0;
        ++request_tile_;
      }
      if (++request_stage_ == plan_.shared.stages) request_stage_ = 0;
    }
    cp_async_commit();
  }

  // The columns of a chunk, and behind them its rows if they are not resident.
  MOVQ_DEVICE void copy_scores(int product, int chunk, int to) const {
    copy_chunk<kColumns>(operands_.column[product], request_tile_ * kColumns, plan_.extents.columns, chunk, to, kScorePitch);
    if (product >= plan_.shared.resident_operands) {
      copy_row_chunk(operands_.row[product], chunk, to + kColumns * kScorePitch, kScorePitch);
    }
  }

  MOVQ_DEVICE void copy_row_chunk(const Source<T>& source, int chunk, int to, int pitch) const {
    copy_chunk<Sizes::kRows>(source, segment_.row_tile * Sizes::kRows, plan_.extents.rows, chunk, to, pitch);
  }

  // Copies kScoreChunk bytes of each of `Count` tokens, zeros beyond the last token and the head size. Each thread copies the
  // same 16 of the 128 bytes of several tokens.
  template <int Count>
  MOVQ_DEVICE void copy_chunk(const Source<T>& source, int first_token, int end_token, int chunk, int to, int pitch) const {
    constexpr int kPieces = kScoreChunk / 16;
    const int token = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const int element = (chunk * kPieces + piece) * Sizes::kAccessElements;
    const T* from = source.head(segment_.image, segment_.head) + (first_token + token) * source.token_stride + element;
    const int tokens = element < plan_.extents.head_size ? end_token - first_token - token : 0;
    to += token * pitch + piece * 16;
#pragma unroll
    for (int i = 0; i < Count; i += kThreads / kPieces) {
      cp_async_16(memory_, to + i * pitch, from + i * source.token_stride, i < tokens);
    }
  }

  // Copies the whole tokens of a chunk of values, zeros beyond the last token and the head size.
  MOVQ_DEVICE void copy_values(int first_token, int to) const {
    const Source<T>& source = operands_.value;
    const T* from = source.head(segment_.image, segment_.head) + first_token * source.token_stride;
    const int pieces = plan_.chunks.stripes * kStripe / Sizes::kAccessElements;  // copies of 16 bytes per token
    int token = threadIdx.x / pieces, piece = threadIdx.x - token * pieces;
    while (token < plan_.chunks.value_tokens) {
      const int element = piece * Sizes::kAccessElements;
      cp_async_16(memory_, to + token * plan_.shared.value_pitch + piece * 16, from + token * source.token_stride + element,
                  first_token + token < plan_.extents.columns && element < plan_.extents.head_size);
      token += plan_.chunks.block_copy_tokens;
      piece += kThreads - plan_.chunks.block_copy_tokens * pieces;
      if (piece >= pieces) {
        piece -= pieces;
        ++token;
      }
    }
  }

  const Plan& plan_;
  const Operands<T>& operands_;
  const Segment& segment_;
  const Shared<unsigned char> memory_;
  int request_tile_, request_step_ = 0, request_stage_ = 0;  // the next chunk to request, and the stage for it
  int ready_stage_ = -1, ready_ = 0;                         // the stage that can be read, and its position
};

}  // namespace attention
}  // namespace movq
