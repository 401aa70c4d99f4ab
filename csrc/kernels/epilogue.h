// The epilogue of a convolution on the GPU, without torch: x += bias[channel] + residual, in place.
//
// The sum is computed in float32 and rounded once. x and residual have the same dtype and the same layout (contiguous NCHW, or
// contiguous NHWC with channels_last).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "dtype.h"

namespace movq {

struct EpilogueProblem {
  // channels, pixels and, in NCHW, batch * channels < 2^31; the whole tensor may be larger
  int64_t batch = 0, channels = 0, pixels = 0;
  DType dtype = DType::float32;       // of x and residual
  DType bias_dtype = DType::float32;  // float32 or `dtype`
  bool channels_last = false;
};

struct Epilogue {
  void* x;
  const void* bias;      // [channels]; null means 0
  const void* residual;  // null means 0; may be x itself, but must not partially overlap it
};

// The launcher chooses between 16-byte and single-element accesses from the pointers and sizes; any alignment is correct.
void add_bias_residual(const EpilogueProblem&, const Epilogue&, cudaStream_t);

}  // namespace movq
