// Attention on the GPU, without torch: out = softmax(scale q k^T) v per image and head, and its gradients.
//
// q is (batch, heads, queries, head_size), k and v are (batch, heads, keys, head_size), all of one dtype. The elements of a token
// are adjacent. head_size, every pointer and every stride are multiples of 16 bytes. Intermediate results are float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "dtype.h"

namespace movq {

constexpr int kMaxHeadSize = 512;

// The tokens of one tensor; strides in elements.
struct Tokens {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};

struct AttentionProblem {
  int64_t batch = 0, heads = 0, queries = 0, keys = 0;  // queries and keys are below 2^31 - 128
  int64_t head_size = 0;                                // at most kMaxHeadSize
  DType dtype = DType::float32;
  float scale = 1;
  bool shared_kv = false;  // k and v are one tensor: backward writes the sum of both gradients to dk, and ignores dv
};

struct AttentionForward {
  Tokens q, k, v, out;  // k and v may be the same tokens, which are then read once where shared memory allows
  float* lse;           // [batch, heads, queries]: log(sum(exp(scale q k^T))) over the keys
  void* workspace;      // attention_forward_workspace() bytes
};

struct AttentionBackward {
  Tokens dout, q, k, v, out;
  const float* lse;
  Tokens dq, dk, dv;
  void* workspace;  // attention_backward_workspace() bytes
};

size_t attention_forward_workspace(const AttentionProblem&);
void attention_forward(const AttentionProblem&, const AttentionForward&, cudaStream_t);
size_t attention_backward_workspace(const AttentionProblem&);
void attention_backward(const AttentionProblem&, const AttentionBackward&, cudaStream_t);

}  // namespace movq
