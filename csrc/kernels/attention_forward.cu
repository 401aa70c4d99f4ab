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

// All exponents and maxima are in powers of two. With whole tiles, keys and values are one tensor, which is read once.
template <class Shape, bool kWholeTiles_>
class Softmax {
  using T = typename Shape::T;
  using Scores = typename Shape::Scores;
  using Sums = typename Shape::Sums;
  static constexpr int kScoreTiles = Shape::kScoreTiles, kRows = Shape::kRows;
  static constexpr float kSlack = 8;

 public:
  static constexpr int kProducts = 1, kRowOperands = 1, kValues = 1;
  static constexpr bool kRowsAreKeys = false, kWholeTiles = kWholeTiles_;
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
        row_values_(Shape::kWeights + kColumns * sizeof(T), (kRows - 1) * kRowValuePitch + 1) {
#pragma unroll
    for (int m = 0; m < kScoreTiles; ++m) max_[m][0] = max_[m][1] = -INFINITY;
  }

  MOVQ_DEVICE void load_statistics(Synced, int) {}

  MOVQ_DEVICE void weigh(const Stream<Shape, Softmax>& stream, int tile, Scores& s, Scores&) {
    const float scale = arguments_.scale * kLog2e;
    const int columns = plan_.extents.columns - tile * kColumns;
    for_each_row([&](int m, int half, int row) {
      float peak = -INFINITY;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = s[m][n][2 * half + i];
          score = Shape::score_column(n) + i < columns ? score * scale : -INFINITY;
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
      if (warp_id() % 4 == 0 && leads_row()) row_values_.store(row * kRowValuePitch, shrink);
      const float base = finite_base(max_[m][half]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float left = fast_exp2(s[m][n][2 * half] - base);
        const float right = fast_exp2(s[m][n][2 * half + 1] - base);
        total_[m][half] += left + right;
        stream.store_weights(synced, row, Shape::score_column(n), left, right);
      }
    });
  }

  MOVQ_DEVICE void rescale(Synced, Sums& sums) const {
#pragma unroll
    for (int m = 0; m < Shape::kSumTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float shrink = row_values_.load(Shape::sum_row(m, e) * kRowValuePitch);
        if (shrink == 1) continue;
#pragma unroll
        for (int n = 0; n < Shape::kStripes; ++n) {
          sums[m][n][e] *= shrink;
          sums[m][n][e + 1] *= shrink;
        }
      }
    }
  }

  MOVQ_DEVICE void write(Synced, const Sums& sums) {
    for_each_row([&](int m, int half, int row) {
      const float total = warp_all_reduce<4>(total_[m][half], Sum());
      if (leads_row()) warp_values_.store(warp_id() % 4 * kRows + row, total);
      if (warp_id() % 4 == 0 && leads_row()) row_values_.store(row * kRowValuePitch, max_[m][half]);
    });
    const Synced synced = block_barrier();
    float factor[Shape::kSumTiles][2];
#pragma unroll
    for (int m = 0; m < Shape::kSumTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Shape::sum_row(m, 2 * half), token = segment_.row_tile * kRows + row;
        const float total = reduce_warps(synced, row, Sum());
        factor[m][half] = inverse_total(total);
        if (warp_id() == 0 && leads_row() && token < plan_.extents.rows) {
          const float lse = (row_values_.load(row * kRowValuePitch) + log2f(total)) * kLn2;
          if (segment_.part < 0) store(arguments_.lse + segment_.token_index(plan_.extents, plan_.extents.rows, token), lse);
          else store(arguments_.part_lse + int64_t(segment_.part) * kRows + row, lse);
        }
      }
    }
    arguments_.to.template write<Shape>(plan_, segment_, sums, [&](int m, int e, float sum) { return sum * factor[m][e / 2]; });
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
      for (int half = 0; half < 2; ++half) function(m, half, Shape::score_row(m, 2 * half));
    }
  }

  template <class Op>
  MOVQ_DEVICE float reduce_warps(Synced, int row, Op op) const {
    float result = warp_values_.load(row);
#pragma unroll
    for (int warp = 1; warp < 4; ++warp) result = op(result, warp_values_.load(warp * kRows + row));
    return result;
  }

  static constexpr int kRowValuePitch = Shape::kWeightPitch / sizeof(float);

  const Plan& plan_;
  const Arguments& arguments_;
  const Segment& segment_;
  const Shared<float> warp_values_;   // one value per row from each of the four warps that share its columns
  const Shared<float> row_values_;    // one value per row, in the padding of the weights
  float max_[kScoreTiles][2];         // the row's maximum when it was last raised
  float total_[kScoreTiles][2] = {};  // the sum of this thread's weights
};

constexpr const char* kName = "attention forward";

// Calls function(Type<Pass>()) with the Softmax for keys and values in two tensors, or in one.
template <class Shape, class Function>
void with_softmax(bool one_tensor, Function&& function) {
  if constexpr (Shape::kHasWholeTiles) {
    if (one_tensor && Shape::kWholeTileBytes <= shared_memory_limit(kName)) return function(Type<Softmax<Shape, true>>());
  }
  function(Type<Softmax<Shape, false>>());
}

bool are_one_tensor(const Tokens& k, const Tokens& v) {
  return k.data == v.data && k.batch_stride == v.batch_stride && k.head_stride == v.head_stride &&
         k.token_stride == v.token_stride;
}

}  // namespace
}  // namespace attention

size_t attention_forward_workspace(const AttentionProblem& problem) {
  using namespace attention;
  int64_t rows = 0;
  with_shape(problem, [&](auto shape) {
    using Shape = decltype(shape);
    for (bool one_tensor : {false, true}) {
      with_softmax<Shape>(one_tensor, [&](auto type) {
        rows = std::max(rows, part_rows<Shape>(cached_plan<Shape, typename decltype(type)::type>(problem, kName)));
      });
    }
  });
  return rows * (problem.head_size + 1) * sizeof(float);
}

void attention_forward(const AttentionProblem& problem, const AttentionForward& tensors, cudaStream_t stream) {
  using namespace attention;
  with_shape(problem, [&](auto shape) {
    using Shape = decltype(shape);
    using T = typename Shape::T;
    auto* parts = static_cast<float*>(tensors.workspace);
    const Operands<T> operands = {{view<const T>(tensors.q, problem, problem.queries, kName), {}},
                                  {view<const T>(tensors.k, problem, problem.keys, kName), {}},
                                  {view<const T>(tensors.v, problem, problem.keys, kName), {}}};
    const Destination<T> to = {view<T>(tensors.out, problem, problem.queries, kName), parts};
    with_softmax<Shape>(are_one_tensor(tensors.k, tensors.v), [&](auto type) {
      using Pass = typename decltype(type)::type;
      const Plan plan = cached_plan<Shape, Pass>(problem, kName);
      float* part_lse = parts + part_rows<Shape>(plan) * problem.head_size;
      launch_pass<Shape, Pass>(plan, operands, {to, problem.scale, tensors.lse, part_lse}, part_lse, tensors.lse, kName, stream);
    });
  });
}

}  // namespace movq
