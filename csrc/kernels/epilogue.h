// The epilogue of a convolution on the GPU, without torch: x += bias[channel] + residual, in place.
//
// On request it also leaves the statistics of the sum, for a norm of `groups` groups: the moments of chunks of x, as
// SpatialNormForward::statistics takes them.
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
  int64_t groups = 0;        // of the statistics; 0 for none
  int64_t chunk_pixels = 0;  // of one chunk; the last chunk of an image may be smaller
};

struct Epilogue {
  void* x;
  const void* bias;      // [channels]; null means 0
  const void* residual;  // null means 0; may be x itself, but must not partially overlap it
  float* statistics;     // [batch][groups][part][4]: mean, m2, count and 0; null if and only if there are none
};

// The parts of a group: its chunks in NHWC, those of each of its channels in NCHW.
inline int64_t epilogue_parts(const EpilogueProblem& problem) {
  const int64_t chunks = (problem.pixels + problem.chunk_pixels - 1) / problem.chunk_pixels;
  return problem.channels_last ? chunks : chunks * (problem.channels / problem.groups);
}

// The launcher chooses between 16-byte and single-element accesses from the pointers and sizes; any alignment is correct.
// Statistics need 16-byte accesses, and
// - in NHWC, groups of a multiple of 4 channels, and at most 4096 bytes of channels per pixel;
// - in NCHW, chunks of whole accesses.
void add_bias_residual(const EpilogueProblem&, const Epilogue&, cudaStream_t);

}  // namespace movq
