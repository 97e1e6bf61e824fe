// Moments of a run of cells. No include guard: it belongs in headers that common.h includes once per instruction set.
#include "token_lanes.h"

namespace fastalign::FASTALIGN_ISA {

// Count, mean and sum of squared distances from the mean of the kept cells of a run.
template <typename T>
void moments(const T* x, const bool* mask, int64_t count, double* out) {
  Lanes sums[kChains] = {}, squares[kChains] = {};
  IntLanes kept_counts[kChains] = {};
  for_registers(count, [&](int64_t j, int64_t i, int64_t n) __attribute__((always_inline)) {
    const IntLanes kept = kept_tokens(mask ? mask + i : nullptr, n);
    sums[j] += kept ? load_tokens(x + i, n) : Lanes{};
    kept_counts[j] -= kept;  // true is -1
  });
  const int64_t kept_count = total_of(kept_counts);
  const double n_kept = static_cast<double>(kept_count);
  out[0] = n_kept;
  if (kept_count == 0) {
    out[1] = out[2] = 0.0;
    return;
  }
  const float near = static_cast<float>(total_of(sums) / n_kept);
  for (int64_t j = 0; j < kChains; ++j) sums[j] = Lanes{};
  for_registers(count, [&](int64_t j, int64_t i, int64_t n) __attribute__((always_inline)) {
    const IntLanes kept = kept_tokens(mask ? mask + i : nullptr, n);
    const Lanes distance = kept ? load_tokens(x + i, n) - near : Lanes{};
    sums[j] += distance;
    squares[j] += distance * distance;
  });
  const double off = total_of(sums) / n_kept;
  out[1] = near + off;
  const double around = total_of(squares) - n_kept * off * off;
  out[2] = around < 0.0 ? 0.0 : around;  // by rounding; NaN stays
}

}  // namespace fastalign::FASTALIGN_ISA
