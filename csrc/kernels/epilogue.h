// The epilogue of a convolution on the GPU, without torch: x += bias[channel] + residual, in place.
//
// Computed in float32 and rounded once. x and residual share one dtype and one layout (contiguous NCHW, or contiguous NHWC when
// channels_last).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "dtype.h"

namespace movq {

struct EpilogueProblem {
  int64_t batch = 0, channels = 0, pixels = 0;  // channels, pixels < 2^31; the whole tensor may exceed it
  DType dtype = DType::float32;                 // of x and residual
  DType bias_dtype = DType::float32;            // float32 or `dtype`
  bool channels_last = false;
};

struct Epilogue {
  void* x;
  const void* bias;      // [channels]; null means 0
  const void* residual;  // null means 0; x itself, or memory apart from it
};

// Whether 16-byte accesses can be used is decided here, from the pointers and the sizes; either way the result is right.
void add_bias_residual(const EpilogueProblem&, const Epilogue&, cudaStream_t);

}  // namespace movq
