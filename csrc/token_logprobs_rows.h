// The two row kernels of token_logprobs; formulas and names: fastalign/ops/token_logprobs.py. No include guard:
// common.h includes it once per instruction set.

namespace fastalign::FASTALIGN_ISA {

// A row is taken in blocks of this many columns: read once from memory, for the block's maximum, and again from the
// first-level cache. Sums of 64 terms per lane, and then of blocks, keep rounding from growing with the vocabulary.
constexpr int64_t kBlock = 64 * kLanes;

constexpr float kLog2E = 0x1.715476p0f, kLn2 = 0x1.62e430p-1f;

// Exponents of two that exp2_lanes takes: at -127 it gives 0, and a finite y keeps 0 * y from becoming NaN. NaN stays.
FASTALIGN_INLINE Lanes floored_exponent(Lanes y) { return max_lanes(broadcast(-127.0f), y); }

// One block as floats, soft-capped and filled up with -infinity to whole lanes: x itself where it is all that.
template <typename T, bool kCap>
FASTALIGN_INLINE const float* whole_lanes(const T* x, int64_t count, float softcap, float* buffer) {
  if constexpr (std::is_same_v<T, float> && !kCap) {
    if (count % kLanes == 0) return x;
  }
  const float cap = kCap ? softcap : 0.0f;
  const int64_t whole = count - count % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) store(buffer + j, capped(load(x + j), cap));
  if (whole < count) {
    const Lanes tail = capped(load_some(x + whole, count - whole), cap);
    store(buffer + whole, mask_tail(tail, count - whole));
  }
  return buffer;
}

FASTALIGN_INLINE float max_of(const float* u, int64_t count) {
  Lanes most = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < count; j += kLanes) most = max_lanes(load(u + j), most);
  return max_of(most);
}

// Exponents are taken in powers of two, y = s log2(e), because 2^y is cheaper than e^s.
template <typename T, bool kCap>
void stats_of_row(const T* x, int64_t vocab, int64_t target, RowSettings settings, RowStats* out) {
  alignas(FASTALIGN_BYTES) float buffer[kBlock];
  const float scale = settings.inverse_temperature * kLog2E;
  float row_max = -std::numeric_limits<float>::infinity(), shift = 0.0f;
  Lanes sum = {}, dot = {};
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t count = vocab - start < kBlock ? vocab - start : kBlock;
    const float* u = whole_lanes<T, kCap>(x + start, count, settings.softcap, buffer);
    const float block_max = max_of(u, count);
    if (block_max > row_max) {  // while all is -infinity there is no maximum, and shift stays 0
      const Lanes step = floored_exponent(broadcast((row_max - block_max) * scale));
      const Lanes decay = exp2_lanes(step);
      dot = decay * (dot + step * sum);
      sum *= decay;
      row_max = shift = block_max;
    }
    Lanes block_sum = {}, block_dot = {};
    for (int64_t j = 0; j < count; j += kLanes) {
      const Lanes y = floored_exponent((load(u + j) - shift) * scale);
      const Lanes e = exp2_lanes(y);
      block_sum += e;
      block_dot += e * y;
    }
    sum += block_sum;
    dot += block_dot;
  }
  const float total = sum_of(sum);
  const float log_sum = std::log(total);
  const float s = (capped_one(one(x + target), kCap ? settings.softcap : 0.0f) - row_max) / settings.temperature;
  *out = {s - log_sum, log_sum - kLn2 * (sum_of(dot) / total), row_max, log_sum};
}

template <bool kCap, bool kEntropy>
FASTALIGN_INLINE Lanes dlogits_lanes(Lanes x, RowSettings settings, const RowGradient& row, float g) {
  const Lanes u = capped(x, kCap ? settings.softcap : 0.0f);
  const float inverse = settings.inverse_temperature;
  const Lanes y = floored_exponent((u - row.row_max) * (inverse * kLog2E) - row.log_sum * kLog2E);
  Lanes factor = broadcast(-g * inverse);
  if (kEntropy) factor -= (row.e * inverse * kLn2) * (y + row.entropy * kLog2E);
  Lanes dz = exp2_lanes(y) * factor;
  if (kCap) {
    const Lanes t = u * (1.0f / settings.softcap);
    dz *= 1.0f - t * t;
  }
  return dz;
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
