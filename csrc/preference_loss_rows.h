// Sums over a range of packed tokens, and the gradient written back to them; names: fastalign/ops/preference_loss.py.
// No include guard: common.h includes it once per instruction set.

namespace fastalign::FASTALIGN_ISA {

// 1 byte per lane, in memory as bool.
FASTALIGN_INLINE IntLanes kept_lanes(const bool* mask) {
  typedef uint8_t ByteLanes __attribute__((vector_size(FASTALIGN_BYTES / 4)));
  ByteLanes bytes;
  std::memcpy(&bytes, mask, sizeof(bytes));
  // In two steps: GCC 12 takes one from 8 to 32 bits apart, lane by lane.
  return __builtin_convertvector(__builtin_convertvector(bytes, HalfWordLanes), WordLanes) != 0u;
}

// Halves added to halves: fewer steps one after another than sum_of.
FASTALIGN_INLINE float folded_sum(Lanes x) {
  float a[kLanes];
  store(a, x);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) a[i] += a[i + half];
  }
  return a[0];
}

template <bool kMasked, bool kRef, typename T>
FASTALIGN_INLINE void add_lanes(const T* logp, const T* ref_logp, const bool* mask, Lanes& gaps, Lanes& logps,
                                IntLanes& counts) {
  const Lanes x = load(logp);
  const Lanes gap = kRef ? x - load(ref_logp) : Lanes{};
  if (kMasked) {
    const IntLanes kept = kept_lanes(mask);
    logps += kept ? x : Lanes{};
    if (kRef) gaps += kept ? gap : Lanes{};
    counts -= kept;  // true is -1
  } else {
    logps += x;
    if (kRef) gaps += gap;
  }
}

// `token_sums` of at least one full register. Its last register overlaps the one before; lanes that were counted
// there are left out.
template <bool kMasked, bool kRef, typename T>
FASTALIGN_INLINE void full_token_sums(const T* logp, const T* ref_logp, const bool* mask, int64_t n, double* gap_sum,
                                      double* sum, int64_t* count) {
  // Two of each: an addition need not wait for the one before.
  Lanes gap_a = {}, gap_b = {}, logp_a = {}, logp_b = {};
  IntLanes counts = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    add_lanes<kMasked, kRef>(logp + i, ref_logp + i, mask + i, gap_a, logp_a, counts);
    add_lanes<kMasked, kRef>(logp + i + kLanes, ref_logp + i + kLanes, mask + i + kLanes, gap_b, logp_b, counts);
  }
  if (i + kLanes <= n) {
    add_lanes<kMasked, kRef>(logp + i, ref_logp + i, mask + i, gap_a, logp_a, counts);
    i += kLanes;
  }
  if (i < n) {
    bool rest[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t token = n - kLanes + lane;
      rest[lane] = token >= i && (!kMasked || mask[token]);
    }
    add_lanes<true, kRef>(logp + n - kLanes, ref_logp + n - kLanes, rest, gap_b, logp_b, counts);
  }
  *sum += folded_sum(logp_a + logp_b);
  *gap_sum += folded_sum(kRef ? gap_a + gap_b : logp_a + logp_b);
  if (kMasked) {
    for (int64_t lane = 0; lane < kLanes; ++lane) *count += counts[lane];
  } else {
    *count += n;
  }
}

// Of the tokens that count, among `n` of them: the sum of logp - ref_logp (of logp where ref_logp is null), the sum of
// logp, and their number. What stands in the other cells, NaN included, takes no part.
template <typename T>
void token_sums(const T* logp, const T* ref_logp, const bool* mask, int64_t n, double* gap_sum, double* sum,
                int64_t* count) {
  T some[2][kLanes] = {};
  bool kept[kLanes] = {};
  if (n < kLanes) {
    // Too few for a register: copied into one, the rest of it masked.
    std::memcpy(some[0], logp, n * sizeof(T));
    if (ref_logp) std::memcpy(some[1], ref_logp, n * sizeof(T));
    for (int64_t i = 0; i < n; ++i) kept[i] = !mask || mask[i];
    logp = some[0], ref_logp = ref_logp ? some[1] : nullptr, mask = kept, n = kLanes;
  }
  if (mask && ref_logp) {
    full_token_sums<true, true>(logp, ref_logp, mask, n, gap_sum, sum, count);
  } else if (mask) {
    full_token_sums<true, false>(logp, ref_logp, mask, n, gap_sum, sum, count);
  } else if (ref_logp) {
    full_token_sums<false, true>(logp, ref_logp, mask, n, gap_sum, sum, count);
  } else {
    full_token_sums<false, false>(logp, ref_logp, mask, n, gap_sum, sum, count);
  }
}

// Among `n` tokens, `slope` where they count, else 0.
inline void fill_tokens(float slope, const bool* mask, int64_t n, float* dlogp) {
  const Lanes all = broadcast(slope);
  const auto put = [&](int64_t i) __attribute__((always_inline)) {
    store(dlogp + i, mask ? (kept_lanes(mask + i) ? all : Lanes{}) : all);
  };
  if (n < kLanes) {
    for (int64_t i = 0; i < n; ++i) dlogp[i] = !mask || mask[i] ? slope : 0.0f;
    return;
  }
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) put(i);
  put(n - kLanes);  // over the last full register, or again the same
}

}  // namespace fastalign::FASTALIGN_ISA
