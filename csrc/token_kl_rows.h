// The two row kernels of token_kl; formulas and names: fastalign/ops/token_kl.py. No include guard: common.h includes
// it once per instruction set.

namespace fastalign::FASTALIGN_ISA {

// One row is summed in blocks of this many columns, so that rounding grows with the number of blocks plus the block's
// length rather than with the vocabulary.
constexpr int64_t kKlBlock = 1024;

// Sums over columns of e^s, e^s s, e^t, e^s d and e^t - e^s, with d = t - s.
struct KlSums {
  Lanes p = {}, dot = {}, r = {}, gap = {}, excess = {};
};

FASTALIGN_INLINE void add_to(KlSums* sums, const KlSums& more) {
  sums->p += more.p;
  sums->dot += more.dot;
  sums->r += more.r;
  sums->gap += more.gap;
  sums->excess += more.excess;
}

// What is left of a row is a few numbers: there the digits of double cost nothing.
FASTALIGN_INLINE double wide_sum_of(Lanes x) {
  double total = 0.0;
  for (int64_t i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// exp(x) - 1 for |x| < 0.5.
FASTALIGN_INLINE Lanes expm1_near(Lanes x) {
  Lanes series = x * (1.0f / 7.0f) + 1.0f;
  series = x * (1.0f / 6.0f) * series + 1.0f;
  series = x * (1.0f / 5.0f) * series + 1.0f;
  series = x * (1.0f / 4.0f) * series + 1.0f;
  series = x * (1.0f / 3.0f) * series + 1.0f;
  series = x * (1.0f / 2.0f) * series + 1.0f;
  return x * series;
}

// s and t of some columns. t may be -infinity: where the policy has probability, that is what the KL must become.
FASTALIGN_INLINE void add_columns(KlSums* sums, Lanes s_raw, Lanes t) {
  const Lanes s = floored(s_raw);
  const Lanes p = exp_lanes(s), r = exp_lanes(t);
  const Lanes d = t - s;
  const Lanes size = as_float(as_word(d) & 0x7fffffffu);
  sums->p += p;
  sums->dot += p * s;
  sums->r += r;
  sums->gap += p == 0.0f ? Lanes{} : p * d;
  sums->excess += size < 0.5f ? p * expm1_near(d) : r - p;
}

template <typename T, typename R, bool kCap>
void kl_stats_of_row(const T* x, const R* y, int64_t vocab, int64_t target, RowSettings settings,
                     KlStats* out) {
  const float cap = kCap ? settings.softcap : 0.0f;
  const int64_t whole = vocab - vocab % kLanes, rest = vocab - whole;
  Lanes most = broadcast(-std::numeric_limits<float>::infinity()), ref_most = most;
  for (int64_t j = 0; j < whole; j += kLanes) {
    most = max_lanes(load(x + j), most);
    ref_most = max_lanes(load(y + j), ref_most);
  }
  if (rest > 0) {
    most = max_lanes(mask_tail(load_some(x + whole, rest), rest), most);
    ref_most = max_lanes(mask_tail(load_some(y + whole, rest), rest), ref_most);
  }
  const float row_max = capped_one(max_of(most), cap);
  const float ref_row_max = capped_one(max_of(ref_most), cap);
  const float scale = settings.inverse_temperature;
  KlSums sums;
  for (int64_t block = 0; block < whole; block += kKlBlock) {
    const int64_t end = block + kKlBlock < whole ? block + kKlBlock : whole;
    KlSums part;
    for (int64_t j = block; j < end; j += kLanes) {
      add_columns(&part, (capped(load(x + j), cap) - row_max) * scale,
                  (capped(load(y + j), cap) - ref_row_max) * scale);
    }
    add_to(&sums, part);
  }
  if (rest > 0) {
    const Lanes u = mask_tail(capped(load_some(x + whole, rest), cap), rest);
    const Lanes v = mask_tail(capped(load_some(y + whole, rest), cap), rest);
    add_columns(&sums, (u - row_max) * scale, (v - ref_row_max) * scale);
  }
  const double total = wide_sum_of(sums.p), ref_total = wide_sum_of(sums.r);
  const double log_sum = std::log(total);
  // Where the sums are alike their logarithms would lose the difference.
  const double excess = wide_sum_of(sums.excess) / total;
  const double log_ratio = std::fabs(excess) < 0.5 ? std::log1p(excess) : std::log(ref_total / total);
  const double mean_gap = wide_sum_of(sums.gap) / total;
  const float s = (capped_one(one(x + target), cap) - row_max) / settings.temperature;
  const float t = (capped_one(one(y + target), cap) - ref_row_max) / settings.temperature;
  *out = {static_cast<float>(s - log_sum),
          static_cast<float>(log_sum - wide_sum_of(sums.dot) / total),
          row_max,
          static_cast<float>(log_sum),
          static_cast<float>(log_ratio - mean_gap),
          static_cast<float>(t - (log_sum + log_ratio)),
          ref_row_max,
          static_cast<float>(mean_gap)};
}

template <bool kCap>
FASTALIGN_INLINE Lanes kl_dlogits_lanes(Lanes x, Lanes y, RowSettings settings, const KlGradient& row,
                                        float g) {
  const float cap = kCap ? settings.softcap : 0.0f;
  const Lanes u = capped(x, cap), v = capped(y, cap);
  const Lanes s = (u - row.row_max) * settings.inverse_temperature;
  const Lanes log_p = floored(s - row.log_sum);
  Lanes t = (v - row.ref_row_max) * settings.inverse_temperature;
  t = t < -1e20f ? broadcast(-1e20f) : t;  // finite, so that times 0 it is 0
  const Lanes d = t - floored(s);
  // log p - log r - KL = mean_gap - d.
  const Lanes factor = g + row.e * (log_p + row.entropy) - row.k * (row.mean_gap - d);
  Lanes dz = -exp_lanes(log_p) * factor;
  if (kCap) {
    const Lanes slope = u * (1.0f / settings.softcap);
    dz *= 1.0f - slope * slope;
  }
  return dz * settings.inverse_temperature;
}

// `out` may be `x`.
template <typename T, typename R, bool kCap>
void kl_dlogits_of_row(T* out, const T* x, const R* y, int64_t vocab, int64_t target,
                       RowSettings settings, const KlGradient& row) {
  const float at_target = one(x + target);
  const int64_t whole = vocab - vocab % kLanes, rest = vocab - whole;
  for (int64_t j = 0; j < whole; j += kLanes) {
    store(out + j, kl_dlogits_lanes<kCap>(load(x + j), load(y + j), settings, row, row.g));
  }
  if (rest > 0) {
    const Lanes x_rest = load_some(x + whole, rest), y_rest = load_some(y + whole, rest);
    store_some(out + whole, kl_dlogits_lanes<kCap>(x_rest, y_rest, settings, row, row.g), rest);
  }
  // The target's own column: g (1 - p) from its logp, and the other parts as everywhere.
  float dz = row.g * -std::expm1(row.logp) * settings.inverse_temperature;
  if (kCap) {
    const float slope = capped_one(at_target, settings.softcap) / settings.softcap;
    dz *= 1.0f - slope * slope;
  }
  dz += kl_dlogits_lanes<kCap>(broadcast(at_target), broadcast(one(y + target)), settings, row, 0.0f)[0];
  store_some(out + target, broadcast(dz), 1);
}

template <typename Pair>
void kl_stats(const void* x, const void* y, int64_t vocab, int64_t target, RowSettings settings,
              KlStats* out) {
  using T = typename Pair::Logits;
  using R = typename Pair::Reference;
  const T* row = static_cast<const T*>(x);
  const R* ref = static_cast<const R*>(y);
  if (settings.softcap != 0.0f) {
    kl_stats_of_row<T, R, true>(row, ref, vocab, target, settings, out);
  } else {
    kl_stats_of_row<T, R, false>(row, ref, vocab, target, settings, out);
  }
}

template <typename Pair>
void kl_dlogits(void* out, const void* x, const void* y, int64_t vocab, int64_t target,
                RowSettings settings, const KlGradient& row) {
  using T = typename Pair::Logits;
  using R = typename Pair::Reference;
  T* to = static_cast<T*>(out);
  const T* from = static_cast<const T*>(x);
  const R* ref = static_cast<const R*>(y);
  if (settings.softcap != 0.0f) {
    kl_dlogits_of_row<T, R, true>(to, from, ref, vocab, target, settings, row);
  } else {
    kl_dlogits_of_row<T, R, false>(to, from, ref, vocab, target, settings, row);
  }
}

}  // namespace fastalign::FASTALIGN_ISA
