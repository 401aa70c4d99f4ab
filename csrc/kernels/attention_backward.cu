// Attention backward: gradients of q, k and v. The tile, its budget and its limits are in attention_tile.cuh.
//
//   p = exp(scale q k^T - lse), dv = p^T dout, ds = p (dout v^T - delta), dq = scale ds k, dk = scale ds^T q,
//   with delta = sum(dout out) over a query's elements (FlashAttention-2, arXiv:2307.08691, algorithm 2).
//
// Each gradient is a walk of its own, over tiles that no other block adds to: there are no atomics, and every run gives the same
// bits. That is 8 products of 2 N^2 head_size operations, where the count for peak rates is 5. One walk for both dk and dv would
// make it 7, but with both sums in registers a tile has 32 rows rather than 64, and moves twice the bytes from L2, its limit.
// If keys and values are one tensor, one walk adds both gradients to one sum. That is 7 products, and its rows are one operand.
#include <cmath>

#include "attention_plan.h"

namespace movq {
namespace attention {
namespace {

enum class Input { q, k, v, kv };

// The gradient of the loss with respect to one input.
template <class Shape, Input input>
class Gradient {
  using T = typename Shape::T;
  using Scores = typename Shape::Scores;
  using Sums = typename Shape::Sums;

 public:
  static constexpr int kProducts = input == Input::v ? 1 : 2, kRowOperands = input == Input::kv ? 1 : kProducts;
  static constexpr int kValues = input == Input::kv ? 2 : 1;
  static constexpr bool kRowsAreKeys = input != Input::q, kWholeTiles = false;
  static constexpr int kTileQueries = kRowsAreKeys ? kColumns : Shape::kRows;
  struct Arguments {
    Destination<T> to;
    float scale;
    float boost;               // multiplies the weights of dkv, whose ds also takes the scale; see weight_boost()
    const float *lse, *delta;  // [batch, heads, queries]
  };

  MOVQ_DEVICE Gradient(const Plan& plan, const Arguments& arguments, const Segment& segment)
      : plan_(plan), arguments_(arguments), segment_(segment), lse_(0, kTileQueries), delta_(lse_.end(), kTileQueries) {
    if constexpr (!kRowsAreKeys) load_queries(segment.row_tile, plan.extents.rows);
  }

  MOVQ_DEVICE void load_statistics(Synced, int tile) const {
    if constexpr (kRowsAreKeys) load_queries(tile, plan_.extents.columns);
  }

  MOVQ_DEVICE void weigh(const Stream<Shape, Gradient>& stream, int tile, Scores& s, const Scores& t) const {
    const float scale = arguments_.scale * kLog2e;
    const int columns = plan_.extents.columns - tile * kColumns;
    const Synced synced = block_barrier();  // a small head may have had none since load_statistics()
#pragma unroll
    for (int m = 0; m < Shape::kScoreTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Shape::score_row(m, 2 * half);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int column = Shape::score_column(n);
          float weight[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int query = kRowsAreKeys ? column + i : row;
            float& score = s[m][n][2 * half + i];
            const float p = column + i < columns ? fast_exp2(score * scale - lse_.load(query)) : 0;
            const float ds = column + i < columns ? p * (t[m][n][2 * half + i] - delta_.load(query)) : 0;
            if (input == Input::kv) score = ds * (arguments_.scale * arguments_.boost);
            weight[i] = input == Input::v ? p : input == Input::kv ? p * arguments_.boost : ds;
          }
          stream.store_weights(synced, row, column, weight[0], weight[1]);
        }
      }
    }
  }

  MOVQ_DEVICE void store_second_weights(const Stream<Shape, Gradient>& stream, const Scores& s) const {
    const Synced synced = block_barrier();  // no warp reads the first weights any longer
#pragma unroll
    for (int m = 0; m < Shape::kScoreTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          stream.store_weights(synced, Shape::score_row(m, e), Shape::score_column(n), s[m][n][e], s[m][n][e + 1]);
        }
      }
    }
  }

  MOVQ_DEVICE void rescale(Synced, Sums&) const {}

  MOVQ_DEVICE void write(Synced, const Sums& sums) const {
    const float factor = input == Input::v ? 1 : input == Input::kv ? 1 / arguments_.boost : arguments_.scale;
    arguments_.to.template write<Shape>(plan_, segment_, sums, [&](int, int, float sum) { return sum * factor; });
  }

 private:
  MOVQ_DEVICE void load_queries(int tile, int queries) const {
    if (threadIdx.x >= kTileQueries) return;
    const int query = tile * kTileQueries + threadIdx.x;
    const int64_t at = segment_.token_index(plan_.extents, queries, query);
    const float lse = query < queries ? load(arguments_.lse + at) : -INFINITY;
    // Beyond the last query, and where all scores are -inf, exp(s - inf) makes the weights 0.
    lse_.store(threadIdx.x, lse == -INFINITY ? INFINITY : lse * kLog2e);
    delta_.store(threadIdx.x, query < queries && input != Input::v ? load(arguments_.delta + at) : 0);
  }

  const Plan& plan_;
  const Arguments& arguments_;
  const Segment& segment_;
  const Shared<float> lse_, delta_;  // of the tile's queries; lse in powers of two
};

// delta, one warp per query.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_dout_out(TokenView<const T> dout, TokenView<const T> out, int64_t queries,
                                                         int heads, int head_size, int64_t all_queries, float* delta) {
  constexpr int kAccess = 16 / sizeof(T);
  const int64_t query = int64_t(blockIdx.x) * kWarps + warp_id();
  if (query >= all_queries) return;
  const int64_t image_head = query / queries;
  const int token = int(query - image_head * queries), image = int(image_head / heads), head = int(image_head - image * heads);
  const T* dout_token = dout.at(dout.position(image, head, token));
  const T* out_token = out.at(out.position(image, head, token));
  float sum = 0;
  for (int i = lane_id() * kAccess; i < head_size; i += kWarpSize * kAccess) {
    const Vec<float, kAccess> dout_values = to_float(load_vec<kAccess>(dout_token + i));
    const Vec<float, kAccess> out_values = to_float(load_vec<kAccess>(out_token + i));
#pragma unroll
    for (int j = 0; j < kAccess; ++j) sum += dout_values[j] * out_values[j];
  }
  sum = warp_reduce(sum, Sum());
  if (lane_id() == 0) store(delta + query, sum);
}

template <class Shape>
struct Plans {
  Plan q = {}, k = {}, v = {}, kv = {};

  explicit Plans(const AttentionProblem& problem) : q(cached_plan<Shape, Gradient<Shape, Input::q>>(problem, "attention dq")) {
    if (problem.shared_kv) {
      kv = cached_plan<Shape, Gradient<Shape, Input::kv>>(problem, "attention dkv");
    } else {
      k = cached_plan<Shape, Gradient<Shape, Input::k>>(problem, "attention dk");
      v = cached_plan<Shape, Gradient<Shape, Input::v>>(problem, "attention dv");
    }
  }
  int64_t max_part_rows() const {
    return std::max({part_rows<Shape>(q), part_rows<Shape>(k), part_rows<Shape>(v), part_rows<Shape>(kv)});
  }
};

// The power of two near 1 / scale, up to 2^8: in 16 bits ds * scale keeps the range of ds, and p does not overflow.
float weight_boost(float scale) {
  float boost = 1;
  while (boost < 256 && boost * std::abs(scale) < 0.75f) boost *= 2;
  return boost;
}

// Floats of delta at the start of the workspace, rounded up to 16 bytes.
int64_t delta_floats(const AttentionProblem& problem) {
  return round_up<int64_t>(problem.batch * problem.heads * problem.queries, 4);
}

}  // namespace
}  // namespace attention

size_t attention_backward_workspace(const AttentionProblem& problem) {
  using namespace attention;
  size_t size = 0;
  with_shape(problem, [&](auto shape) {
    size = (delta_floats(problem) + Plans<decltype(shape)>(problem).max_part_rows() * problem.head_size) * sizeof(float);
  });
  return size;
}

void attention_backward(const AttentionProblem& problem, const AttentionBackward& tensors, cudaStream_t stream) {
  using namespace attention;
  constexpr const char* kName = "attention backward";
  with_shape(problem, [&](auto shape) {
    using Shape = decltype(shape);
    using T = typename Shape::T;
    const Plans<Shape> plans(problem);
    auto* delta = static_cast<float*>(tensors.workspace);
    float* parts = delta + delta_floats(problem);
    const int64_t queries = problem.queries, keys = problem.keys;
    const auto dout = view<const T>(tensors.dout, problem, queries, kName),
               out = view<const T>(tensors.out, problem, queries, kName), q = view<const T>(tensors.q, problem, queries, kName),
               k = view<const T>(tensors.k, problem, keys, kName), v = view<const T>(tensors.v, problem, keys, kName);
    const auto dq = view<T>(tensors.dq, problem, queries, kName), dk = view<T>(tensors.dk, problem, keys, kName);

    const int64_t all_queries = problem.batch * problem.heads * queries;
    const LaunchConfig config = {grid_size("attention sum_dout_out", ceil_div<int64_t>(all_queries, kWarps)), kThreads};
    launch(sum_dout_out<T>, "attention sum_dout_out", config, stream, dout, out, queries, int(problem.heads),
           int(problem.head_size), all_queries, delta);
    auto run_walk = [&](auto pass, const Plan& plan, const Operands<T>& operands, const TokenView<T>& gradient,
                        const char* name) {
      using Pass = typename decltype(pass)::type;
      const typename Pass::Arguments arguments = {
          {gradient, parts}, problem.scale, weight_boost(problem.scale), tensors.lse, delta};
      launch_pass<Shape, Pass>(plan, operands, arguments, nullptr, nullptr, name, stream);
    };
    // One after the other, because they use the same workspace for parts.
    run_walk(Type<Gradient<Shape, Input::q>>(), plans.q, {{q, dout}, {k, v}, {k, {}}}, dq, "attention dq");
    if (problem.shared_kv) {
      run_walk(Type<Gradient<Shape, Input::kv>>(), plans.kv, {{k, {}}, {q, dout}, {dout, q}}, dk, "attention dkv");
    } else {
      const auto dv = view<T>(tensors.dv, problem, keys, kName);
      run_walk(Type<Gradient<Shape, Input::k>>(), plans.k, {{k, v}, {q, dout}, {q, {}}}, dk, "attention dk");
      run_walk(Type<Gradient<Shape, Input::v>>(), plans.v, {{k, {}}, {q, {}}, {dout, {}}}, dv, "attention dv");
    }
  });
}

}  // namespace movq
