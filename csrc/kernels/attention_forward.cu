// Attention forward. The tile, its budget and its limits are in attention_tile.cuh; this file has the online softmax (Milakov
// and Gimelshein, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691).
//
// Each row keeps its maximum so far and the sum of its weights relative to that. The maximum is raised only when it would grow
// by more than 2^8: weights up to 256 are as accurate as weights up to 1, and the sums, 128 registers of every thread, are
// almost never rescaled.
#include "attention_plan.h"

namespace movq {
namespace attention {
namespace {

// All exponents and maxima are in powers of two.
template <class T>
class Softmax {
  using Sizes = Tile<T>;
  static constexpr int kScoreTiles = Sizes::kScoreTiles, kRows = Sizes::kRows;
  static constexpr float kSlack = 8;

 public:
  static constexpr int kProducts = 1;
  static constexpr bool kRowsAreKeys = false;
  struct Arguments {
    Destination<T> to;
    float scale;
    float *lse, *part_lse;
  };

  MOVQ_DEVICE Softmax(const Plan& plan, const Arguments& arguments, const Segment& segment)
      : plan_(plan),
        arguments_(arguments),
        segment_(segment),
        warp_values_(0, 4 * kRows),
        row_values_(warp_values_.end(), kRows) {
#pragma unroll
    for (int m = 0; m < kScoreTiles; ++m) max_[m][0] = max_[m][1] = -INFINITY;
  }

  MOVQ_DEVICE void load_statistics(Synced, int) {}

  MOVQ_DEVICE void weigh(const Stream<T>& stream, int tile, Scores<T>& s, Scores<T>&) {
    const float scale = arguments_.scale * kLog2e;
    const int columns = plan_.extents.columns - tile * kColumns;
    for_each_row([&](int m, int half, int row) {
      float peak = -INFINITY;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = s[m][n][2 * half + i];
          score = score_column(n) + i < columns ? score * scale : -INFINITY;
          peak = max(peak, score);
        }
      }
      peak = warp_all_reduce<4>(peak, Max());
      if (leads_row()) warp_values_.store(warp_id() % 4 * kRows + row, peak);
    });
    const Synced synced = block_barrier();
    for_each_row([&](int m, int half, int row) {
      const float peak = reduce_warps(synced, row, Max());
      float shrink = 1;
      if (peak - max_[m][half] > kSlack) {
        shrink = fast_exp2(max_[m][half] - peak);
        max_[m][half] = peak;
        total_[m][half] *= shrink;
      }
      if (warp_id() % 4 == 0 && leads_row()) row_values_.store(row, shrink);
      const float base = finite_base(max_[m][half]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float left = fast_exp2(s[m][n][2 * half] - base);
        const float right = fast_exp2(s[m][n][2 * half + 1] - base);
        total_[m][half] += left + right;
        stream.store_weights(synced, row, score_column(n), left, right);
      }
    });
  }

  MOVQ_DEVICE void rescale(Synced, Sums<T>& sums) const {
#pragma unroll
    for (int m = 0; m < Sizes::kSumTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float shrink = row_values_.load(sum_row(m, e));
        if (shrink == 1) continue;
#pragma unroll
        for (int n = 0; n < kMaxStripes; ++n) {
          sums[m][n][e] *= shrink;
          sums[m][n][e + 1] *= shrink;
        }
      }
    }
  }

  MOVQ_DEVICE void write(Synced, const Sums<T>& sums) {
    for_each_row([&](int m, int half, int row) {
      const float total = warp_all_reduce<4>(total_[m][half], Sum());
      if (leads_row()) warp_values_.store(warp_id() % 4 * kRows + row, total);
      if (warp_id() % 4 == 0 && leads_row()) row_values_.store(row, max_[m][half]);
    });
    const Synced synced = block_barrier();
    float factor[Sizes::kSumTiles][2];
#pragma unroll
    for (int m = 0; m < Sizes::kSumTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = sum_row(m, 2 * half), token = segment_.row_tile * kRows + row;
        const float total = reduce_warps(synced, row, Sum());
        factor[m][half] = inverse_total(total);
        if (warp_id() == 0 && leads_row() && token < plan_.extents.rows) {
          const float lse = (row_values_.load(row) + log2f(total)) * kLn2;
          if (segment_.part < 0)
            store(arguments_.lse + int64_t(segment_.image_head(plan_.counts)) * plan_.extents.rows + token, lse);
          else store(arguments_.part_lse + int64_t(segment_.part) * kRows + row, lse);
        }
      }
    }
    arguments_.to.write(plan_, segment_, sums, [&](int m, int e, float sum) { return sum * factor[m][e / 2]; });
  }

 private:
  // True for one of the four lanes that hold a row's scores.
  MOVQ_DEVICE static bool leads_row() { return lane_id() % 4 == 0; }

  // Calls function(m, half, row) for this thread's rows of scores: an mma tile holds two, in elements 0, 1 and 2, 3.
  template <class Function>
  MOVQ_DEVICE static void for_each_row(Function&& function) {
#pragma unroll
    for (int m = 0; m < kScoreTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) function(m, half, score_row<T>(m, 2 * half));
    }
  }

  template <class Op>
  MOVQ_DEVICE float reduce_warps(Synced, int row, Op op) const {
    float result = warp_values_.load(row);
#pragma unroll
    for (int warp = 1; warp < 4; ++warp) result = op(result, warp_values_.load(warp * kRows + row));
    return result;
  }

  const Plan& plan_;
  const Arguments& arguments_;
  const Segment& segment_;
  const Shared<float> warp_values_;   // one value per row from each of the four warps that share its columns
  const Shared<float> row_values_;    // one value per row
  float max_[kScoreTiles][2];         // the row's maximum when it was last raised
  float total_[kScoreTiles][2] = {};  // the sum of this thread's weights
};

template <class T>
Plan forward_plan(const AttentionProblem& problem) {
  return cached_plan<T, Softmax<T>>(problem, "attention forward");
}

}  // namespace
}  // namespace attention

size_t attention_forward_workspace(const AttentionProblem& problem) {
  size_t size = 0;
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    size = attention::part_rows<T>(attention::forward_plan<T>(problem)) * (problem.head_size + 1) * sizeof(float);
  });
  return size;
}

void attention_forward(const AttentionProblem& problem, const AttentionForward& tensors, cudaStream_t stream) {
  using namespace attention;
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Plan plan = forward_plan<T>(problem);
    auto* parts = static_cast<float*>(tensors.workspace);
    float* part_lse = parts + part_rows<T>(plan) * problem.head_size;
    const Operands<T> operands = {{source<T>(tensors.q), {}}, {source<T>(tensors.k), {}}, source<T>(tensors.v)};
    const typename Softmax<T>::Arguments arguments = {destination<T>(tensors.out, parts), problem.scale, tensors.lse, part_lse};
    run<T, Softmax<T>>(plan, operands, arguments, part_lse, tensors.lse, "attention forward", stream);
  });
}

}  // namespace movq
