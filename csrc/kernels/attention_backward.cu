// Attention backward: gradients of q, k and v. The tile, its budget and its limits are in attention_tile.cuh.
//
//   p = exp(scale q k^T - lse), dv = p^T dout, ds = p (dout v^T - delta), dq = scale ds k, dk = scale ds^T q,
//   with delta = sum(dout out) over a query's elements (FlashAttention-2, arXiv:2307.08691, algorithm 2).
//
// Each gradient is a walk of its own, over tiles that no other block adds to: there are no atomics, and every run gives the same
// bits. That is 8 products of 2 N^2 head_size operations, where the count for peak rates is 5. One walk for both dk and dv would
// make it 7, but with both sums in registers a tile has 32 rows rather than 64, and moves twice the bytes from L2, its limit.
#include "attention_plan.h"

namespace movq {
namespace attention {
namespace {

enum class Input { q, k, v };

// The gradient of the loss with respect to one input.
template <class T, Input input>
class Gradient {
  using Sizes = Tile<T>;

 public:
  static constexpr int kProducts = input == Input::v ? 1 : 2;
  static constexpr bool kRowsAreKeys = input != Input::q;
  static constexpr int kTileQueries = kRowsAreKeys ? kColumns : Sizes::kRows;
  struct Arguments {
    Destination<T> to;
    float scale;
    const float *lse, *delta;  // [batch, heads, queries]
  };

  MOVQ_DEVICE Gradient(const Plan& plan, const Arguments& arguments, const Segment& segment)
      : plan_(plan), arguments_(arguments), segment_(segment), lse_(0, kTileQueries), delta_(lse_.end(), kTileQueries) {}

  MOVQ_DEVICE void load_statistics(Synced, int tile) {
    if (threadIdx.x >= kTileQueries || (!kRowsAreKeys && tile != segment_.first_tile)) return;
    const int queries = kRowsAreKeys ? plan_.extents.columns : plan_.extents.rows;
    const int query = (kRowsAreKeys ? tile : segment_.row_tile) * kTileQueries + threadIdx.x;
    const int64_t at = int64_t(segment_.image_head(plan_.counts)) * queries + query;
    const float lse = query < queries ? load(arguments_.lse + at) : -INFINITY;
    // Beyond the last query, and where all scores are -inf, exp(s - inf) makes the weights 0.
    lse_.store(threadIdx.x, lse == -INFINITY ? INFINITY : lse * kLog2e);
    delta_.store(threadIdx.x, query < queries && input != Input::v ? load(arguments_.delta + at) : 0);
  }

  MOVQ_DEVICE void weigh(const Stream<T>& stream, int tile, const Scores<T>& s, const Scores<T>& t) const {
    const float scale = arguments_.scale * kLog2e;
    const int columns = plan_.extents.columns - tile * kColumns;
    const Synced synced = block_barrier();  // with one chunk per tile, there has been no barrier since load_statistics()
#pragma unroll
    for (int m = 0; m < Sizes::kScoreTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = score_row<T>(m, 2 * half);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int column = score_column(n);
          float weight[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int query = kRowsAreKeys ? column + i : row;
            weight[i] = fast_exp2(s[m][n][2 * half + i] * scale - lse_.load(query));
            if (input != Input::v) weight[i] *= t[m][n][2 * half + i] - delta_.load(query);
            if (column + i >= columns) weight[i] = 0;
          }
          stream.store_weights(synced, row, column, weight[0], weight[1]);
        }
      }
    }
  }

  MOVQ_DEVICE void rescale(Synced, Sums<T>&) const {}

  MOVQ_DEVICE void write(Synced, const Sums<T>& sums) const {
    const float factor = input == Input::v ? 1 : arguments_.scale;
    arguments_.to.write(plan_, segment_, sums, [&](int, int, float sum) { return sum * factor; });
  }

 private:
  const Plan& plan_;
  const Arguments& arguments_;
  const Segment& segment_;
  const Shared<float> lse_, delta_;  // of the tile's queries; lse in powers of two
};

// delta, one warp per query.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_dout_out(Source<T> dout, Source<T> out, int64_t queries, int heads, int head_size, int64_t all_queries, float* delta) {
  constexpr int kAccess = Tile<T>::kAccessElements;
  const int64_t query = int64_t(blockIdx.x) * kWarps + warp_id();
  if (query >= all_queries) return;
  const int64_t image_head = query / queries, token = query - image_head * queries;
  const int64_t image = image_head / heads, head = image_head - image * heads;
  const T* dout_token = dout.head(image, head) + token * dout.token_stride;
  const T* out_token = out.head(image, head) + token * out.token_stride;
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

template <class T>
struct Plans {
  Plan q, k, v;

  explicit Plans(const AttentionProblem& problem)
      : q(cached_plan<T, Gradient<T, Input::q>>(problem, "attention dq")),
        k(cached_plan<T, Gradient<T, Input::k>>(problem, "attention dk")),
        v(cached_plan<T, Gradient<T, Input::v>>(problem, "attention dv")) {}
  int64_t max_part_rows() const { return std::max({part_rows<T>(q), part_rows<T>(k), part_rows<T>(v)}); }
};

// Floats of delta at the start of the workspace, rounded up to 16 bytes.
int64_t delta_floats(const AttentionProblem& problem) {
  return round_up<int64_t>(problem.batch * problem.heads * problem.queries, 4);
}

}  // namespace
}  // namespace attention

size_t attention_backward_workspace(const AttentionProblem& problem) {
  using namespace attention;
  size_t size = 0;
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    size = (delta_floats(problem) + Plans<T>(problem).max_part_rows() * problem.head_size) * sizeof(float);
  });
  return size;
}

void attention_backward(const AttentionProblem& problem, const AttentionBackward& tensors, cudaStream_t stream) {
  using namespace attention;
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Plans<T> plans(problem);
    auto* delta = static_cast<float*>(tensors.workspace);
    float* parts = delta + delta_floats(problem);
    const Source<T> dout = source<T>(tensors.dout), q = source<T>(tensors.q), k = source<T>(tensors.k), v = source<T>(tensors.v),
                    out = source<T>(tensors.out);

    const int64_t all_queries = problem.batch * problem.heads * problem.queries;
    const LaunchConfig config = {grid_size("attention sum_dout_out", ceil_div<int64_t>(all_queries, kWarps)), kThreads};
    launch(sum_dout_out<T>, "attention sum_dout_out", config, stream, dout, out, problem.queries, int(problem.heads),
           int(problem.head_size), all_queries, delta);
    // One after the other, because they use the same workspace for parts.
    run<T, Gradient<T, Input::q>>(plans.q, {{q, dout}, {k, v}, k},
                                  {destination<T>(tensors.dq, parts), problem.scale, tensors.lse, delta}, nullptr, nullptr,
                                  "attention dq", stream);
    run<T, Gradient<T, Input::k>>(plans.k, {{k, v}, {q, dout}, q},
                                  {destination<T>(tensors.dk, parts), problem.scale, tensors.lse, delta}, nullptr, nullptr,
                                  "attention dk", stream);
    run<T, Gradient<T, Input::v>>(plans.v, {{k, {}}, {q, {}}, dout},
                                  {destination<T>(tensors.dv, parts), problem.scale, tensors.lse, delta}, nullptr, nullptr,
                                  "attention dv", stream);
  });
}

}  // namespace movq
