// Shared by the kernels of SpatialNorm's backward. The formulas are in spatial_norm_backward.cu.
#pragma once

#include "spatial_norm_plan.h"

namespace movq {
namespace spatial_norm {

// P and Q of the formulas, or sums made from them. Aligned, so that it is one access to shared memory.
struct alignas(8) GradientSums { float p, q; };
MOVQ_DEVICE GradientSums operator+(const GradientSums& a, const GradientSums& b) { return {a.p + b.p, a.q + b.q}; }

MOVQ_DEVICE void store_sums(float* to, int64_t index, const GradientSums& sums) {
  store_vec(to + 2 * index, Vec<float, 2>{{sums.p, sums.q}});
}
MOVQ_DEVICE GradientSums load_sums(const float* from, int64_t index) {
  const auto values = load_vec<2>(from + 2 * index);
  return {values[0], values[1]};
}

template <class T>
struct BackwardArrays {
  const T *dout, *f, *zq_y, *zq_b;
  const void *weight, *bias;
  const float *mean, *rstd;
  T *df, *dzq_y, *dzq_b;
  float* chunk_sums;    // [batch][chunk][channel][2]: the sums of Y P and Y Q
  float* channel_sums;  // [batch][channel][2]: the same over all chunks
  float* group_sums;    // [batch][group][2]: s1 and s2
};

// n = (f - mean) * rstd, for one channel of one image.
struct Normalization {
  float mean, rstd;

  template <class T>
  MOVQ_DEVICE void load_from(const Geometry& geometry, const BackwardArrays<T>& arrays, int64_t image, int channel) {
    const int64_t group = image * geometry.groups + channel / geometry.group_channels;
    mean = load(arrays.mean + group);
    rstd = load(arrays.rstd + group);
  }
  MOVQ_DEVICE float operator()(float f) const { return (f - mean) * rstd; }
};

// v = slope * n + offset with a channel's weight and bias, or u = slope * n + offset once they are modulated by a cell's Y and B.
struct Affine {
  float slope, offset;

  template <class T>
  MOVQ_DEVICE void load_from(const Geometry& geometry, const BackwardArrays<T>& arrays, int channel) {
    slope = load_parameter<T>(arrays.weight, channel, geometry.float_params, 1);
    offset = load_parameter<T>(arrays.bias, channel, geometry.float_params, 0);
  }
  MOVQ_DEVICE Affine modulated(float y, float b) const { return {slope * y, offset * y + b}; }
};

// h = dout * act'(u)
MOVQ_DEVICE float activation_gradient(bool silu, float dout, float n, const Affine& modulated) {
  return silu ? dout * silu_derivative(n * modulated.slope + modulated.offset) : dout;
}

// Writes the gradients of zq_y and zq_b for the Channels channels of a cell whose P and Q are complete, and turns P and Q into Y
// P and Y Q. `at` is the offset of the first channel in zq. Loads Y, weight and bias again rather than keep them in registers.
template <class T, int Channels>
MOVQ_DEVICE void write_cell_gradients(const Geometry& geometry, const BackwardArrays<T>& arrays, int channel, int64_t at,
                                      GradientSums (&sums)[Channels]) {
  const Vec<float, Channels> y = to_float(load_vec<Channels>(arrays.zq_y + at));
  Vec<float, Channels> dy, db;
#pragma unroll
  for (int i = 0; i < Channels; ++i) {
    Affine affine;
    affine.load_from(geometry, arrays, channel + i);
    dy[i] = affine.slope * sums[i].q + affine.offset * sums[i].p;
    db[i] = sums[i].p;
    sums[i] = {y[i] * sums[i].p, y[i] * sums[i].q};
  }
  store_vec(arrays.dzq_y + at, from_float<T>(dy));
  store_vec(arrays.dzq_b + at, from_float<T>(db));
}

}  // namespace spatial_norm
}  // namespace movq
