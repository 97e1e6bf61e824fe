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

// Of `count` cells, padded to whole registers with cells of 0 times: the sum of times * weight * loss, and
// times * weight * dl/dgap in place of gap. Cells of 0 times or less are left out, whatever their gap.
void cells_loss(float* gap, const float* times, const float* weight, int64_t count, float label_smoothing,
                double* sum) {
  Lanes total = {};
  for (int64_t j = 0; j < count; j += kLanes) {
    const Lanes often = load(times + j);
    const Lanes x = often > 0.0f ? load(gap + j) : Lanes{};
    const Lanes share = often > 0.0f ? often * load(weight + j) : Lanes{};
    const Lanes size = as_float(as_word(x) & 0x7fffffffu);
    const Lanes e = exp_lanes(-size);
    Lanes loss = (x < 0.0f ? -x : Lanes{}) + log1p_unit(e);
    // Without smoothing an infinite gap must not become NaN.
    if (label_smoothing > 0.0f) loss += label_smoothing * x;
    const Lanes slope = label_smoothing - (x < 0.0f ? broadcast(1.0f) : e) / (1.0f + e);
    total += share * loss;
    store(gap + j, share * slope);
  }
  *sum = sum_of(total);
}

}  // namespace fastalign::FASTALIGN_ISA
