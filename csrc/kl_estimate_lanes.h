// KL estimates of a run of tokens and their gradient; formulas: fastalign/ops/kl_estimate.py. No include guard: common.h
// includes it once per instruction set.
#include "token_lanes.h"

namespace fastalign::FASTALIGN_ISA {

template <int kKind, typename T>
void kl_of_kind(const T* logp, const T* ref_logp, int64_t count, float* kl) {
  for_registers(count, [&](int64_t, int64_t i, int64_t n) __attribute__((always_inline)) {
    const Lanes d = load_tokens(ref_logp + i, n) - load_tokens(logp + i, n);
    store_tokens(kl + i, kl_lanes<kKind>(d), n);
  });
}

template <int kKind, typename T>
void dlogp_of_kind(const float* grad, const T* logp, const T* ref_logp, int64_t count, T* dlogp) {
  for_registers(count, [&](int64_t, int64_t i, int64_t n) __attribute__((always_inline)) {
    const Lanes d = load_tokens(ref_logp + i, n) - load_tokens(logp + i, n);
    store_tokens(dlogp + i, load_tokens(grad + i, n) * kl_slope<kKind>(d), n);
  });
}

template <typename T>
void kl_estimate(int64_t kind, const T* logp, const T* ref_logp, int64_t count, float* kl) {
  if (kind == 0) return kl_of_kind<0>(logp, ref_logp, count, kl);
  if (kind == 1) return kl_of_kind<1>(logp, ref_logp, count, kl);
  kl_of_kind<2>(logp, ref_logp, count, kl);
}

template <typename T>
void kl_estimate_dlogp(int64_t kind, const float* grad, const T* logp, const T* ref_logp, int64_t count, T* dlogp) {
  if (kind == 1) return dlogp_of_kind<1>(grad, logp, ref_logp, count, dlogp);
  dlogp_of_kind<2>(grad, logp, ref_logp, count, dlogp);
}

}  // namespace fastalign::FASTALIGN_ISA
