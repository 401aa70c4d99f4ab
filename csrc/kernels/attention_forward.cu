// Attention forward: see attention_tile.cuh for the tile, its budget and what limits it. Here is the softmax, online (Milakov and
// Gimelshein, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691): each row keeps its maximum and the sum of its weights so
// far. The maximum is raised only when it would grow by more than 2^8: weights up to 256 are as exact as those up to 1, and the
// sums, 128 registers of every thread, are rescaled almost never.
#include "attention_plan.h"

namespace movq {
namespace attention {
namespace {

template <class T>
class Softmax {
  using Sizes = Tile<T>;
  static constexpr int kHeight = Sizes::kScoreHeight, kRows = Sizes::kRows;
  static constexpr float kSlack = 8;  // powers of two

 public:
  static constexpr int kProducts = 1;
  static constexpr bool kRowsAreKeys = false;
  struct Arguments {
    Destination<T> to;
    float *lse, *part_lse;
  };

  MOVQ_DEVICE Softmax(const Plan& p, const Arguments& arguments, const Segment& segment)
      : p_(p), a_(arguments), segment_(segment), across_(0, 4 * kRows), of_row_(across_.end(), kRows) {
#pragma unroll
    for (int m = 0; m < kHeight; ++m) top_[m][0] = top_[m][1] = -INFINITY;
  }

  MOVQ_DEVICE void prepare(int) {}

  MOVQ_DEVICE void weigh(const Stream<T>& stream, int tile, Scores<T>& s, Scores<T>&) {
    const float scale = p_.scale * kLog2e;
    const int columns = p_.columns - tile * kColumns;
    each_row([&](int m, int h, int row) {
      float peak = -INFINITY;
      each_pair([&](int n, int e) {
        s[m][n][2 * h + e] = score_column(n) + e < columns ? s[m][n][2 * h + e] * scale : -INFINITY;
        peak = max(peak, s[m][n][2 * h + e]);
      });
      peak = warp_all_reduce<4>(peak, Max());
      if (leads_row()) across_.store(warp_id() % 4 * kRows + row, peak);
    });
    __syncthreads();
    each_row([&](int m, int h, int row) {
      float peak = across_.load(row), shrink = 1;
#pragma unroll
      for (int i = 1; i < 4; ++i) peak = max(peak, across_.load(i * kRows + row));
      if (peak - top_[m][h] > kSlack) {
        shrink = fast_exp2(top_[m][h] - peak);
        top_[m][h] = peak;
        total_[m][h] *= shrink;
      }
      if (warp_id() % 4 == 0 && leads_row()) of_row_.store(row, shrink);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float left = fast_exp2(s[m][n][2 * h] - top_[m][h]), right = fast_exp2(s[m][n][2 * h + 1] - top_[m][h]);
        total_[m][h] += left + right;
        stream.store_weights(row, score_column(n), left, right);
      }
    });
  }

  MOVQ_DEVICE void rescale(Sums<T>& sums) const {
#pragma unroll
    for (int m = 0; m < Sizes::kHeight; ++m) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float shrink = of_row_.load(sum_row(m, e));
        if (shrink == 1) continue;
#pragma unroll
        for (int n = 0; n < kStripes; ++n) {
          sums[m][n][e] *= shrink;
          sums[m][n][e + 1] *= shrink;
        }
      }
    }
  }

  MOVQ_DEVICE void finish(const Sums<T>& sums) {
    each_row([&](int m, int h, int row) {
      const float total = warp_all_reduce<4>(total_[m][h], Sum());
      if (leads_row()) across_.store(warp_id() % 4 * kRows + row, total);
      if (warp_id() % 4 == 0 && leads_row()) of_row_.store(row, top_[m][h]);
    });
    __syncthreads();
    float factor[Sizes::kHeight][2];
#pragma unroll
    for (int m = 0; m < Sizes::kHeight; ++m) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int row = sum_row(m, e), token = segment_.first_row * kRows + row;
        float total = across_.load(row);
#pragma unroll
        for (int i = 1; i < 4; ++i) total += across_.load(i * kRows + row);
        factor[m][e / 2] = 1 / total;
        if (warp_id() == 0 && leads_row() && token < p_.rows) {
          const float lse = (of_row_.load(row) + log2f(total)) * kLn2;
          if (segment_.slot < 0) store(a_.lse + int64_t(segment_.tile / p_.row_tiles) * p_.rows + token, lse);
          else store(a_.part_lse + int64_t(segment_.slot) * kRows + row, lse);
        }
      }
    }
    a_.to.write(p_, segment_, sums, [&](int m, int e, float sum) { return sum * factor[m][e / 2]; });
  }

 private:
  // Of the four lanes that hold a row's scores, one.
  MOVQ_DEVICE static bool leads_row() { return lane_id() % 4 == 0; }

  template <class F>
  MOVQ_DEVICE static void each_row(F&& f) {
#pragma unroll
    for (int m = 0; m < kHeight; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) f(m, h, score_row<T>(m, 2 * h));
    }
  }

  template <class F>
  MOVQ_DEVICE static void each_pair(F&& f) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) f(n, e);
    }
  }

  const Plan& p_;
  const Arguments& a_;
  const Segment& segment_;
  const Shared<float> across_;  // of a row: one value of each of the four warps that share its columns
  const Shared<float> of_row_;
  float top_[kHeight][2];         // the maximum, in powers of two
  float total_[kHeight][2] = {};  // of this thread's weights
};

template <class T>
Plan forward_plan(const AttentionProblem& problem) {
  return plan<T, Softmax<T>>(problem, "attention forward");
}

}  // namespace
}  // namespace attention

size_t attention_forward_workspace(const AttentionProblem& problem) {
  size_t size = 0;
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    size = attention::part_rows<T>(attention::forward_plan<T>(problem)) * (problem.size + 1) * sizeof(float);
  });
  return size;
}

void attention_forward(const AttentionProblem& problem, const AttentionForward& a, cudaStream_t stream) {
  using namespace attention;
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Plan p = forward_plan<T>(problem);
    auto* parts = static_cast<float*>(a.workspace);
    float* part_lse = parts + part_rows<T>(p) * p.size;
    const Operands<T> operands = {{source<T>(a.q), {}}, {source<T>(a.k), {}}, source<T>(a.v)};
    const typename Softmax<T>::Arguments arguments = {destination<T>(a.out, parts), a.lse, part_lse};
    run<T, Softmax<T>>(p, operands, arguments, part_lse, a.lse, "attention forward", stream);
  });
}

}  // namespace movq
