// SpatialNorm on the GPU, without torch: out = act(GroupNorm(f) * up(zq_y) + up(zq_b)), and its gradients.
//
// `up` is torch's nearest resize from zq's own resolution to f's: source = min(int(floor(dst * (float)(in / out))), in - 1).
// With zq_height == 0 there is no zq and this is plain GroupNorm (+ SiLU). f, out, df, dout and the four zq tensors share one
// dtype and one layout (contiguous NCHW, or contiguous NHWC when channels_last). Statistics are float32. Forward alone knows
// f_bias, the bias of the convolution that made f, and a bordered zq: what a 3x3 convolution makes of a resized map is the same
// all over a cell but for its borders, so three rows and columns of zq hold a cell: its first, those between, its last.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "dtype.h"

namespace movq {

constexpr int64_t kMostPixels = INT32_MAX - (1 << 16);  // a thread's next pixel is an int too, behind the last

struct SpatialNormProblem {
  int64_t batch = 0, channels = 0, height = 0, width = 0;  // height * width <= kMostPixels; the whole tensor may exceed it
  int64_t groups = 1;
  int64_t zq_height = 0, zq_width = 0;
  DType dtype = DType::float32;        // of f and everything of its kind
  DType param_dtype = DType::float32;  // of weight and bias: float32 or `dtype`
  bool channels_last = false;
  bool silu = false;
  float eps = 1e-6f;
  DType f_bias_dtype = DType::float32;  // float32 or `dtype`
  bool bordered = false;  // zq_height and zq_width are 3 for each cell, and cells are of 2 rows and columns of f at least
};

struct SpatialNormForward {
  const void* f;
  const void* zq_y;  // null exactly when zq_height == 0
  const void* zq_b;
  const void* weight;  // null means 1
  const void* bias;    // null means 0
  const void* f_bias;  // [channels], added to f before anything else; null means 0
  void* out;
  float* mean;      // [batch, groups]
  float* rstd;      // [batch, groups]
  void* workspace;  // spatial_norm_forward_workspace() bytes
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
  void* dzq_y;  // null exactly when zq_height == 0
  void* dzq_b;
  void* dweight;  // [channels] in param_dtype; null when weight is
  void* dbias;    // [channels] in param_dtype; null when bias is
  void* workspace;
};

// Whether 16-byte accesses can be used is decided here, from the pointers and the sizes; either way the result is right.
size_t spatial_norm_forward_workspace(const SpatialNormProblem&, const SpatialNormForward&);
void spatial_norm_forward(const SpatialNormProblem&, const SpatialNormForward&, cudaStream_t);
size_t spatial_norm_backward_workspace(const SpatialNormProblem&, const SpatialNormBackward&);
void spatial_norm_backward(const SpatialNormProblem&, const SpatialNormBackward&, cudaStream_t);

}  // namespace movq
