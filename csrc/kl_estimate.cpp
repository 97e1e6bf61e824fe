// KL estimates on CPU: one pass over the tokens, runs of tokens in parallel. Formulas: fastalign/ops/kl_estimate.py; the
// work on a run: kl_estimate_lanes.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "direct.h"

#define FASTALIGN_ROWS "kl_estimate_lanes.h"
#include "common.h"

namespace {

using fastalign::Bfloat16;
using fastalign::Float16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens that one thread should have before a second one is worth waking.
constexpr int64_t kTokensPerTask = 16384;

// Calls run(zero) with a zero of the type.
template <typename Run>
void for_dtype(ScalarType dtype, const Run& run) {
  switch (dtype) {
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

void estimates(int64_t kind, ScalarType dtype, const void* logp, const void* ref_logp, int64_t n, float* kl) {
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *x = static_cast<const T*>(logp), *y = static_cast<const T*>(ref_logp);
    torch::stable::parallel_for(0, n, kTokensPerTask, [&](int64_t first, int64_t last) {
      FASTALIGN_CALL(kl_estimate<T>, kind, x + first, y + first, last - first, kl + first);
    });
  });
}

// Of k2 or k3, whose slopes are not constant.
void gradients(int64_t kind, ScalarType dtype, const float* grad, const void* logp, const void* ref_logp, int64_t n,
               void* dlogp) {
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *x = static_cast<const T*>(logp), *y = static_cast<const T*>(ref_logp);
    T* to = static_cast<T*>(dlogp);
    torch::stable::parallel_for(0, n, kTokensPerTask, [&](int64_t first, int64_t last) {
      FASTALIGN_CALL(kl_estimate_dlogp<T>, kind, grad + first, x + first, y + first, last - first, to + first);
    });
  });
}

Tensor kl_estimate_cpu(const Tensor& logp_in, const Tensor& ref_logp_in, int64_t kind) {
  const Tensor logp = torch::stable::contiguous(logp_in), ref_logp = torch::stable::contiguous(ref_logp_in);
  Tensor kl = torch::stable::new_empty(logp, logp.sizes(), ScalarType::Float);
  estimates(kind, logp.scalar_type(), logp.const_data_ptr(), ref_logp.const_data_ptr(), logp.numel(),
            static_cast<float*>(kl.mutable_data_ptr()));
  return kl;
}

Tensor kl_estimate_backward_cpu(const Tensor& grad_in, const Tensor& logp_in, const Tensor& ref_logp_in, int64_t kind) {
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor logp = torch::stable::contiguous(logp_in), ref_logp = torch::stable::contiguous(ref_logp_in);
  Tensor dlogp = torch::stable::new_empty(logp, logp.sizes());
  gradients(kind, logp.scalar_type(), static_cast<const float*>(grad.const_data_ptr()), logp.const_data_ptr(),
            ref_logp.const_data_ptr(), logp.numel(), dlogp.mutable_data_ptr());
  return dlogp;
}

}  // namespace

// (kind, dtype, logp, ref_logp, tokens, kl)
PyObject* fastalign::kl_estimate_direct(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments in(given, count);
  const int64_t kind = in.integer();
  const ScalarType dtype = in.dtype();
  const void *logp = in.address<const void>(), *ref_logp = in.address<const void>();
  const int64_t n = in.integer();
  float* kl = in.address<float>();
  return in.finished([&] { estimates(kind, dtype, logp, ref_logp, n, kl); });
}

// (kind, dtype, grad, logp, ref_logp, tokens, dlogp)
PyObject* fastalign::kl_estimate_backward_direct(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments in(given, count);
  const int64_t kind = in.integer();
  const ScalarType dtype = in.dtype();
  const float* grad = in.address<const float>();
  const void *logp = in.address<const void>(), *ref_logp = in.address<const void>();
  const int64_t n = in.integer();
  void* dlogp = in.address<void>();
  return in.finished([&] { gradients(kind, dtype, grad, logp, ref_logp, n, dlogp); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def("kl_estimate(Tensor logp, Tensor ref_logp, int kind) -> Tensor");
  m.def("kl_estimate_backward(Tensor grad, Tensor logp, Tensor ref_logp, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("kl_estimate", TORCH_BOX(&kl_estimate_cpu));
  m.impl("kl_estimate_backward", TORCH_BOX(&kl_estimate_backward_cpu));
}
