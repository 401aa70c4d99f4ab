// Helpers that the torch side of every operator uses.
//
// The torch side calls only PyTorch's stable ABI (torch/csrc/stable, torch/headeronly and the C functions below them), as of the
// version in TORCH_TARGET_VERSION, which setup.py sets. The binary then runs with that version of torch and every later one.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "errors.h"
#include "kernels/dtype.h"

namespace movq {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using OptionalTensor = std::optional<Tensor>;

// --- Text of messages

// As [2, 3].
inline std::string brackets(IntHeaderOnlyArrayRef numbers) {
  std::ostringstream text;
  for (size_t i = 0; i < numbers.size(); ++i) text << (i ? ", " : "") << numbers[i];
  return "[" + text.str() + "]";
}

inline std::string shape(const Tensor& tensor) { return brackets(tensor.sizes()); }
inline std::string strides(const Tensor& tensor) { return brackets(tensor.strides()); }

inline std::string device_name(const Tensor& tensor) {
  return tensor.is_cuda() ? concatenated("cuda:", tensor.get_device_index()) : tensor.is_cpu() ? "cpu" : "another device";
}

// --- Allocation and streams

[[noreturn]] inline void throw_allocation_error(int64_t bytes) {
  size_t free = 0, total = 0;
  const cudaError_t status = cudaMemGetInfo(&free, &total);  // an earlier kernel's error fails the next allocation, too
  if (status != cudaSuccess) throw std::runtime_error(concatenated("CUDA error: ", cudaGetErrorString(status)));
  throw OutOfMemory(concatenated("CUDA out of memory. Tried to allocate ", bytes, " bytes; ", free, " of ", total,
                                 " bytes are free on the GPU."));
}

// An uninitialised tensor on `like`'s device; `dtype` is a code of torch's C interface.
inline Tensor empty_strided(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, int32_t dtype, const Tensor& like) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device_type, like.get_device_index(),
                               &handle) != TORCH_SUCCESS) {
    int64_t bytes = aoti_torch_dtype_element_size(dtype);
    for (int64_t size : sizes) bytes *= size;
    throw_allocation_error(bytes);
  }
  return Tensor(handle);
}

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// With the sizes, strides and dtype of a tensor that is dense in memory.
inline Tensor empty_like(const Tensor& tensor) {
  return empty_strided(tensor.sizes(), tensor.strides(), dtype_code(tensor), tensor);
}

template <size_t N>
Tensor empty_contiguous(const std::array<int64_t, N>& sizes, int32_t dtype, const Tensor& like) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t dim = N; dim-- > 0; stride *= sizes[dim]) strides[dim] = stride;
  return empty_strided({sizes.data(), N}, {strides.data(), N}, dtype, like);
}

inline std::array<int64_t, 4> sizes_of_4d(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

// Scratch memory for one launch. The caching allocator reuses it on the same stream only.
inline Tensor allocate_workspace(size_t bytes, const Tensor& like) {
  return empty_contiguous<1>({static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8(), like);
}

// The current stream of a tensor's device.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// --- Layouts of maps (batch, channels, height, width)

// True if the elements are adjacent in the order of `format`. Strides of dimensions of size 1 do not matter.
inline bool is_dense(const Tensor& x, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous) return x.is_contiguous();
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (x.size(dim) == 1) continue;
    if (x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

// Uninitialised, in like's dtype.
inline Tensor empty_map(const std::array<int64_t, 4>& sizes, MemoryFormat format, const Tensor& like) {
  const auto [batch, channels, height, width] = sizes;
  const std::array<int64_t, 4> strides = format == MemoryFormat::ChannelsLast
                                             ? std::array{height * width * channels, int64_t{1}, width * channels, channels}
                                             : std::array{channels * height * width, height * width, width, int64_t{1}};
  return empty_strided({sizes.data(), 4}, {strides.data(), 4}, dtype_code(like), like);
}

// x in a format, copied if necessary.
inline Tensor in_format(const Tensor& x, MemoryFormat format) {
  if (is_dense(x, format)) return x;
  Tensor copy = empty_map(sizes_of_4d(x), format, x);
  return torch::stable::copy_(copy, x);
}

// x itself if it is contiguous, else a contiguous copy.
inline Tensor contiguous_vector(const Tensor& x) {
  if (x.is_contiguous()) return x;
  Tensor copy = empty_contiguous<1>({x.size(0)}, dtype_code(x), x);
  return torch::stable::copy_(copy, x);
}

// --- Checks

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: throw_argument_error(name, " must be float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

inline void check_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  CHECK_ARGUMENT(tensor.device() == other.device(), name, " must be on ", other_name, "'s device ", device_name(other), ", got ",
                 device_name(tensor));
}

inline void check_dtype(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  CHECK_ARGUMENT(tensor.scalar_type() == other.scalar_type(), name, " must have ", other_name, "'s dtype ", other.scalar_type(),
                 ", got ", tensor.scalar_type());
}

// The bytes from a tensor's first element to the end of its last.
inline int64_t extent(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return (last + 1) * tensor.element_size();
}

// The output may be the input itself. A partial overlap would overwrite values before they are read.
inline void check_overlap(const char* name, const Tensor& read, const char* written_name, const Tensor& written) {
  const auto start = reinterpret_cast<uintptr_t>(read.const_data_ptr());
  const auto written_start = reinterpret_cast<uintptr_t>(written.const_data_ptr());
  bool is_same = start == written_start;
  for (int64_t dim = 0; dim < read.dim(); ++dim) is_same &= read.size(dim) == 1 || read.stride(dim) == written.stride(dim);
  CHECK_ARGUMENT(is_same || start >= written_start + extent(written) || written_start >= start + extent(read), name, " must be ",
                 written_name, " itself or not overlap it, got one that starts ",
                 static_cast<int64_t>(start) - static_cast<int64_t>(written_start), " bytes after ", written_name, ", which has ",
                 extent(written));
}

// A tensor of one value per channel of `other` (batch, channels, height, width), in its dtype or float32.
inline void check_channel_parameter(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  const int64_t channels = other.size(1);
  CHECK_ARGUMENT(tensor.dim() == 1 && tensor.size(0) == channels, name, " must have shape (", channels, ",), got ",
                 shape(tensor));
  check_device(name, tensor, other_name, other);
  CHECK_ARGUMENT(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == other.scalar_type(), name,
                 " must be float32 or have ", other_name, "'s dtype ", other.scalar_type(), ", got ", tensor.scalar_type());
}

// --- Pointers: null for a tensor that was not given

inline const void* read_pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
inline void* write_pointer(const OptionalTensor& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

}  // namespace movq
