// Float lanes, as many as one register holds: loads and stores of float32, bfloat16 and float16, exp and tanh. No
// include guard: common.h includes it once per instruction set, with FASTALIGN_ISA as the namespace and the bytes of a
// register in FASTALIGN_BYTES (GCC takes wider vectors too, but works some operations on them off lane by lane).
namespace fastalign::FASTALIGN_ISA {

constexpr int64_t kLanes = FASTALIGN_BYTES / 4;
typedef float Lanes __attribute__((vector_size(FASTALIGN_BYTES)));
typedef int32_t IntLanes __attribute__((vector_size(FASTALIGN_BYTES)));
typedef uint32_t WordLanes __attribute__((vector_size(FASTALIGN_BYTES)));
typedef uint16_t HalfWordLanes __attribute__((vector_size(FASTALIGN_BYTES / 2)));

#define FASTALIGN_INLINE static inline __attribute__((always_inline))

FASTALIGN_INLINE Lanes broadcast(float x) { return Lanes{} + x; }
FASTALIGN_INLINE Lanes as_float(WordLanes x) { return (Lanes)x; }
FASTALIGN_INLINE WordLanes as_word(Lanes x) { return (WordLanes)x; }

FASTALIGN_INLINE Lanes load(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

FASTALIGN_INLINE WordLanes load_words(const void* p) {
  HalfWordLanes x;
  std::memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, WordLanes);
}

FASTALIGN_INLINE Lanes load(const Bfloat16* p) { return as_float(load_words(p) << 16); }

FASTALIGN_INLINE Lanes load(const Float16* p) {
  const WordLanes h = load_words(p);
  // The product moves the exponent from half's bias to float's, subnormals included (2^112).
  Lanes x = as_float((h & 0x7fffu) << 13) * broadcast(0x1p112f);
  const WordLanes special = as_word(x) | 0x7f800000u;  // infinity and NaN
  x = (h & 0x7c00u) == 0x7c00u ? as_float(special) : x;
  return as_float(as_word(x) | ((h & 0x8000u) << 16));
}

FASTALIGN_INLINE void store(float* p, Lanes x) { std::memcpy(p, &x, sizeof(x)); }

FASTALIGN_INLINE void store_words(void* p, WordLanes x) {
  const HalfWordLanes narrow = __builtin_convertvector(x, HalfWordLanes);
  std::memcpy(p, &narrow, sizeof(narrow));
}

// Both round to nearest, ties to even.
FASTALIGN_INLINE void store(Bfloat16* p, Lanes x) {
  const WordLanes bits = as_word(x);
  const WordLanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_words(p, x == x ? rounded : (bits >> 16) | 0x40u);
}

FASTALIGN_INLINE void store(Float16* p, Lanes x) {
  const WordLanes sign = (as_word(x) & 0x80000000u) >> 16;
  const WordLanes size = as_word(x) & 0x7fffffffu;
  const WordLanes normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 lets the float unit round at half's subnormal step (2^-24).
  const WordLanes subnormal = as_word(as_float(size) + 0.5f) - 0x3f000000u;
  WordLanes bits = size < 0x38800000u ? subnormal : normal;
  bits = size >= 0x477ff000u ? WordLanes{} + 0x7c00u : bits;
  bits = size > 0x7f800000u ? WordLanes{} + 0x7e00u : bits;
  store_words(p, bits | sign);
}

// The first n < kLanes elements; the other lanes hold zeros.
template <typename T>
FASTALIGN_INLINE Lanes load_some(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <typename T>
FASTALIGN_INLINE void store_some(T* p, Lanes x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}

// Lanes from n on become -infinity.
FASTALIGN_INLINE Lanes mask_tail(Lanes x, int64_t n) {
  IntLanes lane = {};
  for (int32_t i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (int32_t)n ? x : broadcast(-std::numeric_limits<float>::infinity());
}

// b where either is NaN.
FASTALIGN_INLINE Lanes max_lanes(Lanes a, Lanes b) { return a > b ? a : b; }

FASTALIGN_INLINE float sum_of(Lanes x) {
  float total = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

FASTALIGN_INLINE float max_of(Lanes x) {
  float most = x[0];
  for (int64_t i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// exp of x <= 88: 2^n * exp(r) with |r| <= ln(2) / 2 and a polynomial of degree 6 (error < 2 ulp). Below -87 the
// result is exactly 0, NaN stays NaN.
FASTALIGN_INLINE Lanes exp_lanes(Lanes x) {
  const Lanes magic = broadcast(0x1.8p23f);  // adding it rounds to an integer in the low bits
  const Lanes shifted = x * broadcast(0x1.715476p0f) + magic;
  const Lanes n = shifted - magic;
  Lanes r = x - n * broadcast(0x1.62e400p-1f);
  r = r - n * broadcast(0x1.7f7d1cp-20f);
  Lanes p = broadcast(1.0f / 720.0f);
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const WordLanes power = (as_word(shifted) + 127u) << 23;
  return x < -87.0f ? Lanes{} : p * as_float(power);
}

// 2^x of x in [-127, 128): 2^n * 2^r with |r| <= 1/2 and a polynomial of degree 5 (error < 2e-7, 2^0 = 1). Below -126.5
// the result is exactly 0, NaN stays NaN. A third cheaper than exp_lanes: for sums of exponentials.
FASTALIGN_INLINE Lanes exp2_lanes(Lanes x) {
  const Lanes magic = broadcast(0x1.8p23f + 127.0f);  // adding it leaves n + 127 in the low bits
  const Lanes shifted = x + magic;
  const Lanes r = x - (shifted - magic);
  Lanes p = broadcast(0x1.5bba14p-10f);
  p = p * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
  return p * as_float(as_word(shifted) << 23);
}

// tanh: an odd polynomial where it is steep, 1 - 2 / (exp(2|x|) + 1) elsewhere.
FASTALIGN_INLINE Lanes tanh_lanes(Lanes x) {
  const Lanes size = as_float(as_word(x) & 0x7fffffffu);
  const Lanes capped = size > 20.0f ? broadcast(20.0f) : size;
  const Lanes e = exp_lanes(capped + capped);
  const Lanes far = 1.0f - 2.0f / (e + 1.0f);
  const Lanes x2 = size * size;
  Lanes p = broadcast(-5.70498872745e-3f);
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  const Lanes near = size * x2 * p + size;
  const Lanes t = size < 0.625f ? near : far;
  return as_float(as_word(t) | (as_word(x) & 0x80000000u));
}

// The soft cap; 0 means none.
FASTALIGN_INLINE Lanes capped(Lanes x, float softcap) {
  return softcap == 0.0f ? x : softcap * tanh_lanes(x * (1.0f / softcap));
}

FASTALIGN_INLINE float capped_one(float x, float softcap) { return capped(broadcast(x), softcap)[0]; }

// Columns at -infinity have exp(s) = 0; a finite s keeps 0 * s from becoming NaN. NaN stays.
FASTALIGN_INLINE Lanes floored(Lanes s) { return s < -200.0f ? broadcast(-200.0f) : s; }

template <typename T>
float one(const T* p) {
  return load_some(p, 1)[0];
}

}  // namespace fastalign::FASTALIGN_ISA
