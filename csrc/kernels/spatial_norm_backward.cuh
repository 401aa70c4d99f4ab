// Shared by the kernels of SpatialNorm's backward. The formulas are in spatial_norm_backward.cu.
#pragma once

#include "spatial_norm_plan.h"

namespace movq {
namespace spatial_norm {

// Sums of h and of h (f - mean), which are P and Q / rstd of the formulas, or the same times Y. Aligned, so that it is one access
// to shared memory.
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

// The rows of f that read one row of zq: the same rows of adjacent frames.
struct Rows {
  int first_frame, end_frame, top, bottom;
  MOVQ_DEVICE bool are_empty() const { return first_frame >= end_frame || top >= bottom; }
};

// `source` counts the rows of all frames of zq.
MOVQ_DEVICE Rows rows_that_read(const Geometry& geometry, int source) {
  if (geometry.zq_frames == 1) {
    return {0, geometry.frames, first_position(source, geometry.rows), first_position(source + 1, geometry.rows)};
  }
  const int frame = source / geometry.zq_height, row = source - frame * geometry.zq_height;
  return {first_frame(frame, geometry.frame_axis), first_frame(frame + 1, geometry.frame_axis),
          first_position(row, geometry.rows), first_position(row + 1, geometry.rows)};
}

// The index of a channel's mean and rstd.
MOVQ_DEVICE int64_t group_index(const Geometry& geometry, int64_t image, int channel) {
  return image * geometry.groups + channel / geometry.group_channels;
}

// v = slope * (f - mean) + offset for one channel of one image, or u once it is modulated by a cell's Y and B.
struct Affine {
  float slope, offset;
  MOVQ_DEVICE Affine modulated(float y, float b) const { return {slope * y, offset * y + b}; }
};

template <class T>
MOVQ_DEVICE Affine load_affine(const Geometry& geometry, const BackwardArrays<T>& arrays, int64_t image, int channel) {
  return {load(arrays.rstd + group_index(geometry, image, channel)) *
              load_parameter<T>(arrays.weight, channel, geometry.float_params, 1),
          load_parameter<T>(arrays.bias, channel, geometry.float_params, 0)};
}

template <class T>
MOVQ_DEVICE float load_mean(const Geometry& geometry, const BackwardArrays<T>& arrays, int64_t image, int channel) {
  return load(arrays.mean + group_index(geometry, image, channel));
}

// `Values` floats for each channel of a block, in shared memory (NHWC). One thread computes those of a channel, and every thread
// reads those of its VecSize channels 16 bytes at a time. From global memory each thread would load VecSize scalars of each.
template <int VecSize, int Values>
class BlockChannels {
 public:
  static constexpr int kWidth = VecSize < 4 ? VecSize : 4;  // floats of an access
  // The two halves of 8 channels are half a row of banks further apart than they need, so that no access collides.
  static constexpr int kHalfPitch = channel_threads(VecSize) * kWidth + (VecSize == 8 ? kWarpSize / 2 : 0);
  static constexpr int kPitch = kHalfPitch * (VecSize / kWidth);
  static constexpr size_t kSharedBytes = sizeof(float) * Values * kPitch;

  MOVQ_DEVICE explicit BlockChannels(unsigned shared_offset)
      : scalars_(shared_offset, Values * kPitch), accesses_(shared_offset, Values * kPitch / kWidth) {}

  // Calls values_of(channel, values) for every channel of the block.
  template <class Function>
  MOVQ_DEVICE void fill(int channels, Function&& values_of) const {
    for (int channel = threadIdx.x; channel < channels; channel += blockDim.x) {
      float values[Values];
      values_of(channel, values);
#pragma unroll
      for (int value = 0; value < Values; ++value) scalars_.store(slot(value, channel), values[value]);
    }
    __syncthreads();
  }

  MOVQ_DEVICE float load(int value, int channel) const { return scalars_.load(slot(value, channel)); }

  // For the VecSize channels of a thread.
  MOVQ_DEVICE Vec<float, VecSize> load_vec(int value, int inner) const {
    Vec<float, VecSize> result;
#pragma unroll
    for (int i = 0; i < VecSize; i += kWidth) {
      const Vec<float, kWidth> part = accesses_.load(slot(value, inner * VecSize + i) / kWidth);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) result[i + k] = part[k];
    }
    return result;
  }

 private:
  static MOVQ_DEVICE int slot(int value, int channel) {
    const int half = channel % VecSize / kWidth;
    return value * kPitch + half * kHalfPitch + channel / VecSize * kWidth + channel % kWidth;
  }

  Shared<float> scalars_;
  Shared<Vec<float, kWidth>> accesses_;  // the same bytes
};

// What a block holds for each channel: v as a function of f - mean (Affine), and for df also rstd (s1 + n s2).
enum { kMean, kSlope, kOffset, kChannelTerms, kGroupSlope = kChannelTerms, kGroupOffset, kGradientTerms };

// h = dout * act'(u)
template <bool Silu>
MOVQ_DEVICE float activation_gradient(float dout, float centred, const Affine& modulated) {
  return Silu ? dout * silu_derivative(centred * modulated.slope + modulated.offset) : dout;
}

// Calls function(bool_constant<silu>): a branch for an access rather than one for each of its values.
template <class Function>
MOVQ_DEVICE void with_silu(bool silu, Function&& function) {
  if (silu) function(std::true_type());
  else function(std::false_type());
}

// Writes the gradients of zq_y and zq_b for the Channels channels of a cell whose sums are complete, and multiplies the sums by
// Y, which it loads again rather than keep in registers. `at` is the offset of the first channel in zq.
template <class T, int Channels>
MOVQ_DEVICE void write_cell_gradients(const BackwardArrays<T>& arrays, int64_t at, const Vec<float, Channels>& slope,
                                      const Vec<float, Channels>& offset, GradientSums (&sums)[Channels]) {
  const Vec<T, Channels> y = load_vec<Channels>(arrays.zq_y + at);
  Vec<float, Channels> dy, db;
#pragma unroll
  for (int i = 0; i < Channels; ++i) {
    dy[i] = slope[i] * sums[i].q + offset[i] * sums[i].p;
    db[i] = sums[i].p;
    sums[i] = {to_float(y[i]) * sums[i].p, to_float(y[i]) * sums[i].q};
  }
  store_vec(arrays.dzq_y + at, from_float<T>(dy));
  store_vec(arrays.dzq_b + at, from_float<T>(db));
}

// Stores a chunk's sums for one channel, as the sums of Y P and Y Q.
template <class T>
MOVQ_DEVICE void store_chunk_sums(const Geometry& geometry, const BackwardArrays<T>& arrays, int64_t image, int64_t chunks,
                                  int64_t chunk, int channel, const GradientSums& sums) {
  const float rstd = load(arrays.rstd + group_index(geometry, image, channel));
  store_sums(arrays.chunk_sums, (image * chunks + chunk) * geometry.channels + channel, {sums.p, rstd * sums.q});
}

}  // namespace spatial_norm
}  // namespace movq
