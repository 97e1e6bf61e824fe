// The backward walk over one sequence, a register of tokens at a time; formulas and names: fastalign/ops/gae.py and
// fastalign/ops/vtrace.py. No include guard: common.h includes it once per instruction set.
//
// A kept token maps the advantage after it to its own, A -> scale * A + shift, and a dropped one leaves it as it is.
// Within a register these maps are composed in log2(kLanes) steps, so that only the advantage of its first token and
// the value of its first kept token pass from one register to the next. The maps of whole runs of tokens, composed in
// the same way, say what a piece of a long sequence makes of what follows it before that is known.
#include "moments_lanes.h"

namespace fastalign::FASTALIGN_ISA {

// Lane i becomes lane i + k of x, and past the end of x the fill.
template <int32_t k>
FASTALIGN_INLINE Lanes later(Lanes x, Lanes fill) {
#if defined(__clang__)
  Lanes y;
  for (int32_t i = 0; i < kLanes; ++i) y[i] = i + k < kLanes ? x[i + k] : fill[i + k - kLanes];
  return y;
#else
  IntLanes from = {};
  for (int32_t i = 0; i < kLanes; ++i) from[i] = i + k;
  return __builtin_shuffle(x, fill, from);
#endif
}

// sum_j decay^j x_{i + j} over the lanes from i on.
template <int32_t k = 1>
FASTALIGN_INLINE Lanes decayed_sums(Lanes x, float power) {
  if constexpr (k < kLanes) {
    return decayed_sums<2 * k>(x + power * later<k>(x, Lanes{}), power * power);
  }
  return x;
}

// The maps of the lanes from i on, composed.
template <int32_t k = 1>
FASTALIGN_INLINE void compose(Lanes& scale, Lanes& shift) {
  if constexpr (k < kLanes) {
    shift += scale * later<k>(shift, Lanes{});
    scale *= later<k>(scale, broadcast(1.0f));
    compose<2 * k>(scale, shift);
  }
}

// x of the first lane at or after i that has a nonzero bit in `kept`, else `last`.
template <int32_t k = 1>
FASTALIGN_INLINE Lanes first_kept(Lanes x, IntLanes kept, float last) {
  if constexpr (k < kLanes) {
    const Lanes after = later<k>(x, Lanes{});
    const IntLanes kept_after = (IntLanes)later<k>((Lanes)kept, Lanes{});
    return first_kept<2 * k>(kept ? x : after, kept | kept_after, last);
  }
  return kept ? x : broadcast(last);
}

// Whether all (or none) of the kLanes cells are kept.
FASTALIGN_INLINE bool all_are(const bool* p, bool kept) {
  bool wanted[kLanes];
  std::memset(wanted, kept ? 1 : 0, sizeof(wanted));
  return std::memcmp(p, wanted, sizeof(wanted)) == 0;
}

FASTALIGN_INLINE Lanes at_most(Lanes x, float most) { return x > most ? broadcast(most) : x; }  // NaN stays

// The value of the first kept token of the row, else the one after it; 0 where there are no values.
template <typename T>
void value_from(const ScanTokens& x, const ScanRow& row, float* value) {
  int64_t t = row.begin;
  if (x.mask) {
    while (t < row.end && !x.mask[t]) ++t;
  }
  *value = !x.values ? 0.0f : t < row.end ? one(static_cast<const T*>(x.values) + t) : row.after.next_value;
}

// The decay from each lane to the next register, and that of a whole one. What passes from register to register is
// double: in float the rounding of that decay, the same each time, would add up over a long horizon.
struct Powers {
  Lanes lanes;
  double of[kLanes + 1];  // so many tokens
};

FASTALIGN_INLINE Powers powers_of(float decay) {
  Powers powers;
  powers.of[0] = 1.0;
  for (int64_t i = 1; i <= kLanes; ++i) {
    powers.of[i] = powers.of[i - 1] * decay;
    powers.lanes[kLanes - i] = static_cast<float>(powers.of[i]);
  }
  return powers;
}

// How many of n <= kLanes tokens are kept: eight nonzero bytes at a time become ones, whose sum is the top byte.
FASTALIGN_INLINE int64_t count_kept(const bool* mask, int64_t n) {
  if (!mask) return n;
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7full, kOnes = 0x0101010101010101ull;
  uint64_t words[(kLanes + 7) / 8] = {}, count = 0;
  std::memcpy(words, mask, n);
  for (const uint64_t word : words) count += (((((word & kLow) + kLow) | word) >> 7 & kOnes) * kOnes) >> 56;
  return static_cast<int64_t>(count);
}

FASTALIGN_INLINE double product_of(Lanes x) {
  double product = 1.0;
  for (int64_t i = 0; i < kLanes; ++i) product *= x[i];
  return product;
}

// Tokens t to t + n, n = kLanes if kWhole. Writes the results, or multiplies `scale` by that of the tokens' map.
template <typename T, ScanKind kKind, bool kWrite, bool kWhole>
FASTALIGN_INLINE void scan_block(const ScanTokens& x, const ScanRow& row, const Powers& powers, int64_t t,
                                 int64_t some, Carry& carry, double* scale_of_all) {
  const int64_t n = kWhole ? kLanes : some;
  const float decay = row.gamma * row.lam;
  if (kWhole && x.mask && all_are(x.mask + t, false)) {
    if constexpr (kWrite) {
      if (x.advantages) store(x.advantages + t, Lanes{});
      store(x.returns + t, Lanes{});
    }
    return;
  }
  const T* rewards = static_cast<const T*>(x.rewards) + t;
  const T* values = static_cast<const T*>(x.values) + t;
  IntLanes kept = lanes_before(n);
  const bool full = kWhole && (!x.mask || all_are(x.mask + t, true));
  if (!full && x.mask) kept = kept_tokens(x.mask + t, n);
  Lanes v = {}, from = {}, delta = kept ? load_tokens(rewards, n) : Lanes{};
  if constexpr (kKind != ScanKind::discounted) {
    v = kept ? load_tokens(values, n) : Lanes{};
    from = full ? v : first_kept(v, kept, carry.next_value);
    delta += row.gamma * later<1>(from, broadcast(carry.next_value)) - v;
  }
  const float after = static_cast<float>(carry.advantage);
  double scale_of_block = powers.of[kLanes];
  Lanes a, out, shift = delta;
  if (full && kKind != ScanKind::vtrace) {
    shift = decayed_sums(delta, decay);
    a = shift + powers.lanes * after;
    out = a;
  } else {
    Lanes weight = broadcast(1.0f), scale = broadcast(decay);
    if constexpr (kKind == ScanKind::vtrace) {
      weight = exp_lanes(at_most(kept ? load_tokens(x.log_ratio + t, n) : Lanes{}, 88.0f));
      scale = decay * at_most(weight, x.clips.c_bar);
      shift = at_most(weight, x.clips.rho_bar) * delta;
    }
    scale = kept ? scale : broadcast(1.0f);
    shift = kept ? shift : Lanes{};
    if constexpr (kKind == ScanKind::vtrace) {
      scale_of_block = product_of(scale);
    } else {
      scale_of_block = powers.of[count_kept(x.mask ? x.mask + t : nullptr, n)];
    }
    compose(scale, shift);
    a = shift + scale * after;
    out = a;
    if constexpr (kKind == ScanKind::vtrace) {
      const Lanes a_after = later<1>(a, broadcast(after));
      out = at_most(weight, x.clips.pg_rho_bar) * (delta + row.gamma * a_after);
    }
  }
  carry = {shift[0] + scale_of_block * carry.advantage, from[0]};
  if constexpr (!kWrite) *scale_of_all *= scale_of_block;
  if constexpr (kWrite) {
    if (x.advantages) store_tokens(x.advantages + t, kept ? out : Lanes{}, n);
    store_tokens(x.returns + t, kept ? a + v : Lanes{}, n);
  }
}

// The tokens before t, a register of them or as many as there are from `begin` on; returns where they begin.
template <typename T, ScanKind kKind, bool kWrite>
FASTALIGN_INLINE int64_t step_back(const ScanTokens& x, const ScanRow& row, const Powers& powers, int64_t begin,
                                   int64_t t, Carry& carry, double* scale) {
  if (t - begin >= kLanes) {
    scan_block<T, kKind, kWrite, true>(x, row, powers, t - kLanes, kLanes, carry, scale);
    return t - kLanes;
  }
  scan_block<T, kKind, kWrite, false>(x, row, powers, begin, t - begin, carry, scale);
  return begin;
}

template <typename T, ScanKind kKind>
void scan_row_of(const ScanTokens& x, const ScanRow& row, double* first, Moments* found) {
  const Powers powers = powers_of(row.gamma * row.lam);
  Carry carry = row.after;
  Moments all;
  int64_t t = row.end, pending = row.end;  // advantages [t, pending) await their moments
  while (t > row.begin) {
    t = step_back<T, kKind, true>(x, row, powers, row.begin, t, carry, nullptr);
    if (found && (pending - t >= kTokensPerMoment || t == row.begin)) {
      double own[3];
      moments(x.advantages + t, x.mask ? x.mask + t : nullptr, pending - t, own);
      all.add({own[0], own[1], own[2]});
      pending = t;
    }
  }
  *first = carry.advantage;
  if (found) *found = all;
}

// From the first token on, until nothing of what follows is left.
template <typename T, ScanKind kKind>
void map_row_of(const ScanTokens& x, const ScanRow& row, ScanMap* map) {
  const Powers powers = powers_of(row.gamma * row.lam);
  *map = {1.0, 0.0};
  for (int64_t begin = row.begin; begin < row.end && static_cast<float>(map->scale) != 0.0f; begin += kTokensPerMap) {
    const int64_t end = begin + kTokensPerMap < row.end ? begin + kTokensPerMap : row.end;
    Carry carry{0.0, 0.0f};
    value_from<T>(x, {end, row.end, row.gamma, row.lam, row.after}, &carry.next_value);
    double scale = 1.0;
    for (int64_t t = end; t > begin;) t = step_back<T, kKind, false>(x, row, powers, begin, t, carry, &scale);
    map->shift += map->scale * carry.advantage;
    map->scale *= scale;
  }
}

template <typename T>
void scan_row(ScanKind kind, const ScanTokens& x, const ScanRow& row, double* first, Moments* moments) {
  switch (kind) {
    case ScanKind::gae:
      return scan_row_of<T, ScanKind::gae>(x, row, first, moments);
    case ScanKind::discounted:
      return scan_row_of<T, ScanKind::discounted>(x, row, first, moments);
    case ScanKind::vtrace:
      return scan_row_of<T, ScanKind::vtrace>(x, row, first, moments);
  }
}

template <typename T>
void map_row(ScanKind kind, const ScanTokens& x, const ScanRow& row, ScanMap* map) {
  switch (kind) {
    case ScanKind::gae:
      return map_row_of<T, ScanKind::gae>(x, row, map);
    case ScanKind::discounted:
      return map_row_of<T, ScanKind::discounted>(x, row, map);
    case ScanKind::vtrace:
      return map_row_of<T, ScanKind::vtrace>(x, row, map);
  }
}

}  // namespace fastalign::FASTALIGN_ISA
