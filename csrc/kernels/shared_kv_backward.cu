// Backward attention with shared keys and values on Hopper: gradients of q and kv. The tile, its budget and its limits are in
// shared_kv_tile.cuh.
//
//   s = q kv^T, t = dout kv^T, p = exp(scale s - lse), ds = p (t - delta), dq = scale ds kv, dkv = scale ds^T q + p^T dout,
//   with delta = sum(dout out) over a query's elements (FlashAttention-2, arXiv:2307.08691, algorithm 2).
//
// Two walks over tiles that no other block adds to: there are no atomics, and every run gives the same bits. That is 7 products
// of 2 N^2 head_size operations, where the count for peak rates is 5.
#include <algorithm>
#include <cmath>

#include "shared_kv_plan.h"

namespace movq {
namespace shared_kv {

// Per query: lse in powers of two, and delta.
struct Statistics {
  const float *lse, *delta;  // [batch, heads, queries]

  // Beyond the last query, exp(s - inf) makes the weights 0.
  MOVQ_DEVICE float base(int64_t first, int query, int queries) const {
    return query < queries ? load(lse + first + query) * kLog2e : INFINITY;
  }
  MOVQ_DEVICE float shift(int64_t first, int query, int queries) const {
    return query < queries ? load(delta + first + query) : 0.0f;
  }
};

// The gradient of kv. A stage has 32 tokens of dout and below them the same 32 tokens of q; so columns 0 to 31 of a tile of
// scores are t, and columns 32 to 63 are s of the same queries.
template <class T, int Head>
class KeyValueGradient {
  static constexpr int kQueries = kRows / 2;

 public:
  static constexpr int kResidents = 1, kSources = 2;
  static constexpr bool kRowsAreKeys = true;
  // The weights are [p p_factor, ds ds_factor], and `factor` undoes what both have in common: the sum is p^T dout + scale ds^T q.
  struct Arguments {
    Destination<T, Head> to;
    Statistics statistics;
    float scale, p_factor, ds_factor, factor;
  };

  MOVQ_DEVICE KeyValueGradient(const Plan& plan, const Arguments& arguments, const Segment& segment)
      : plan_(plan), arguments_(arguments), segment_(segment) {}

  MOVQ_DEVICE void load_statistics(int tile) {
    const int64_t first = (int64_t(segment_.image) * plan_.heads + segment_.head) * plan_.columns;
    for_each_query([&](int i, int j) {
      const int query = tile * kQueries + register_column(i);
      base_[j] = arguments_.statistics.base(first, query, plan_.columns);
      shift_[j] = arguments_.statistics.shift(first, query, plan_.columns);
    });
  }

  MOVQ_DEVICE void weigh(int, int, float (&s)[1][kRows / 2]) const {
    for_each_query([&](int i, int j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &t = s[0][i + 2 * half], &score = s[0][i + 2 * half + kQueries / 2];
        const float p = fast_exp2(score * arguments_.scale * kLog2e - base_[j]);
        score = p * (t - shift_[j]) * arguments_.ds_factor;
        t = p * arguments_.p_factor;
      }
    });
  }

  MOVQ_DEVICE void follow(int) {}
  MOVQ_DEVICE void rescale(float (&)[Head / 4]) const {}

  MOVQ_DEVICE void write(int side, const float (&sums)[Head / 4]) const {
    arguments_.to.write(plan_, segment_, side, sums, [&](int) { return arguments_.factor; });
  }

 private:
  // Calls function(i, j) for this thread's queries: t is in registers i and i + 2, for the two rows; j counts the queries.
  template <class Function>
  MOVQ_DEVICE static void for_each_query(Function&& function) {
#pragma unroll
    for (int j = 0; j < kQueries / 4; ++j) function(j / 2 * 4 + j % 2, j);
  }

  const Plan& plan_;
  const Arguments& arguments_;
  const Segment& segment_;
  float base_[kQueries / 4], shift_[kQueries / 4];
};

// The gradient of q.
template <class T, int Head>
class QueryGradient {
  static constexpr int kKeys = kRows / 2;

 public:
  static constexpr int kResidents = 2, kSources = 1;
  static constexpr bool kRowsAreKeys = false;
  struct Arguments {
    Destination<T, Head> to;
    Statistics statistics;
    float scale;
  };

  MOVQ_DEVICE QueryGradient(const Plan& plan, const Arguments& arguments, const Segment& segment)
      : plan_(plan), arguments_(arguments), segment_(segment) {
    const int64_t first = (int64_t(segment.image) * plan.heads + segment.head) * plan.rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = segment.row_tile * kRows + register_row(2 * half);
      base_[half] = arguments.statistics.base(first, query, plan.rows);
      shift_[half] = arguments.statistics.shift(first, query, plan.rows);
    }
  }

  MOVQ_DEVICE void load_statistics(int) {}

  MOVQ_DEVICE void weigh(int tile, int, float (&s)[2][kKeys / 2]) const {
    const int columns = plan_.columns - tile * kKeys;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int half = i / 2 % 2;
      const float p = fast_exp2(s[0][i] * arguments_.scale * kLog2e - base_[half]);
      s[0][i] = register_column(i) < columns ? p * (s[1][i] - shift_[half]) : 0.0f;
    }
  }

  MOVQ_DEVICE void follow(int) {}
  MOVQ_DEVICE void rescale(float (&)[Head / 4]) const {}

  MOVQ_DEVICE void write(int side, const float (&sums)[Head / 4]) const {
    arguments_.to.write(plan_, segment_, side, sums, [&](int) { return arguments_.scale; });
  }

 private:
  const Plan& plan_;
  const Arguments& arguments_;
  const Segment& segment_;
  float base_[2], shift_[2];  // of this thread's rows
};

constexpr int kDeltaWarps = 8;

// delta, one warp per query.
template <class T, int Head>
__global__ void __launch_bounds__(kDeltaWarps* kWarpSize)
    sum_dout_out(TokenRows<const T> dout, TokenRows<const T> out, int64_t queries, int heads, int64_t all_queries, float* delta) {
  const int64_t query = int64_t(blockIdx.x) * kDeltaWarps + warp_id();
  if (query >= all_queries) return;
  const int64_t image_head = query / queries, token = query - image_head * queries;
  const int image = int(image_head / heads), head = int(image_head - int64_t(image) * heads);
  const T *dout_token = dout.row(image, head, token), *out_token = out.row(image, head, token);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Head; i += kWarpSize * 8) {
    const int column = i + lane_id() * 8;
    if (Head < kWarpSize * 8 && column >= Head) break;
    const Vec<float, 8> left = to_float(load_vec<8>(dout_token + column)), right = to_float(load_vec<8>(out_token + column));
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += left[j] * right[j];
  }
  sum = warp_reduce(sum, Sum());
  if (lane_id() == 0) store(delta + query, sum);
}

namespace {

// Floats of delta at the start of the workspace, rounded up to 16 bytes.
int64_t delta_floats(const AttentionProblem& problem) {
  return round_up<int64_t>(problem.batch * problem.heads * problem.queries, 4);
}

template <class T, int Head>
struct Plans {
  Plan q, kv;

  explicit Plans(const AttentionProblem& problem)
      : q(cached_plan<Head, QueryGradient<T, Head>>(problem, "shared_kv dq")),
        kv(cached_plan<Head, KeyValueGradient<T, Head>>(problem, "shared_kv dkv")) {}
  int64_t max_part_rows() const { return std::max(part_rows(q), part_rows(kv)); }
};

}  // namespace
}  // namespace shared_kv

size_t shared_kv_backward_workspace(const AttentionProblem& problem) {
  size_t size = 0;
  shared_kv::with_kernel(problem, "shared_kv backward", [&](auto type, auto head) {
    const shared_kv::Plans<typename decltype(type)::type, head> plans(problem);
    size = (shared_kv::delta_floats(problem) + plans.max_part_rows() * head) * sizeof(float);
  });
  return size;
}

void shared_kv_backward(const AttentionProblem& problem, const SharedKvBackward& tensors, cudaStream_t stream) {
  using namespace shared_kv;
  with_kernel(problem, "shared_kv backward", [&](auto type, auto head) {
    using T = typename decltype(type)::type;
    const Plans<T, head> plans(problem);
    auto* delta = static_cast<float*>(tensors.workspace);
    float* parts = delta + delta_floats(problem);
    const int64_t all_queries = problem.batch * problem.heads * problem.queries;
    const LaunchConfig config = {grid_size("shared_kv sum_dout_out", ceil_div<int64_t>(all_queries, kDeltaWarps)),
                                 kDeltaWarps * kWarpSize};
    launch(sum_dout_out<T, head>, "shared_kv sum_dout_out", config, stream, token_rows<const T>(tensors.dout),
           token_rows<const T>(tensors.out), problem.queries, int(problem.heads), all_queries, delta);
    const Statistics statistics = {tensors.lse, delta};

    // One after the other, because they use the same workspace for parts.
    auto map = [&](const Tokens& tensor, int64_t tokens, int box, const char* name) {
      return token_map(problem, tensor, tokens, box, name);
    };
    const int64_t queries = problem.queries, keys = problem.keys;
    const char* name = "shared_kv dq";
    const Maps q_maps = {{map(tensors.q, queries, kRows, name), map(tensors.dout, queries, kRows, name)},
                         {map(tensors.kv, keys, kRows / 2, name), {}}};
    launch_pass<T, head, QueryGradient<T, head>>(plans.q, q_maps, {{token_rows<T>(tensors.dq), parts}, statistics, problem.scale},
                                                 nullptr, nullptr, name, stream);

    name = "shared_kv dkv";
    const Maps kv_maps = {{map(tensors.kv, keys, kRows, name), {}},
                          {map(tensors.dout, queries, kRows / 2, name), map(tensors.q, queries, kRows / 2, name)}};
    // 1 / scale keeps ds, often the smaller, away from float16's subnormal numbers; the limit keeps p in its range.
    const float p_factor = std::min(1 / std::abs(problem.scale), 256.0f);
    launch_pass<T, head, KeyValueGradient<T, head>>(
        plans.kv, kv_maps,
        {{token_rows<T>(tensors.dkv), parts}, statistics, problem.scale, p_factor, p_factor * problem.scale, 1 / p_factor},
        nullptr, nullptr, name, stream);
  });
}

}  // namespace movq
