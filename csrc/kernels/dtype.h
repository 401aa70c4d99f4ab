// The element types that kernels accept.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace movq {

enum class DType { float32, float16, bfloat16 };

inline int bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

template <class T> struct Type { using type = T; };

// Calls function(Type<T>) with the C++ type.
template <class Function>
void with_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::float32: return function(Type<float>());
    case DType::float16: return function(Type<__half>());
    case DType::bfloat16: return function(Type<__nv_bfloat16>());
  }
}

}  // namespace movq
