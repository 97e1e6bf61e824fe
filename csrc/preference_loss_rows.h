// Sums over a range of packed tokens, and the gradient written back to them; names: fastalign/ops/preference_loss.py.
// No include guard: common.h includes it once per instruction set.

namespace fastalign::FASTALIGN_ISA {

FASTALIGN_INLINE IntLanes kept_lanes(const bool* mask, int64_t n) {
  typedef uint8_t ByteLanes __attribute__((vector_size(FASTALIGN_BYTES / 4)));
  ByteLanes bytes = {};
  if (mask) {
    std::memcpy(&bytes, mask, n);
  } else {
    std::memset(&bytes, 1, n);
  }
  return __builtin_convertvector(bytes, IntLanes) != 0;
}

// Of the tokens that count, among `n` of them: the sum of logp - ref_logp (of logp where ref_logp is null), the sum of
// logp, and their number. What stands in the other cells, NaN included, takes no part.
template <typename T>
void token_sums(const T* logp, const T* ref_logp, const bool* mask, int64_t n, double* gap_sum, double* sum,
                int64_t* count) {
  Lanes gaps = {}, logps = {};
  IntLanes counts = {};
  int64_t i = 0;
  if (!mask) {
    for (; i + kLanes <= n; i += kLanes) {
      const Lanes x = load(logp + i);
      logps += x;
      if (ref_logp) gaps += x - load(ref_logp + i);
    }
    *count += i;
  }
  for (; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    const IntLanes kept = kept_lanes(mask ? mask + i : nullptr, left);
    const Lanes x = left == kLanes ? load(logp + i) : load_some(logp + i, left);
    logps += kept ? x : Lanes{};
    if (ref_logp) {
      const Lanes r = left == kLanes ? load(ref_logp + i) : load_some(ref_logp + i, left);
      gaps += kept ? x - r : Lanes{};
    }
    counts -= kept;  // true is -1
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) *count += counts[lane];
  *sum += sum_of(logps);
  *gap_sum += sum_of(ref_logp ? gaps : logps);
}

// Among `n` tokens, `slope` where they count, else 0.
inline void fill_tokens(float slope, const bool* mask, int64_t n, float* dlogp) {
  const Lanes all = broadcast(slope);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(dlogp + i, mask ? (kept_lanes(mask + i, kLanes) ? all : Lanes{}) : all);
  }
  if (i < n) store_some(dlogp + i, kept_lanes(mask ? mask + i : nullptr, n - i) ? all : Lanes{}, n - i);
}

}  // namespace fastalign::FASTALIGN_ISA
