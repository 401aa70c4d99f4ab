// Reductions over a warp and a block. Every one combines in a fixed order, so results are the same bits in every run.
#pragma once

#include "common.cuh"
#include "shared.cuh"

namespace movq {

// Mean and variance on the way: m2 is the sum of squared distances from the mean.
struct Moments { float mean, m2, count; };

// Welford: one more value.
MOVQ_DEVICE void add(Moments& a, float x) {
  a.count += 1;
  const float delta = x - a.mean;
  a.mean += delta / a.count;
  a.m2 += delta * (x - a.mean);
}

// Chan: two sets become one; either may be empty.
MOVQ_DEVICE Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  const float share = count > 0 ? b.count / count : 0;
  const float delta = b.mean - a.mean;
  return {a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share, count};
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

// The value of the lane `offset` further on (of a struct: word by word).
template <class T>
MOVQ_DEVICE T shuffle_down(T v, int offset) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  union {
    T value;
    unsigned words[sizeof(T) / 4];
  } u = {v};
#pragma unroll
  for (unsigned& word : u.words) word = __shfl_down_sync(kFullWarp, word, offset);
  return u.value;
}

template <class T>
MOVQ_DEVICE T broadcast(T v, int lane = 0) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  union {
    T value;
    unsigned words[sizeof(T) / 4];
  } u = {v};
#pragma unroll
  for (unsigned& word : u.words) word = __shfl_sync(kFullWarp, word, lane);
  return u.value;
}

// Lane 0 gets the result over `Lanes` lanes (a power of two) of its warp; with Lanes < 32, so does the first lane of every such
// run. The others get part sums. Every lane of the warp must call.
template <int Lanes = kWarp, class T, class Op>
MOVQ_DEVICE T warp_reduce(T v, Op op) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) v = op(v, shuffle_down(v, offset));
  return v;
}

// Every lane gets the result. For operations that give the same bits either way round: Sum and Max do, Merge does not.
template <int Lanes = kWarp, class Op>
MOVQ_DEVICE float warp_all_reduce(float v, Op op) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}

// Every thread gets the result. The block is whole warps; `scratch` holds one T per warp and is free again on return.
template <class T, class Op>
MOVQ_DEVICE T block_reduce(T v, Op op, const Shared<T>& scratch) {
  v = warp_reduce(v, op);
  if (lane_id() == 0) scratch.store(warp_id(), v);
  __syncthreads();
  T total = scratch.load(0);
  const int warps = blockDim.x / kWarp;
  for (int w = 1; w < warps; ++w) total = op(total, scratch.load(w));
  __syncthreads();
  return total;
}

}  // namespace movq
