// Attention backward: gradients of q, k and v. See attention_tile.cuh for the tile.
//
//   p = exp(scale q k^T - lse), dv = p^T dout, ds = p (dout v^T - delta), dq = scale ds k, dk = scale ds^T q,
//   with delta = sum(dout out) over a query's elements (FlashAttention-2, arXiv:2307.08691, algorithm 2).
//
// Every gradient has a walk of its own, over tiles that no other block adds to: no atomics, the same bits every run. That is 8
// products of 2 N^2 size operations where 5 are counted; one walk for dk and dv would make it 7, but with both sums in registers
// a tile has 32 rows instead of 64, and it would move twice the bytes from L2, which is what limits it.
#include "attention_plan.h"

namespace movq {
namespace attention {
namespace {

enum class Of { q, k, v };

template <class T, Of of>
class Gradient {
  using Sizes = Tile<T>;
  static constexpr int kHeight = Sizes::kScoreHeight;

 public:
  static constexpr int kProducts = of == Of::v ? 1 : 2;
  static constexpr bool kRowsAreKeys = of != Of::q;
  static constexpr int kQueries = kRowsAreKeys ? kColumns : Sizes::kRows;
  struct Arguments {
    Destination<T> to;
    const float *lse, *delta;  // [batch, heads, queries]
  };

  MOVQ_DEVICE Gradient(const Plan& p, const Arguments& arguments, const Segment& segment)
      : p_(p), a_(arguments), segment_(segment), lse_(0, kQueries), delta_(lse_.end(), kQueries) {}

  MOVQ_DEVICE void prepare(int tile) {
    if (threadIdx.x >= kQueries || (!kRowsAreKeys && tile != segment_.begin)) return;
    const int queries = kRowsAreKeys ? p_.columns : p_.rows;
    const int query = (kRowsAreKeys ? tile : segment_.first_row) * kQueries + threadIdx.x;
    const int64_t at = int64_t(segment_.tile / p_.row_tiles) * queries + query;
    // What lies beyond the last query gets weights of zero.
    lse_.store(threadIdx.x, query < queries ? load(a_.lse + at) * kLog2e : INFINITY);
    delta_.store(threadIdx.x, query < queries && of != Of::v ? load(a_.delta + at) : 0);
  }

  MOVQ_DEVICE void weigh(const Stream<T>& stream, int tile, const Scores<T>& s, const Scores<T>& t) const {
    const float scale = p_.scale * kLog2e;
    const int columns = p_.columns - tile * kColumns;
    __syncthreads();  // a walk of one chunk a tile has no other barrier since prepare()
#pragma unroll
    for (int m = 0; m < kHeight; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = score_row<T>(m, 2 * h);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int column = score_column(n);
          float weight[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int query = kRowsAreKeys ? column + e : row;
            weight[e] = fast_exp2(s[m][n][2 * h + e] * scale - lse_.load(query));
            if (of != Of::v) weight[e] *= t[m][n][2 * h + e] - delta_.load(query);
            if (column + e >= columns) weight[e] = 0;
          }
          stream.store_weights(row, column, weight[0], weight[1]);
        }
      }
    }
  }

  MOVQ_DEVICE void rescale(Sums<T>&) const {}

  MOVQ_DEVICE void finish(const Sums<T>& sums) const {
    const float factor = of == Of::v ? 1 : p_.scale;
    a_.to.write(p_, segment_, sums, [&](int, int, float sum) { return sum * factor; });
  }

 private:
  const Plan& p_;
  const Arguments& a_;
  const Segment& segment_;
  const Shared<float> lse_, delta_;  // of the tile's queries: lse in powers of two
};

// A warp a query.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dot_out(Source<T> dout, Source<T> out, int64_t queries, int heads, int size, int64_t count, float* delta) {
  constexpr int kPer16 = Tile<T>::kPer16;
  const int64_t query = int64_t(blockIdx.x) * kWarps + warp_id();
  if (query >= count) return;
  const int64_t pair = query / queries, token = query - pair * queries, image = pair / heads, head = pair - image * heads;
  const T *x = dout.head(image, head) + token * dout.token_stride, *y = out.head(image, head) + token * out.token_stride;
  float sum = 0;
  for (int i = lane_id() * kPer16; i < size; i += kWarp * kPer16) {
    const Vec<float, kPer16> a = to_float(load_vec<kPer16>(x + i)), b = to_float(load_vec<kPer16>(y + i));
#pragma unroll
    for (int j = 0; j < kPer16; ++j) sum += a[j] * b[j];
  }
  sum = warp_reduce(sum, Sum());
  if (lane_id() == 0) store(delta + query, sum);
}

template <class T>
struct Plans {
  Plan q, k, v;

  explicit Plans(const AttentionProblem& p)
      : q(plan<T, Gradient<T, Of::q>>(p, "attention dq")),
        k(plan<T, Gradient<T, Of::k>>(p, "attention dk")),
        v(plan<T, Gradient<T, Of::v>>(p, "attention dv")) {}
  int64_t parts() const { return std::max({part_rows<T>(q), part_rows<T>(k), part_rows<T>(v)}); }
};

// Floats of delta, which come first in the workspace; whole 16 bytes.
int64_t deltas(const AttentionProblem& p) { return round_up(p.batch * p.heads * p.queries, 4); }

}  // namespace
}  // namespace attention

size_t attention_backward_workspace(const AttentionProblem& problem) {
  using namespace attention;
  size_t size = 0;
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    size = (deltas(problem) + Plans<T>(problem).parts() * problem.size) * sizeof(float);
  });
  return size;
}

void attention_backward(const AttentionProblem& problem, const AttentionBackward& a, cudaStream_t stream) {
  using namespace attention;
  with_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Plans<T> plans(problem);
    auto* delta = static_cast<float*>(a.workspace);
    float* parts = delta + deltas(problem);
    const Source<T> dout = source<T>(a.dout), q = source<T>(a.q), k = source<T>(a.k), v = source<T>(a.v), out = source<T>(a.out);

    const int64_t count = problem.batch * problem.heads * problem.queries;
    const Launch how = {grid("attention dot_out", ceil_div<int64_t>(count, kWarps)), kThreads};
    launch(dot_out<T>, "attention dot_out", how, stream, dout, out, problem.queries, int(problem.heads), int(problem.size), count,
           delta);
    // One after the other: they share the place for parts.
    run<T, Gradient<T, Of::q>>(plans.q, {{q, dout}, {k, v}, k}, {destination<T>(a.dq, parts), a.lse, delta}, nullptr, nullptr,
                               "attention dq", stream);
    run<T, Gradient<T, Of::k>>(plans.k, {{k, v}, {q, dout}, q}, {destination<T>(a.dk, parts), a.lse, delta}, nullptr, nullptr,
                               "attention dk", stream);
    run<T, Gradient<T, Of::v>>(plans.v, {{k, {}}, {q, {}}, dout}, {destination<T>(a.dv, parts), a.lse, delta}, nullptr, nullptr,
                               "attention dv", stream);
  });
}

}  // namespace movq
