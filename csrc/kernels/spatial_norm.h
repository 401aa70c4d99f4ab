// SpatialNorm on the GPU, without torch: out = act(GroupNorm(f) * up(zq_y) + up(zq_b)), and its gradients.
//
// `up` is torch's nearest resize from zq's resolution to f's: source = min(int(floor(position * (float)(in / out))), in - 1).
// Without zq (zq_height == 0) this is GroupNorm, with SiLU if requested. f, out, df, dout and the four zq tensors have the same
// dtype and the same layout (contiguous NCHW, or contiguous NHWC with channels_last). Statistics are float32.
//
// A clip is a map of `frames` frames of `height` rows each, and its zq one of `zq_frames` frames of `zq_height` rows. Each of the
// three axes is resized by the nearest rule. With split_first_frame, f's first frame reads zq's first and the other frames read
// the others by that rule. If zq has one frame, all read it.
//
// Only forward supports three things. `out` may be part of a larger tensor in which other frames precede those of each image, or
// of each channel in NCHW. f_bias is the bias of the convolution that produced f. A bordered zq stands for a resized map that
// went through a 3x3 convolution: that map is constant inside each cell except along the cell's border, so zq has three rows and
// three columns per cell, for its first, inner and last rows and columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "dtype.h"

namespace movq {

constexpr int64_t kMaxMapPixels = INT32_MAX - (1 << 16);  // a thread steps past the last pixel, and that index is an int too

struct SpatialNormProblem {
  int64_t batch = 0, channels = 0, height = 0, width = 0;  // pixels() <= kMaxMapPixels; the whole tensor may be larger
  int64_t groups = 1;
  int64_t zq_height = 0, zq_width = 0;  // 0 without zq
  DType dtype = DType::float32;         // of f, out, zq_y, zq_b and their gradients
  DType param_dtype = DType::float32;   // of weight and bias: float32 or `dtype`
  bool channels_last = false;
  bool silu = false;
  float eps = 1e-6f;
  DType f_bias_dtype = DType::float32;  // float32 or `dtype`
  bool bordered = false;                // cells are at least 2 x 2 pixels of f; zq_height and zq_width count 3 per cell
  int64_t frames = 1, zq_frames = 1;
  bool split_first_frame = false;
  // Elements from one image of `out` to the next, and in NCHW from one channel to the next. 0 where they are adjacent as in f.
  int64_t out_image_stride = 0, out_channel_stride = 0;

  int64_t pixels() const { return frames * height * width; }
  int64_t zq_pixels() const { return zq_frames * zq_height * zq_width; }
};

struct SpatialNormForward {
  const void* f;
  const void* zq_y;  // null if and only if zq_height == 0
  const void* zq_b;
  const void* weight;  // [channels]; null means 1
  const void* bias;    // [channels]; null means 0
  const void* f_bias;  // [channels], added to f first; null means 0
  void* out;
  float* mean;              // [batch, groups]
  float* rstd;              // [batch, groups]
  void* workspace;          // spatial_norm_forward_workspace() bytes
  const float* statistics;  // [batch][groups][parts][4]: mean, m2 and count of parts of f, computed by the kernel that wrote f;
  int64_t parts;            // f is then read only once. Null if there are none; not with f_bias
};

struct SpatialNormBackward {
  const void* dout;
  const void* f;
  const void* zq_y;
  const void* zq_b;
  const void* weight;
  const void* bias;
  const float* mean;
  const float* rstd;
  void* df;
  void* dzq_y;  // null if and only if zq_height == 0
  void* dzq_b;
  void* dweight;    // [channels] in param_dtype; null if weight is
  void* dbias;      // [channels] in param_dtype; null if bias is
  void* workspace;  // spatial_norm_backward_workspace() bytes
};

// The launchers choose between 16-byte and single-element accesses from the pointers and sizes; any alignment is correct.
size_t spatial_norm_forward_workspace(const SpatialNormProblem&, const SpatialNormForward&);
void spatial_norm_forward(const SpatialNormProblem&, const SpatialNormForward&, cudaStream_t);
size_t spatial_norm_backward_workspace(const SpatialNormProblem&, const SpatialNormBackward&);
void spatial_norm_backward(const SpatialNormProblem&, const SpatialNormBackward&, cudaStream_t);

}  // namespace movq
