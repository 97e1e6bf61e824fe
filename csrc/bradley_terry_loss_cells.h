// Loss and gradient of a run of cells; formulas and names: fastalign/ops/bradley_terry_loss.py. No include guard:
// common.h includes it once per instruction set.

namespace fastalign::FASTALIGN_ISA {

// log(1 + x) for x in [0, 1]: 2 artanh(x / (2 + x)) by its series, without cancellation.
FASTALIGN_INLINE Lanes log1p_unit(Lanes x) {
  const Lanes t = x / (2.0f + x);
  const Lanes t2 = t * t;
  Lanes p = t2 * (1.0f / 15.0f) + 1.0f / 13.0f;
  p = p * t2 + 1.0f / 11.0f;
  p = p * t2 + 1.0f / 9.0f;
  p = p * t2 + 1.0f / 7.0f;
  p = p * t2 + 1.0f / 5.0f;
  p = p * t2 + 1.0f / 3.0f;
  return 2.0f * (t + t * t2 * p);
}

// share * loss of one register of gaps, and share * dl/dgap in their place. A share of 0 leaves its cell out, whatever
// the gap.
FASTALIGN_INLINE Lanes loss_of(Lanes* gap, Lanes share, float label_smoothing) {
  const Lanes x = share == 0.0f ? Lanes{} : *gap;
  const Lanes e = exp_lanes(-as_float(as_word(x) & 0x7fffffffu));
  Lanes loss = (x < 0.0f ? -x : Lanes{}) + log1p_unit(e);
  // Without smoothing an infinite gap must not become NaN.
  if (label_smoothing > 0.0f) loss += label_smoothing * x;
  const Lanes slope = label_smoothing - (x < 0.0f ? broadcast(1.0f) : e) / (1.0f + e);
  *gap = share * slope;
  return share * loss;
}

// Of `count` cells, the sum of times * weight * loss, and times * weight * dl/dgap where dgap is no null pointer.
// margin and times may be null pointers (0 and 1); cells of 0 times or less are left out.
template <typename T>
void cells_loss(const void* chosen, const void* rejected, const float* margin, float offset, const float* times,
                const float* weight, int64_t count, float label_smoothing, float* dgap, double* sum) {
  const T* a = static_cast<const T*>(chosen);
  const T* b = static_cast<const T*>(rejected);
  Lanes total = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    Lanes gap = load(a + j) - load(b + j) - offset, share = load(weight + j);
    if (margin) gap -= load(margin + j);
    if (times) {
      const Lanes often = load(times + j);
      share = often > 0.0f ? often * share : Lanes{};
    }
    total += loss_of(&gap, share, label_smoothing);
    if (dgap) store(dgap + j, gap);
  }
  if (j < count) {
    // The lanes past the end have a weight of 0.
    const int64_t some = count - j;
    Lanes gap = load_some(a + j, some) - load_some(b + j, some) - offset, share = load_some(weight + j, some);
    if (margin) gap -= load_some(margin + j, some);
    if (times) {
      const Lanes often = load_some(times + j, some);
      share = often > 0.0f ? often * share : Lanes{};
    }
    total += loss_of(&gap, share, label_smoothing);
    if (dgap) store_some(dgap + j, gap, some);
  }
  *sum = sum_of(total);
}

// How often each of `count` cells counts, as float32.
template <typename Count>
void counts_as_floats(const void* counts, int64_t count, float* __restrict out) {
  const Count* from = static_cast<const Count*>(counts);
  for (int64_t j = 0; j < count; ++j) out[j] = static_cast<float>(from[j]);
}

// Adds the counts of cells that lie side by side, those below 0 as 0, to `sums`, which the cells go round and round.
template <typename Count>
void add_counts(const void* counts, int64_t count, int64_t* __restrict sums, int64_t round) {
  const Count* from = static_cast<const Count*>(counts);
  for (int64_t begin = 0; begin < count; begin += round) {
    const int64_t size = begin + round < count ? round : count - begin;
    for (int64_t j = 0; j < size; ++j) {
      const int64_t times = from[begin + j];
      sums[j] += times > 0 ? times : 0;
    }
  }
}

}  // namespace fastalign::FASTALIGN_ISA
