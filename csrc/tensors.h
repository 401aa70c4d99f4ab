// Helpers that the torch side of every operator uses.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "kernels/dtype.h"

namespace movq {

inline DType dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::float32;
    case at::kHalf: return DType::float16;
    case at::kBFloat16: return DType::bfloat16;
    default: TORCH_CHECK_TYPE(false, name, " must be float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

inline void check_device(const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), name, " must be on ", other_name, "'s device ", other.device(), ", got ",
                    tensor.device());
}

inline void check_dtype(const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), name, " must have ", other_name, "'s dtype ", other.scalar_type(),
                   ", got ", tensor.scalar_type());
}

// A tensor of one value per channel of `other` (batch, channels, height, width), in its dtype or float32.
inline void check_channel_parameter(const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other) {
  const int64_t channels = other.size(1);
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == channels, name, " must have shape (", channels, ",), got ",
                    tensor.sizes());
  check_device(name, tensor, other_name, other);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == other.scalar_type(), name,
                   " must be float32 or have ", other_name, "'s dtype ", other.scalar_type(), ", got ", tensor.scalar_type());
}

// Scratch memory for one launch. The caching allocator reuses it on the same stream only.
inline at::Tensor allocate_workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

// Null for an undefined tensor.
inline const void* read_pointer(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

}  // namespace movq
