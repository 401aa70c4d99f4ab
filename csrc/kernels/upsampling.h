// Nearest 2x upsampling followed by a padded 3x3 convolution, as one convolution of the small map: the kernels around that
// convolution, without torch.
//
// The sixteen sums of neighbouring weights (docs/how_the_kernels_work.md, "Upsampling in four phases") have two forms:
//   transposed  [in][4][4][out]       of a transposed convolution with stride 2 and padding 1
//   windows     [2][2][out][2][2][in] of a convolution of 2x2 windows with padding 1 and 4 x out channels; interleave_windows()
//                                     then gathers the four pixels of each window
// Both are what cuDNN reads for maps in NHWC: (in, out, 4, 4) and (4 * out, in, 2, 2) in channels_last.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "dtype.h"

namespace movq {

struct FoldProblem {
  int64_t out_channels = 0, in_channels = 0;
  DType dtype = DType::float32;
  bool channels_last = false;  // the weight is [out][3][3][in], otherwise [out][in][3][3]
  bool windows = false;        // the form of the folded weight
};

// Every sum is computed in float32 and rounded once. Any alignment is correct; 16 bytes is faster.
void fold_upsampling(const FoldProblem&, const void* weight, void* folded, cudaStream_t);

// The gradient of the weight from the gradient of its transposed form (`windows` is ignored).
void fold_upsampling_backward(const FoldProblem&, const void* dfolded, void* dweight, cudaStream_t);

struct InterleaveProblem {
  int64_t batch = 0, channels = 0, height = 0, width = 0;  // of the small map; out has twice the height and width
  DType dtype = DType::float32;                            // of windows and out
  DType bias_dtype = DType::float32;                       // float32 or `dtype`
  int64_t groups = 0;                                      // of the statistics; 0 for none
  int64_t chunk_columns = 0;                               // of out, in one chunk of the statistics: a part of a row
};

// The chunks of an image.
inline int64_t interleave_parts(const InterleaveProblem& problem) {
  return 2 * problem.height * ((2 * problem.width + problem.chunk_columns - 1) / problem.chunk_columns);
}

// windows: [batch][height + 1][width + 1][2][2][channels], the convolution's result. out: [batch][2 height][2 width][channels],
// the four pixels of each window around its centre, plus the bias. bias: [channels], or null for 0. Needs fewer than
// 2^31 elements per row of windows, and a batch and a height of out of at most 65535, the largest grid in y and z.
//
// statistics: of out, for a norm of `groups` groups: [batch][groups][chunk][4], as SpatialNormForward::statistics takes them;
// null if and only if groups is 0. They need 16-byte accesses, and groups of a multiple of 4 channels that divides 128 bytes of
// them.
void interleave_windows(const InterleaveProblem&, const void* windows, const void* bias, void* out, float* statistics,
                        cudaStream_t);

}  // namespace movq
