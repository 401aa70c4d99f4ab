// The operators attention_forward and attention_backward for CUDA tensors: checks, allocation, stream; then the launchers.
#include "kernels/attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "tensors.h"

namespace {

using at::Tensor;

// Elements in 16 bytes, of which every token must be a multiple.
int64_t granule(const Tensor& t) { return 16 / t.element_size(); }

// The kernels take tokens whose elements are adjacent, and addresses of whole 16 bytes: t itself where it is so, or a copy, with
// zeros behind every token where that is what it lacks.
Tensor usable(const Tensor& t) {
  const int64_t step = granule(t), size = t.size(3);
  if (size % step) return at::constant_pad_nd(t, {0, step - size % step}).contiguous();  // it keeps channels_last
  bool fits = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < 3; ++dim) fits = fits && (t.size(dim) == 1 || t.stride(dim) % step == 0);
  return fits ? t : t.clone(at::MemoryFormat::Contiguous);
}

movq::Tokens tokens(const Tensor& t) {
  auto stride = [&](int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  return {const_cast<void*>(t.const_data_ptr()), stride(0), stride(1), stride(2)};
}

// The arguments that forward and backward share, checked and laid out.
struct Inputs {
  Tensor q, k, v;
  movq::AttentionProblem problem;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, double scale) {
    TORCH_CHECK_VALUE(q_.dim() == 4 && q_.numel() > 0,
                      "q must have 4 dimensions (batch, heads, tokens, head size), none empty, got shape ", q_.sizes());
    TORCH_CHECK_VALUE(q_.size(3) <= movq::kMaxHeadSize, "q must have a head size of at most ", movq::kMaxHeadSize, ", got ",
                      q_.size(3));
    for (const auto& [name, t] : {std::pair("k", &k_), std::pair("v", &v_)}) {
      TORCH_CHECK_VALUE(
          t->dim() == 4 && t->numel() > 0 && t->size(0) == q_.size(0) && t->size(1) == q_.size(1) && t->size(3) == q_.size(3),
          name, " must have 4 dimensions, none empty, with q's batch, heads and head size ", q_.sizes(), ", got shape ",
          t->sizes());
      TORCH_CHECK_VALUE(t->device() == q_.device(), name, " must be on q's device ", q_.device(), ", got ", t->device());
      TORCH_CHECK_TYPE(t->scalar_type() == q_.scalar_type(), name, " must have q's dtype ", q_.scalar_type(), ", got ",
                       t->scalar_type());
    }
    TORCH_CHECK_VALUE(k_.size(2) == v_.size(2), "k and v must have the same tokens, got ", k_.size(2), " and ", v_.size(2));
    constexpr int64_t most = INT32_MAX - 128;  // of which the last tile may reach beyond
    TORCH_CHECK_VALUE(q_.size(2) <= most && k_.size(2) <= most, "q and k must have at most ", most, " tokens, got ", q_.size(2),
                      " and ", k_.size(2));
    q = usable(q_);
    k = usable(k_);
    v = usable(v_);
    problem.batch = q.size(0);
    problem.heads = q.size(1);
    problem.queries = q.size(2);
    problem.keys = k.size(2);
    problem.size = q.size(3);
    problem.dtype = movq::dtype_of(q, "q");
    problem.scale = static_cast<float>(scale);
  }

  Tensor empty_like(const Tensor& t) const { return at::empty(t.sizes(), t.options(), at::MemoryFormat::Contiguous); }
};

// Without the zeros that usable() put behind every token.
Tensor trimmed(const Tensor& t, int64_t size) { return t.size(3) == size ? t : t.narrow(3, 0, size).contiguous(); }

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Inputs i(q, k, v, scale);
  const Tensor out = i.empty_like(i.q);
  const Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  const Tensor scratch = movq::workspace(movq::attention_forward_workspace(i.problem), q);
  const movq::AttentionForward a = {
      tokens(i.q), tokens(i.k), tokens(i.v), tokens(out), lse.mutable_data_ptr<float>(), scratch.mutable_data_ptr()};
  movq::attention_forward(i.problem, a, c10::cuda::getCurrentCUDAStream());
  return {trimmed(out, q.size(3)), lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Inputs i(q, k, v, scale);
  for (const auto& [name, t] : {std::pair("dout", &dout), std::pair("out", &out)}) {
    TORCH_CHECK_VALUE(t->sizes() == q.sizes() && t->device() == q.device(), name, " must have q's shape and device, got ",
                      t->sizes(), " on ", t->device());
    TORCH_CHECK_TYPE(t->scalar_type() == q.scalar_type(), name, " must have q's dtype ", q.scalar_type(), ", got ",
                     t->scalar_type());
  }
  TORCH_CHECK_VALUE(lse.sizes() == q.sizes().slice(0, 3) && lse.scalar_type() == at::kFloat && lse.is_contiguous() &&
                        lse.device() == q.device(),
                    "lse must be what the forward operator returned");
  const Tensor d = usable(dout), o = usable(out);
  const Tensor dq = i.empty_like(i.q), dk = i.empty_like(i.k), dv = i.empty_like(i.v);
  const Tensor scratch = movq::workspace(movq::attention_backward_workspace(i.problem), q);
  // clang-format off
  const movq::AttentionBackward a = {tokens(d), tokens(i.q), tokens(i.k), tokens(i.v), tokens(o), lse.const_data_ptr<float>(),
                                     tokens(dq), tokens(dk), tokens(dv), scratch.mutable_data_ptr()};
  // clang-format on
  movq::attention_backward(i.problem, a, c10::cuda::getCurrentCUDAStream());
  return {trimmed(dq, q.size(3)), trimmed(dk, q.size(3)), trimmed(dv, q.size(3))};
}

}  // namespace

TORCH_LIBRARY_IMPL(movq_ext, CUDA, m) {
  m.impl("attention_forward", &forward);
  m.impl("attention_backward", &backward);
}
