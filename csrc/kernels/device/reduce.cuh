// Reductions over a warp and over a block. The order is fixed, so every run gives the same bits.
#pragma once

#include "common.cuh"
#include "shared.cuh"

namespace movq {

// The mean and variance of a set of values: m2 is the sum of squared distances from the mean.
struct Moments { float mean, m2, count; };

// The moments of the union (Chan et al.). Either set may be empty.
MOVQ_DEVICE Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  const float weight = count > 0 ? b.count / count : 0;
  const float delta = b.mean - a.mean;
  return {a.mean + delta * weight, a.m2 + b.m2 + delta * delta * a.count * weight, count};
}

struct Sum {
  template <class T> MOVQ_DEVICE T operator()(const T& a, const T& b) const { return a + b; }
};
struct Max {
  template <class T> MOVQ_DEVICE T operator()(const T& a, const T& b) const { return a < b ? b : a; }
};
struct Merge {
  MOVQ_DEVICE Moments operator()(const Moments& a, const Moments& b) const { return merge(a, b); }
};

// The value of the lane `offset` further on. Structs are shuffled word by word.
template <class T>
MOVQ_DEVICE T shuffle_down(T value, int offset) {
  static_assert(sizeof(T) % 4 == 0, "expected whole words");
  union {
    T value;
    unsigned words[sizeof(T) / 4];
  } shuffled = {value};
#pragma unroll
  for (unsigned& word : shuffled.words) word = __shfl_down_sync(kAllLanes, word, offset);
  return shuffled.value;
}

// Lane 0 gets the result, the other lanes partial results. All lanes of the warp must call.
template <class T, class Op>
MOVQ_DEVICE T warp_reduce(T value, Op op) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value = op(value, shuffle_down(value, offset));
  return value;
}

// Every lane gets the result of its run of `Lanes` lanes, a power of two. Requires op(a, b) and op(b, a) to have the same bits,
// as Sum and Max do and Merge does not.
template <int Lanes, class Op>
MOVQ_DEVICE float warp_all_reduce(float value, Op op) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// Every thread gets the result. The block must consist of whole warps. `scratch` holds one T per warp and can be reused on
// return.
template <class T, class Op>
MOVQ_DEVICE T block_reduce(T value, Op op, const Shared<T>& scratch) {
  value = warp_reduce(value, op);
  if (lane_id() == 0) scratch.store(warp_id(), value);
  __syncthreads();
  T total = scratch.load(0);
  const int warps = blockDim.x / kWarpSize;
  for (int warp = 1; warp < warps; ++warp) total = op(total, scratch.load(warp));
  __syncthreads();
  return total;
}

}  // namespace movq
