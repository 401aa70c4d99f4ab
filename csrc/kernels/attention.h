// Attention on the GPU, without torch: out = softmax(scale q k^T) v per image and head, and its gradients.
//
// q: (batch, heads, queries, size), k and v: (batch, heads, keys, size), of one type. The elements of a token are adjacent; every
// pointer and every stride is a multiple of 16 bytes, and so is `size`, which is at most 512. Everything between is float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "dtype.h"

namespace movq {

constexpr int kMaxHeadSize = 512;

// Where the tokens of one tensor lie, in elements.
struct Tokens {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};

struct AttentionProblem {
  int64_t batch = 0, heads = 0, queries = 0, keys = 0;  // each token count < 2^31
  int64_t size = 0;                                     // of a head
  DType dtype = DType::float32;
  float scale = 1;
};

struct AttentionForward {
  Tokens q, k, v, out;
  float* lse;       // [batch, heads, queries]: log of the sum of exp(scale q k^T) over the keys
  void* workspace;  // attention_forward_workspace() bytes
};

struct AttentionBackward {
  Tokens dout, q, k, v, out;
  const float* lse;
  Tokens dq, dk, dv;
  void* workspace;
};

size_t attention_forward_workspace(const AttentionProblem&);
void attention_forward(const AttentionProblem&, const AttentionForward&, cudaStream_t);
size_t attention_backward_workspace(const AttentionProblem&);
void attention_backward(const AttentionProblem&, const AttentionBackward&, cudaStream_t);

}  // namespace movq
