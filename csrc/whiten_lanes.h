// Whitening of a run of cells by given moments, and its gradient; formulas: fastalign/ops/whiten.py. No include guard:
// common.h includes it once per instruction set.
#include "moments_lanes.h"

namespace fastalign::FASTALIGN_ISA {

FASTALIGN_INLINE Lanes whitened(Lanes x, const Whitening& w) { return ((x - w.mean) - w.mean_rest) * w.scale; }

template <typename T>
void whiten(const T* x, const bool* mask, int64_t count, Whitening w, float* y) {
  for_registers(count, [&](int64_t, int64_t i, int64_t n) __attribute__((always_inline)) {
    const IntLanes kept = kept_tokens(mask ? mask + i : nullptr, n);
    const Lanes z = whitened(load_tokens(x + i, n), w) + w.shift;
    store_tokens(y + i, kept ? z : Lanes{}, n);
  });
}

// The sums of g and of g * z, z being the whitened x.
template <typename T>
void whiten_sums(const float* grad, const T* x, const bool* mask, int64_t count, Whitening w, double* out) {
  Lanes plain[kChains] = {}, along[kChains] = {};
  for_registers(count, [&](int64_t j, int64_t i, int64_t n) __attribute__((always_inline)) {
    const IntLanes kept = kept_tokens(mask ? mask + i : nullptr, n);
    const Lanes g = kept ? load_tokens(grad + i, n) : Lanes{};
    plain[j] += g;
    along[j] += kept ? g * whitened(load_tokens(x + i, n), w) : Lanes{};
  });
  out[0] = total_of(plain);
  out[1] = total_of(along);
}

// scale * (g - plain - along * z) + back.
template <typename T>
void whiten_dx(const float* grad, const T* x, const bool* mask, int64_t count, Whitening w, float plain, float along,
               float back, T* dx) {
  for_registers(count, [&](int64_t, int64_t i, int64_t n) __attribute__((always_inline)) {
    const IntLanes kept = kept_tokens(mask ? mask + i : nullptr, n);
    const Lanes z = whitened(load_tokens(x + i, n), w);
    const Lanes d = w.scale * (load_tokens(grad + i, n) - plain - along * z) + back;
    store_tokens(dx + i, kept ? d : Lanes{}, n);
  });
}

}  // namespace fastalign::FASTALIGN_ISA
