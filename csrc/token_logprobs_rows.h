// The two row kernels of token_logprobs; formulas and names: fastalign/ops/token_logprobs.py. No include guard:
// common.h includes it once per instruction set.

namespace fastalign::FASTALIGN_ISA {

// One row is summed in blocks of this many columns, so that rounding grows with the number of blocks plus the block's
// length rather than with the vocabulary.
constexpr int64_t kBlock = 1024;

template <typename T, bool kCap>
void stats_of_row(const T* x, int64_t vocab, int64_t target, RowSettings settings, RowStats* out) {
  const float cap = kCap ? settings.softcap : 0.0f;
  const int64_t whole = vocab - vocab % kLanes;
  Lanes most = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < whole; j += kLanes) most = max_lanes(load(x + j), most);
  if (whole < vocab) {
    most = max_lanes(mask_tail(load_some(x + whole, vocab - whole), vocab - whole), most);
  }
  const float row_max = capped_one(max_of(most), cap);
  Lanes sum = {}, dot = {};
  for (int64_t block = 0; block < whole; block += kBlock) {
    const int64_t end = block + kBlock < whole ? block + kBlock : whole;
    Lanes block_sum = {}, block_dot = {};
    for (int64_t j = block; j < end; j += kLanes) {
      const Lanes s = floored((capped(load(x + j), cap) - row_max) * settings.inverse_temperature);
      const Lanes e = exp_lanes(s);
      block_sum += e;
      block_dot += e * s;
    }
    sum += block_sum;
    dot += block_dot;
  }
  if (whole < vocab) {
    const Lanes u = mask_tail(capped(load_some(x + whole, vocab - whole), cap), vocab - whole);
    const Lanes s = floored((u - row_max) * settings.inverse_temperature);
    const Lanes e = exp_lanes(s);
    sum += e;
    dot += e * s;
  }
  const float total = sum_of(sum);
  const float log_sum = std::log(total);
  const float s = (capped_one(one(x + target), cap) - row_max) / settings.temperature;
  *out = {s - log_sum, log_sum - sum_of(dot) / total, row_max, log_sum};
}

template <bool kCap, bool kEntropy>
FASTALIGN_INLINE Lanes dlogits_lanes(Lanes x, RowSettings settings, const RowGradient& row, float g) {
  const Lanes u = capped(x, kCap ? settings.softcap : 0.0f);
  const Lanes log_p = floored((u - row.row_max) * settings.inverse_temperature - row.log_sum);
  Lanes factor = broadcast(g);
  if (kEntropy) factor += row.e * (log_p + row.entropy);
  Lanes dz = -exp_lanes(log_p) * factor;
  if (kCap) {
    const Lanes t = u * (1.0f / settings.softcap);
    dz *= 1.0f - t * t;
  }
  return dz * settings.inverse_temperature;
}

// `out` may be `x`.
template <typename T, bool kCap, bool kEntropy>
void dlogits_of_row(T* out, const T* x, int64_t vocab, int64_t target, RowSettings settings,
                    const RowGradient& row) {
  const float at_target = one(x + target);
  const int64_t whole = vocab - vocab % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    store(out + j, dlogits_lanes<kCap, kEntropy>(load(x + j), settings, row, row.g));
  }
  if (whole < vocab) {
    const Lanes tail = load_some(x + whole, vocab - whole);
    store_some(out + whole, dlogits_lanes<kCap, kEntropy>(tail, settings, row, row.g), vocab - whole);
  }
  // The target's own column: g (1 - p) from its logp, and the entropy's part as everywhere.
  float dz = row.g * -std::expm1(row.logp) * settings.inverse_temperature;
  if (kCap) {
    const float t = capped_one(at_target, settings.softcap) / settings.softcap;
    dz *= 1.0f - t * t;
  }
  if (kEntropy) dz += dlogits_lanes<kCap, true>(broadcast(at_target), settings, row, 0.0f)[0];
  store_some(out + target, broadcast(dz), 1);
}

template <typename T>
void row_stats(const void* x, int64_t vocab, int64_t target, RowSettings settings, RowStats* out) {
  const T* row = static_cast<const T*>(x);
  if (settings.softcap != 0.0f) {
    stats_of_row<T, true>(row, vocab, target, settings, out);
  } else {
    stats_of_row<T, false>(row, vocab, target, settings, out);
  }
}

template <typename T>
void dlogits(void* out, const void* x, int64_t vocab, int64_t target, RowSettings settings,
             bool has_entropy, const RowGradient& row) {
  T* to = static_cast<T*>(out);
  const T* from = static_cast<const T*>(x);
  if (settings.softcap != 0.0f) {
    if (has_entropy) {
      dlogits_of_row<T, true, true>(to, from, vocab, target, settings, row);
    } else {
      dlogits_of_row<T, true, false>(to, from, vocab, target, settings, row);
    }
  } else if (has_entropy) {
    dlogits_of_row<T, false, true>(to, from, vocab, target, settings, row);
  } else {
    dlogits_of_row<T, false, false>(to, from, vocab, target, settings, row);
  }
}

}  // namespace fastalign::FASTALIGN_ISA
