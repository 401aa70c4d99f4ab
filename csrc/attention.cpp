// The operators attention_* and shared_kv_attention_* for CUDA tensors: checks, layout, allocation and stream around the
// launchers. Every forward writes the same lse, so the backward of either kind of kernel takes it.
#include "kernels/attention.h"

#include <tuple>

#include "kernels/shared_kv_attention.h"
#include "tensors.h"

namespace {

using movq::empty_contiguous;
using movq::ScalarType;
using movq::shape;
using movq::Tensor;

// The tensor as the kernels need it: adjacent elements in each token, and 16-byte alignment of addresses, strides and head size.
// Copies it if necessary; a head size that does not fit is padded with zeros.
Tensor aligned(const Tensor& tensor) {
  const int64_t step = 16 / tensor.element_size(), head_size = tensor.size(3);
  bool fits = head_size % step == 0 && tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < 3; ++dim) fits = fits && (tensor.size(dim) == 1 || tensor.stride(dim) % step == 0);
  if (fits) return tensor;
  std::array<int64_t, 4> sizes = movq::sizes_of_4d(tensor);
  sizes[3] = (head_size + step - 1) / step * step;
  Tensor copy = empty_contiguous(sizes, movq::dtype_code(tensor), tensor);
  if (sizes[3] > head_size) torch::stable::zero_(copy);
  Tensor unpadded = torch::stable::narrow(copy, 3, 0, head_size);
  torch::stable::copy_(unpadded, tensor);
  return copy;
}

// Removes the padding that aligned() added.
Tensor without_padding(Tensor tensor, int64_t head_size) {
  std::array<int64_t, 4> sizes = movq::sizes_of_4d(tensor);
  if (sizes[3] == head_size) return tensor;
  sizes[3] = head_size;
  Tensor copy = empty_contiguous(sizes, movq::dtype_code(tensor), tensor);
  return torch::stable::copy_(copy, torch::stable::narrow(tensor, 3, 0, head_size));
}

movq::Tokens tokens(const Tensor& tensor) {
  auto stride = [&](int64_t dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); };
  return {const_cast<void*>(tensor.const_data_ptr()), stride(0), stride(1), stride(2)};
}

// The arguments of both forward and backward, checked and aligned.
struct Inputs {
  Tensor q, k, v;
  movq::AttentionProblem problem;

  Inputs(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, double scale) {
    check_rank("q", given_q);
    CHECK_ARGUMENT(given_q.size(3) <= movq::kMaxHeadSize, "q must have a head size of at most ", movq::kMaxHeadSize, ", got ",
                   given_q.size(3));
    const bool shared = given_v.get() == given_k.get();  // one tensor, kv
    for (const auto& [name, tensor] : {std::pair(shared ? "kv" : "k", &given_k), std::pair(shared ? "kv" : "v", &given_v)}) {
      check_rank(name, *tensor);
      CHECK_ARGUMENT(
          tensor->size(0) == given_q.size(0) && tensor->size(1) == given_q.size(1) && tensor->size(3) == given_q.size(3), name,
          " must have q's batch, heads and head size ", shape(given_q), ", got ", shape(*tensor));
      movq::check_device(name, *tensor, "q", given_q);
      movq::check_dtype(name, *tensor, "q", given_q);
    }
    CHECK_ARGUMENT(given_k.size(2) == given_v.size(2), "k and v must have the same number of tokens, got ", given_k.size(2),
                   " and ", given_v.size(2));
    constexpr int64_t kMaxTokens = INT32_MAX - 128;  // the last tile may reach 127 tokens further
    CHECK_ARGUMENT(given_q.size(2) <= kMaxTokens && given_k.size(2) <= kMaxTokens, "q and k must have at most ", kMaxTokens,
                   " tokens, got ", given_q.size(2), " and ", given_k.size(2));
    q = aligned(given_q);
    k = aligned(given_k);
    v = shared ? k : aligned(given_v);
    problem.batch = q.size(0);
    problem.heads = q.size(1);
    problem.queries = q.size(2);
    problem.keys = k.size(2);
    problem.head_size = q.size(3);
    problem.dtype = movq::dtype_of(q, "q");
    problem.scale = static_cast<float>(scale);
  }

  static void check_rank(const char* name, const Tensor& tensor) {
    CHECK_ARGUMENT(tensor.dim() == 4 && tensor.numel() > 0, name,
                   " must have 4 dimensions (batch, heads, tokens, head size) and not be empty, got shape ", shape(tensor));
  }
};

Tensor empty_contiguous_like(const Tensor& tensor) {
  return empty_contiguous(movq::sizes_of_4d(tensor), movq::dtype_code(tensor), tensor);
}

// True if the Hopper kernels are wanted and run here. A program that was exported for them may run on any device.
bool use_hopper(bool wanted, const movq::AttentionProblem& problem) {
  return wanted && movq::has_shared_kv_kernels(problem.dtype, problem.head_size);
}

// `hopper` is only for k and v that are one tensor.
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool hopper) {
  const movq::DeviceGuard guard(q.get_device_index());
  const Inputs inputs(q, k, v, scale);
  const Tensor out = empty_contiguous_like(inputs.q);
  const Tensor lse = empty_contiguous<3>({q.size(0), q.size(1), q.size(2)}, aoti_torch_dtype_float32(), q);
  const cudaStream_t stream = movq::current_stream(q);
  if (use_hopper(hopper, inputs.problem)) {
    const Tensor workspace = movq::allocate_workspace(movq::shared_kv_forward_workspace(inputs.problem), q);
    const movq::SharedKvForward arguments = {
        .q = tokens(inputs.q),
        .kv = tokens(inputs.k),
        .out = tokens(out),
        .lse = lse.mutable_data_ptr<float>(),
        .workspace = workspace.mutable_data_ptr(),
    };
    movq::shared_kv_forward(inputs.problem, arguments, stream);
    return {without_padding(out, q.size(3)), lse};
  }
  const Tensor workspace = movq::allocate_workspace(movq::attention_forward_workspace(inputs.problem), q);
  const movq::AttentionForward arguments = {
      .q = tokens(inputs.q),
      .k = tokens(inputs.k),
      .v = tokens(inputs.v),
      .out = tokens(out),
      .lse = lse.mutable_data_ptr<float>(),
      .workspace = workspace.mutable_data_ptr(),
  };
  movq::attention_forward(inputs.problem, arguments, stream);
  return {without_padding(out, q.size(3)), lse};
}

// The gradients of q, k and v. With `shared_kv`, k and v are one tensor, whose gradient takes dk's place, and dv is undefined.
// `hopper` is only for that case.
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& given_dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& given_out, const Tensor& lse, double scale, bool shared_kv,
                                             bool hopper) {
  const movq::DeviceGuard guard(q.get_device_index());
  Inputs inputs(q, k, v, scale);
  inputs.problem.shared_kv = shared_kv;
  for (const auto& [name, tensor] : {std::pair("dout", &given_dout), std::pair("out", &given_out)}) {
    CHECK_ARGUMENT(tensor->sizes().equals(q.sizes()), name, " must have q's shape ", shape(q), ", got ", shape(*tensor));
    movq::check_device(name, *tensor, "q", q);
    movq::check_dtype(name, *tensor, "q", q);
  }
  CHECK_ARGUMENT(lse.sizes().equals(q.sizes().slice(0, 3)), "lse must have q's batch, heads and tokens ",
                 movq::brackets(q.sizes().slice(0, 3)), ", got shape ", shape(lse));
  CHECK_ARGUMENT(lse.is_contiguous(), "lse must be contiguous, got strides ", movq::strides(lse));
  CHECK_ARGUMENT(lse.scalar_type() == ScalarType::Float, "lse must be float32, got ", lse.scalar_type());
  movq::check_device("lse", lse, "q", q);
  const Tensor dout = aligned(given_dout), out = aligned(given_out);
  const Tensor dq = empty_contiguous_like(inputs.q), dk = empty_contiguous_like(inputs.k);
  const cudaStream_t stream = movq::current_stream(q);
  if (use_hopper(hopper, inputs.problem)) {
    const Tensor workspace = movq::allocate_workspace(movq::shared_kv_backward_workspace(inputs.problem), q);
    const movq::SharedKvBackward arguments = {
        .dout = tokens(dout),
        .q = tokens(inputs.q),
        .kv = tokens(inputs.k),
        .out = tokens(out),
        .lse = lse.const_data_ptr<float>(),
        .dq = tokens(dq),
        .dkv = tokens(dk),
        .workspace = workspace.mutable_data_ptr(),
    };
    movq::shared_kv_backward(inputs.problem, arguments, stream);
    return {without_padding(dq, q.size(3)), without_padding(dk, q.size(3)), Tensor()};
  }
  const Tensor dv = shared_kv ? Tensor() : empty_contiguous_like(inputs.v);
  const Tensor workspace = movq::allocate_workspace(movq::attention_backward_workspace(inputs.problem), q);
  const movq::AttentionBackward arguments = {
      .dout = tokens(dout),
      .q = tokens(inputs.q),
      .k = tokens(inputs.k),
      .v = tokens(inputs.v),
      .out = tokens(out),
      .lse = lse.const_data_ptr<float>(),
      .dq = tokens(dq),
      .dk = tokens(dk),
      .dv = shared_kv ? movq::Tokens() : tokens(dv),
      .workspace = workspace.mutable_data_ptr(),
  };
  movq::attention_backward(inputs.problem, arguments, stream);
  return {without_padding(dq, q.size(3)), without_padding(dk, q.size(3)), shared_kv ? dv : without_padding(dv, q.size(3))};
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  return forward(q, k, v, scale, /*hopper=*/false);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& out, const Tensor& lse, double scale) {
  return gradients(dout, q, k, v, out, lse, scale, /*shared_kv=*/false, /*hopper=*/false);
}

// Attention whose keys are also its values.

std::tuple<Tensor, Tensor> shared_kv_attention_forward(const Tensor& q, const Tensor& kv, double scale, bool hopper) {
  return forward(q, kv, kv, scale, hopper);
}

std::tuple<Tensor, Tensor> shared_kv_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& kv, const Tensor& out,
                                                        const Tensor& lse, double scale, bool hopper) {
  const auto [dq, dkv, none] = gradients(dout, q, kv, kv, out, lse, scale, /*shared_kv=*/true, hopper);
  return {dq, dkv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(movq_ext, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("shared_kv_attention_forward", TORCH_BOX(&shared_kv_attention_forward));
  m.impl("shared_kv_attention_backward", TORCH_BOX(&shared_kv_attention_backward));
}
