// Losses on log-probs and their slopes for a range of tokens; formulas and names: fastalign/ops/policy_terms.py. No
// include guard: common.h includes it once per instruction set.

namespace fastalign::FASTALIGN_ISA {

FASTALIGN_INLINE Lanes capped_at(Lanes x, float most) { return x > most ? broadcast(most) : x; }  // NaN stays
FASTALIGN_INLINE Lanes raised_to(Lanes x, float least) { return x < least ? broadcast(least) : x; }

// exp(d) - 1 - d for d <= kFarthest, given exp(d): a series where the difference would lose its digits.
FASTALIGN_INLINE Lanes k3_lanes(Lanes d, Lanes exp_d) {
  Lanes p = broadcast(1.0f / 40320.0f);
  p = p * d + 1.0f / 5040.0f;
  p = p * d + 1.0f / 720.0f;
  p = p * d + 1.0f / 120.0f;
  p = p * d + 1.0f / 24.0f;
  p = p * d + 1.0f / 6.0f;
  p = p * d + 0.5f;
  const Lanes size = as_float(as_word(d) & 0x7fffffffu);
  return size < 0.5f ? d * d * p : exp_d - 1.0f - d;
}

FASTALIGN_INLINE IntLanes first_lanes(int64_t n) {
  IntLanes lane = {};
  for (int32_t i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (int32_t)n;
}

// Which of the first n tokens the mask keeps.
FASTALIGN_INLINE IntLanes load_mask(const bool* p, int64_t n) {
  typedef uint8_t ByteLanes __attribute__((vector_size(FASTALIGN_BYTES / 4)));
  ByteLanes bytes = {};
  std::memcpy(&bytes, p, n);
  // In two steps: GCC 12 takes one from 8 to 32 bits apart, lane by lane.
  return __builtin_convertvector(__builtin_convertvector(bytes, HalfWordLanes), WordLanes) != 0u;
}

FASTALIGN_INLINE Lanes load_lanes(const float* p, int64_t n) { return n == kLanes ? load(p) : load_some(p, n); }

FASTALIGN_INLINE void store_lanes(float* p, Lanes x, int64_t n) {
  if (n == kLanes) {
    store(p, x);
  } else {
    store_some(p, x, n);
  }
}

// Of n tokens from i on, a register at most: writes their slopes and adds to `sum`, one register per column.
template <LossKind kKind>
FASTALIGN_INLINE void tokens_of_kind(const LossTokens& t, const LossForm& f, const float* scales, float one_scale,
                                     float low, float high, float far, int64_t i, int64_t n, Lanes* sum) {
  IntLanes kept = first_lanes(n);
  if (t.mask) kept &= load_mask(t.mask + i, n);
  const auto get = [&](const float* p) __attribute__((always_inline)) { return load_lanes(p + i, n); };
  // What a masked cell holds stays in its own lane, which no sum and no gradient takes.
  const auto add = [&](int column, Lanes x) __attribute__((always_inline)) { sum[column] += kept ? x : Lanes{}; };
  const Lanes scale = scales ? load_lanes(scales + i, n) : broadcast(one_scale);
  add(kCount, broadcast(1.0f));
  if constexpr (kKind != LossKind::none) {
    const Lanes logp = get(t.logp);
    Lanes log_ratio = {}, ratio = broadcast(1.0f), weight = broadcast(1.0f), policy, slope;
    IntLanes clipped = {};
    if (t.old_logp) {
      log_ratio = logp - get(t.old_logp);
      const Lanes d = capped_at(-log_ratio, kFarthest);
      add(kOldK1, log_ratio);
      add(kOldK2, 0.5f * log_ratio * log_ratio);
      add(kOldK3, k3_lanes(d, exp_lanes(d)));
    }
    if (t.log_ratio) log_ratio = get(t.log_ratio);
    if (t.old_logp || t.log_ratio) ratio = exp_lanes(capped_at(log_ratio, kFarthest));
    if constexpr (kKind == LossKind::mle) {
      if (t.weights) weight = get(t.weights);
      policy = -weight * logp;
      slope = -weight;
    } else {
      const Lanes advantages = get(t.advantages);
      if constexpr (kKind == LossKind::apa) {
        weight = logp - (f.scale * advantages + get(t.ref_logp));
        policy = weight * weight;
        slope = 2.0f * weight;
      } else if constexpr (kKind == LossKind::awr) {
        const Lanes scaled = f.scale * advantages;
        clipped = scaled > f.upper;
        const Lanes inside = capped_at(scaled, f.upper);
        const Lanes infinite = broadcast(std::numeric_limits<float>::infinity());
        weight = inside > 88.0f ? infinite : exp_lanes(capped_at(inside, 88.0f));
        policy = -weight * logp;
        slope = -weight;
      } else if constexpr (kKind == LossKind::cispo) {
        const IntLanes above = log_ratio > f.upper, below = log_ratio < f.lower;
        clipped = above | below;
        weight = above ? broadcast(high) : (below ? broadcast(low) : ratio);
        slope = -weight * advantages;
        policy = slope * logp;
      } else {
        const IntLanes good = advantages >= 0.0f;
        const IntLanes above = log_ratio > (good ? broadcast(f.upper) : broadcast(f.most));
        const IntLanes below = ~good & (log_ratio < f.lower);
        const IntLanes held = above | below;
        weight = above ? (good ? broadcast(high) : broadcast(far)) : (below ? broadcast(low) : ratio);
        policy = -weight * advantages;
        slope = held ? Lanes{} : policy;
        clipped = held & (advantages != 0.0f);
      }
    }
    if (t.ref_logp) {
      const Lanes k1 = logp - get(t.ref_logp), k2 = 0.5f * k1 * k1;
      const Lanes d = capped_at(-k1, kFarthest), exp_d = exp_lanes(d);
      const Lanes k3 = k3_lanes(d, exp_d);
      if (f.kl == KlKind::k1) {
        policy += f.kl_coef * k1;
        slope += f.kl_coef;
      } else if (f.kl == KlKind::k2) {
        policy += f.kl_coef * k2;
        slope += f.kl_coef * k1;
      } else if (f.kl == KlKind::k3) {
        policy += f.kl_coef * k3;
        slope += d == -k1 ? f.kl_coef * (1.0f - exp_d) : Lanes{};
      }
      add(kRefK1, k1);
      add(kRefK2, k2);
      add(kRefK3, k3);
    }
    if (t.entropy) {
      const Lanes entropy = get(t.entropy);
      policy -= f.entropy_coef * entropy;
      add(kEntropy, entropy);
      if (t.dentropy) store_lanes(t.dentropy + i, kept ? -f.entropy_coef * scale * f.share : Lanes{}, n);
    }
    if (t.losses) store_lanes(t.losses + i, policy, n);
    if (t.dlogp) store_lanes(t.dlogp + i, kept ? slope * scale * f.share : Lanes{}, n);
    add(kPolicy, policy * scale);
    if (t.old_logp || t.log_ratio) add(kRatio, ratio);
    if constexpr (kKind >= LossKind::awr) add(kClipped, clipped ? broadcast(1.0f) : Lanes{});
    if constexpr (kKind <= LossKind::awr) add(kWeight, weight);
    if constexpr (kKind == LossKind::mle || kKind == LossKind::awr) add(kWeightSquared, weight * weight);
  }
  if (t.values) {
    const Lanes values = get(t.values), returns = get(t.returns);
    const Lanes error = values - returns;
    Lanes worst = error, slope = error;
    if (t.old_values) {
      const Lanes old_values = get(t.old_values);
      const Lanes bottom = old_values - f.value_clip, top = old_values + f.value_clip;
      Lanes in_band = values < bottom ? bottom : values;
      in_band = (in_band > top ? top : in_band) - returns;
      const IntLanes held = in_band * in_band > error * error;
      worst = held ? in_band : error;
      slope = held ? Lanes{} : error;
      add(kValueClipped, held ? broadcast(1.0f) : Lanes{});
    }
    add(kValue, 0.5f * worst * worst * scale);
    if (t.dvalues) store_lanes(t.dvalues + i, kept ? f.vf_coef * slope * scale * f.share : Lanes{}, n);
  }
}

// Adds to `sums`, one per column. All tokens of the range share `one_scale` unless there is one for each.
template <LossKind kKind>
void policy_loss_of_kind(const LossTokens& t, const LossForm& f, const float* scales, float one_scale,
                         int64_t begin, int64_t end, double* sums) {
  Lanes sum[kColumns] = {};
  const float low = std::exp(f.lower), high = std::exp(f.upper), far = std::exp(f.most);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    tokens_of_kind<kKind>(t, f, scales, one_scale, low, high, far, i, kLanes, sum);
  }
  if (i < end) tokens_of_kind<kKind>(t, f, scales, one_scale, low, high, far, i, end - i, sum);
  for (int64_t column = 0; column < kColumns; ++column) sums[column] += sum_of(sum[column]);
}

inline void policy_loss(const LossTokens& t, const LossForm& f, const float* scales, float one_scale,
                        int64_t begin, int64_t end, double* sums) {
  switch (f.kind) {
    case LossKind::none:
      return policy_loss_of_kind<LossKind::none>(t, f, scales, one_scale, begin, end, sums);
    case LossKind::mle:
      return policy_loss_of_kind<LossKind::mle>(t, f, scales, one_scale, begin, end, sums);
    case LossKind::apa:
      return policy_loss_of_kind<LossKind::apa>(t, f, scales, one_scale, begin, end, sums);
    case LossKind::awr:
      return policy_loss_of_kind<LossKind::awr>(t, f, scales, one_scale, begin, end, sums);
    case LossKind::clip:
      return policy_loss_of_kind<LossKind::clip>(t, f, scales, one_scale, begin, end, sums);
    case LossKind::cispo:
      return policy_loss_of_kind<LossKind::cispo>(t, f, scales, one_scale, begin, end, sums);
  }
}

}  // namespace fastalign::FASTALIGN_ISA
