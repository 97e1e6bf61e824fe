// Runs of tokens by the register, the last one perhaps not full, their mask, and KL estimates. No include guard: it
// belongs in headers that common.h includes once per instruction set.

namespace fastalign::FASTALIGN_ISA {

FASTALIGN_INLINE IntLanes lanes_before(int64_t n) {
  IntLanes lane = {};
  for (int32_t i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (int32_t)n;
}

// The first n tokens at p; the other lanes hold zeros.
template <typename T>
FASTALIGN_INLINE Lanes load_tokens(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_some(p, n);
}

template <typename T>
FASTALIGN_INLINE void store_tokens(T* p, Lanes x, int64_t n) {
  if (n == kLanes) {
    store(p, x);
  } else {
    store_some(p, x, n);
  }
}

// Which of the first n tokens are kept; a null mask keeps all of them.
FASTALIGN_INLINE IntLanes kept_tokens(const bool* mask, int64_t n) {
  if (!mask) return lanes_before(n);
  typedef uint8_t ByteLanes __attribute__((vector_size(FASTALIGN_BYTES / 4)));
  ByteLanes bytes = {};
  std::memcpy(&bytes, mask, n);
  // In two steps: GCC 12 takes one from 8 to 32 bits apart, lane by lane.
  return __builtin_convertvector(__builtin_convertvector(bytes, HalfWordLanes), WordLanes) != 0u;
}

// So many registers are taken in turn before the loop comes round, for sums that are formed side by side: each addition
// waits for the one before.
constexpr int64_t kChains = 4;

FASTALIGN_INLINE double total_of(const Lanes* chains) {
  double total = 0.0;
  for (int64_t j = 0; j < kChains; ++j) {
    for (int64_t i = 0; i < kLanes; ++i) total += chains[j][i];
  }
  return total;
}

FASTALIGN_INLINE int64_t total_of(const IntLanes* chains) {
  int64_t total = 0;
  for (int64_t j = 0; j < kChains; ++j) {
    for (int64_t i = 0; i < kLanes; ++i) total += chains[j][i];
  }
  return total;
}

// Calls take(chain, i, n) for each register of a run: its n tokens begin at i.
template <typename Take>
FASTALIGN_INLINE void for_registers(int64_t count, const Take& take) {
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    for (int64_t j = 0; j < kChains; ++j) take(j, i + j * kLanes, kLanes);
  }
  for (; i < count; i += kLanes) take(0, i, count - i < kLanes ? count - i : kLanes);
}

FASTALIGN_INLINE Lanes size_of(Lanes x) { return as_float(as_word(x) & 0x7fffffffu); }

// exp of any x: that of a large one is the square of half of it, so that it overflows where exp does.
FASTALIGN_INLINE Lanes exp_any(Lanes x) {
  const IntLanes large = x > 80.0f;
  Lanes half = large ? 0.5f * x : x;
  half = half > 80.0f ? broadcast(80.0f) : half;
  const Lanes e = exp_lanes(half);
  return large ? e * e : e;
}

// (exp(d) - 1 - d) / d^2 for |d| < 1/2.
FASTALIGN_INLINE Lanes k3_series(Lanes d) {
  Lanes p = broadcast(1.0f / 40320.0f);
  p = p * d + 1.0f / 5040.0f;
  p = p * d + 1.0f / 720.0f;
  p = p * d + 1.0f / 120.0f;
  p = p * d + 1.0f / 24.0f;
  p = p * d + 1.0f / 6.0f;
  return p * d + 0.5f;
}

// k1, k2 or k3 of d = ref_logp - logp; kKind is an index into KINDS of fastalign/ops/kl_estimate.py.
template <int kKind>
FASTALIGN_INLINE Lanes kl_lanes(Lanes d) {
  if constexpr (kKind == 0) return -d;
  if constexpr (kKind == 1) return 0.5f * d * d;
  return size_of(d) < 0.5f ? d * d * k3_series(d) : exp_any(d) - 1.0f - d;
}

// The derivative of k2 or k3 by logp.
template <int kKind>
FASTALIGN_INLINE Lanes kl_slope(Lanes d) {
  if constexpr (kKind == 1) return -d;
  return size_of(d) < 0.5f ? -(d + d * d * k3_series(d)) : 1.0f - exp_any(d);
}

}  // namespace fastalign::FASTALIGN_ISA
