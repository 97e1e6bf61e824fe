// KL estimates on CPU: one pass over the tokens, runs of tokens in parallel. Formulas: fastalign/ops/kl_estimate.py; the
// work on a run: kl_estimate_lanes.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#define FASTALIGN_ROWS "kl_estimate_lanes.h"
#include "common.h"

namespace {

using fastalign::Bfloat16;
using fastalign::Float16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens that one thread should have before a second one is worth waking.
constexpr int64_t kTokensPerTask = 16384;

// Calls run(zero) with a zero of the tensor's type.
template <typename Run>
void for_dtype(const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::BFloat16:
      return run(Bfloat16{});
    case ScalarType::Half:
      return run(Float16{});
    default:
      STD_TORCH_CHECK(false, "kl_estimate: expected float32, bfloat16 or float16 log-probs on CPU");
  }
}

Tensor kl_estimate_cpu(const Tensor& logp_in, const Tensor& ref_logp_in, int64_t kind) {
  const Tensor logp = torch::stable::contiguous(logp_in), ref_logp = torch::stable::contiguous(ref_logp_in);
  Tensor kl = torch::stable::new_empty(logp, logp.sizes(), ScalarType::Float);
  for_dtype(logp, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(logp.const_data_ptr());
    const T* y = static_cast<const T*>(ref_logp.const_data_ptr());
    float* to = static_cast<float*>(kl.mutable_data_ptr());
    torch::stable::parallel_for(0, logp.numel(), kTokensPerTask, [&](int64_t first, int64_t last) {
      FASTALIGN_CALL(kl_estimate<T>, kind, x + first, y + first, last - first, to + first);
    });
  });
  return kl;
}

// Of k2 or k3, whose slopes are not constant.
Tensor kl_estimate_backward_cpu(const Tensor& grad_in, const Tensor& logp_in, const Tensor& ref_logp_in, int64_t kind) {
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor logp = torch::stable::contiguous(logp_in), ref_logp = torch::stable::contiguous(ref_logp_in);
  Tensor dlogp = torch::stable::new_empty(logp, logp.sizes());
  for_dtype(logp, [&](auto zero) {
    using T = decltype(zero);
    const float* g = static_cast<const float*>(grad.const_data_ptr());
    const T* x = static_cast<const T*>(logp.const_data_ptr());
    const T* y = static_cast<const T*>(ref_logp.const_data_ptr());
    T* to = static_cast<T*>(dlogp.mutable_data_ptr());
    torch::stable::parallel_for(0, logp.numel(), kTokensPerTask, [&](int64_t first, int64_t last) {
      FASTALIGN_CALL(kl_estimate_dlogp<T>, kind, g + first, x + first, y + first, last - first, to + first);
    });
  });
  return dlogp;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def("kl_estimate(Tensor logp, Tensor ref_logp, int kind) -> Tensor");
  m.def("kl_estimate_backward(Tensor grad, Tensor logp, Tensor ref_logp, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("kl_estimate", TORCH_BOX(&kl_estimate_cpu));
  m.impl("kl_estimate_backward", TORCH_BOX(&kl_estimate_backward_cpu));
}
