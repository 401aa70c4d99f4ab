// Attention whose keys are also its values, on Hopper's own instructions (compute capability 9.0), without torch:
// out = softmax(scale q kv^T) kv per image and head, and its gradients.
//
// q is (batch, heads, queries, head_size) and kv (batch, heads, keys, head_size), both float16 or both bfloat16, with a head size
// of 128, 256 or 512. The elements of a token are adjacent; every pointer and stride is a multiple of 16 bytes. Strides of
// dimensions of size 1 are ignored. Intermediate results are float32. benchmarks/results/h200 has times.
#pragma once

#include "attention.h"

namespace movq {

struct SharedKvForward {
  Tokens q, kv, out;
  float* lse;       // [batch, heads, queries]: log(sum(exp(scale q kv^T))) over the keys
  void* workspace;  // shared_kv_forward_workspace() bytes
};

struct SharedKvBackward {
  Tokens dout, q, kv, out;
  const float* lse;
  Tokens dq, dkv;
  void* workspace;  // shared_kv_backward_workspace() bytes
};

// True if the current device runs these kernels for the dtype and the head size: it has compute capability 9.0 and this build has
// code for 9.0a. The functions below require that.
bool has_shared_kv_kernels(DType dtype, int64_t head_size);

size_t shared_kv_forward_workspace(const AttentionProblem&);
void shared_kv_forward(const AttentionProblem&, const SharedKvForward&, cudaStream_t);
size_t shared_kv_backward_workspace(const AttentionProblem&);
void shared_kv_backward(const AttentionProblem&, const SharedKvBackward&, cudaStream_t);

}  // namespace movq
