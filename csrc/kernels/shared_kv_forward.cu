// Forward attention with shared keys and values on Hopper. The tile, its budget and its limits are in shared_kv_tile.cuh; this
// file has the online softmax, as in attention_forward.cu: the maximum of a row is raised only when it would grow by more than
// 2^8, so that the sums are almost never rescaled.
//
// Both computing warpgroups hold all rows, so they must agree on each row's maximum. The one that computes the scores of a stage
// decides, and hands the maximum and the factor by which the sums shrink to the other together with the weights.
#include "shared_kv_plan.h"

namespace movq {
namespace shared_kv {

// All exponents and maxima are in powers of two.
template <class T, int Head>
class Softmax {
  static constexpr float kSlack = 8;

 public:
  static constexpr int kResidents = 1, kSources = 1;
  static constexpr bool kRowsAreKeys = false;
  struct Arguments {
    Destination<T, Head> to;
    float scale;
    float *lse, *part_lse;
  };
  using Memory = SharedMemory<T, Head, kResidents>;

  MOVQ_DEVICE Softmax(const Plan& plan, const Arguments& arguments, const Segment& segment)
      : plan_(plan), arguments_(arguments), segment_(segment) {}

  MOVQ_DEVICE void load_statistics(int) {}

  MOVQ_DEVICE void weigh(int tile, int n, float (&s)[1][kRows / 2]) {
    const float scale = arguments_.scale * kLog2e;
    const int columns = plan_.columns - tile * kRows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float peak = -INFINITY;
      for_each_column(half, [&](int i) {
        s[0][i] *= scale;
        if (register_column(i) >= columns) s[0][i] = -INFINITY;
        peak = max(peak, s[0][i]);
      });
      peak = warp_all_reduce<4>(peak, Max());
      shrink_[half] = 1;
      if (peak - max_[half] > kSlack) {
        shrink_[half] = fast_exp2(max_[half] - peak);
        max_[half] = peak;
        total_[half] *= shrink_[half];
      }
      for_each_column(half, [&](int i) {
        s[0][i] = fast_exp2(s[0][i] - max_[half]);
        total_[half] += s[0][i];
      });
      if (leads_row()) {
        Memory::row_values(n, 0).store(register_row(2 * half), max_[half]);
        Memory::row_values(n, 1).store(register_row(2 * half), shrink_[half]);
      }
    }
  }

  MOVQ_DEVICE void follow(int n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max_[half] = Memory::row_values(n, 0).load(register_row(2 * half));
      shrink_[half] = Memory::row_values(n, 1).load(register_row(2 * half));
      total_[half] *= shrink_[half];
    }
  }

  MOVQ_DEVICE void rescale(float (&sums)[Head / 4]) const {
    // A vote, because wgmma must not depend on a branch that divides a warp.
    if (!__any_sync(kAllLanes, shrink_[0] != 1 || shrink_[1] != 1)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 2 * half; i < Head / 4; i += 4) {
        sums[i] *= shrink_[half];
        sums[i + 1] *= shrink_[half];
      }
    }
  }

  MOVQ_DEVICE void write(int side, const float (&sums)[Head / 4]) {
    float total[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] = warp_all_reduce<4>(total_[half], Sum());
      if (leads_row()) Memory::row_totals(side).store(register_row(2 * half), total[half]);
    }
    NamedBarrier(3, kComputeThreads).sync();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = register_row(2 * half), token = segment_.row_tile * kRows + row;
      total[half] = Memory::row_totals(0).load(row) + Memory::row_totals(1).load(row);
      if (side == 0 && leads_row() && token < plan_.rows) {
        const float lse = (max_[half] + log2f(total[half])) * kLn2;
        const int64_t image_head = int64_t(segment_.image) * plan_.heads + segment_.head;
        if (segment_.part < 0) store(arguments_.lse + image_head * plan_.rows + token, lse);
        else store(arguments_.part_lse + int64_t(segment_.part) * kRows + row, lse);
      }
    }
    arguments_.to.write(plan_, segment_, side, sums, [&](int half) { return inverse_total(total[half]); });
  }

 private:
  // Calls function(i) for the values of one of the thread's two rows.
  template <class Function>
  MOVQ_DEVICE static void for_each_column(int half, Function&& function) {
#pragma unroll
    for (int i = 2 * half; i < kRows / 2; i += 4) {
      function(i);
      function(i + 1);
    }
  }

  const Plan& plan_;
  const Arguments& arguments_;
  const Segment& segment_;
  // The row's maximum when it was last raised. It starts finite, so that weights are 0, not NaN, while all scores are -inf.
  float max_[2] = {-FLT_MAX, -FLT_MAX};
  float total_[2] = {};             // the sum of the weights that this thread computed
  float shrink_[2] = {1.0f, 1.0f};  // multiplies the sums before the next stage is added
};

namespace {

#ifdef MOVQ_EMULATOR
bool has_code() { return true; }
#else
// Code for other targets than 9.0a consists of a trap, which needs few registers.
bool find_code() {
  const char* name = "shared_kv";
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, name) != 9) return false;
  if (device_attribute(cudaDevAttrComputeCapabilityMinor, name) != 0) return false;
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, walk<__half, 512, Softmax<__half, 512> >) != cudaSuccess) {
    cudaGetLastError();  // clear it: the next caller would see it as its own
    return false;
  }
  return attributes.numRegs > 64;
}

// find_code(), once per device.
bool has_code() {
  static auto& found = *new BoundedCache<int, bool, 1024>;  // never destroyed: threads may outlive main()
  return found.get(current_device("shared_kv"), find_code);
}
#endif

}  // namespace
}  // namespace shared_kv

bool has_shared_kv_kernels(DType dtype, int64_t head_size) {
  const bool has_size = head_size == 128 || head_size == 256 || head_size == 512;
  return dtype != DType::float32 && has_size && shared_kv::has_code();
}

size_t shared_kv_forward_workspace(const AttentionProblem& problem) {
  size_t size = 0;
  shared_kv::with_kernel(problem, "shared_kv forward", [&](auto type, auto head) {
    using Pass = shared_kv::Softmax<typename decltype(type)::type, head>;
    size = shared_kv::part_rows(shared_kv::cached_plan<head, Pass>(problem, "shared_kv forward")) * (head + 1) * sizeof(float);
  });
  return size;
}

void shared_kv_forward(const AttentionProblem& problem, const SharedKvForward& tensors, cudaStream_t stream) {
  using namespace shared_kv;
  const char* name = "shared_kv forward";
  with_kernel(problem, name, [&](auto type, auto head) {
    using T = typename decltype(type)::type;
    using Pass = Softmax<T, head>;
    const Plan plan = cached_plan<head, Pass>(problem, name);
    auto* parts = static_cast<float*>(tensors.workspace);
    float* part_lse = parts + part_rows(plan) * head;
    const Maps maps = {{token_map(problem, tensors.q, problem.queries, kRows, name), {}},
                       {token_map(problem, tensors.kv, problem.keys, kRows, name), {}}};
    const typename Pass::Arguments arguments = {{token_rows<T>(tensors.out), parts}, problem.scale, tensors.lse, part_lse};
    launch_pass<T, head, Pass>(plan, maps, arguments, part_lse, tensors.lse, name, stream);
  });
}

}  // namespace movq
