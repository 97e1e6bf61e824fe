// The three products of reward_heads on tiles of rows; formulas and names: fastalign/ops/reward_heads.py. No include
// guard: common.h includes it once per instruction set.

namespace fastalign::FASTALIGN_ISA {

// What fits the registers: kRowTile * kHeadTile sums and as many operands as there are rows and heads.
constexpr int kRowTile = FASTALIGN_BYTES == 64 ? 4 : 2;
constexpr int kHeadTile = 4;
// One row is summed in blocks of this many columns, which bounds rounding, and a block of all rows of a tile stays in
// the first cache while the heads go by.
constexpr int64_t kColumnBlock = 1024;

// sums[r][k] += x[r] . w[k] over columns [begin, end), lane by lane.
template <typename T, int kRows, int kHeads>
FASTALIGN_INLINE void add_dots(const T* const* x, const float* w, int64_t width, int64_t begin, int64_t end,
                               Lanes* sums, int64_t sums_stride) {
  Lanes acc[kRows][kHeads] = {};
  const int64_t whole = begin + (end - begin) / kLanes * kLanes;
  for (int64_t j = begin; j < whole; j += kLanes) {
    Lanes row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) row[r] = load(x[r] + j);
#pragma GCC unroll 4
    for (int k = 0; k < kHeads; ++k) {
      const Lanes head = load(w + k * width + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r][k] += row[r] * head;
    }
  }
  if (whole < end) {
    for (int k = 0; k < kHeads; ++k) {
      const Lanes head = load_some(w + k * width + whole, end - whole);
      for (int r = 0; r < kRows; ++r) acc[r][k] += load_some(x[r] + whole, end - whole) * head;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < kHeads; ++k) sums[r * sums_stride + k] += acc[r][k];
  }
}

template <typename T, int kRows>
void score_tile(const T* const* x, const float* w, const float* bias, int64_t width, int64_t heads, float* out) {
  Lanes sums[kRows * kMaxHeads];
  for (int r = 0; r < kRows; ++r) {
    for (int64_t k = 0; k < heads; ++k) sums[r * kMaxHeads + k] = Lanes{};
  }
  for (int64_t begin = 0; begin < width; begin += kColumnBlock) {
    const int64_t end = begin + kColumnBlock < width ? begin + kColumnBlock : width;
    int64_t k = 0;
    for (; k + kHeadTile <= heads; k += kHeadTile) {
      add_dots<T, kRows, kHeadTile>(x, w + k * width, width, begin, end, sums + k, kMaxHeads);
    }
    for (; k < heads; ++k) {
      add_dots<T, kRows, 1>(x, w + k * width, width, begin, end, sums + k, kMaxHeads);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int64_t k = 0; k < heads; ++k) {
      out[r * heads + k] = sum_of(sums[r * kMaxHeads + k]) + (bias ? bias[k] : 0.0f);
    }
  }
}

// Scores [count, heads] of the rows x[0] to x[count - 1].
template <typename T>
void score_rows(const void* const* x, int64_t count, const float* w, const float* bias, int64_t width,
                int64_t heads, float* out) {
  const T* rows[kRowTile];
  int64_t i = 0;
  for (; i + kRowTile <= count; i += kRowTile) {
    for (int r = 0; r < kRowTile; ++r) rows[r] = static_cast<const T*>(x[i + r]);
    score_tile<T, kRowTile>(rows, w, bias, width, heads, out + i * heads);
  }
  for (; i < count; ++i) {
    rows[0] = static_cast<const T*>(x[i]);
    score_tile<T, 1>(rows, w, bias, width, heads, out + i * heads);
  }
}

// out[m] = sum_p a[m * a_m + p * a_p] * b[p], or += with kAdd, on kVectors registers of columns from j on; of the last
// one only `some` columns when that is not 0.
template <typename In, typename Out, bool kAdd, int kM, int kVectors>
FASTALIGN_INLINE void product_tile(const float* a, int64_t a_m, int64_t a_p, int64_t count_p, const void* const* b,
                                   void* const* out, int64_t j, int64_t some) {
  Lanes acc[kM][kVectors] = {};
  for (int64_t p = 0; p < count_p; ++p) {
    const In* from = static_cast<const In*>(b[p]) + j;
    Lanes x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = some ? load_some(from, some) : load(from + v * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) {
      const float factor = a[m * a_m + p * a_p];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[m][v] += factor * x[v];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Out* to = static_cast<Out*>(out[m]) + j + v * kLanes;
      if (some) {
        store_some(to, kAdd ? load_some(to, some) + acc[m][v] : acc[m][v], some);
      } else {
        store(to, kAdd ? load(to) + acc[m][v] : acc[m][v]);
      }
    }
  }
}

template <typename In, typename Out, bool kAdd, int kM>
void product_rows(const float* a, int64_t a_m, int64_t a_p, int64_t count_p, const void* const* b,
                  void* const* out, int64_t begin, int64_t end) {
  constexpr int kVectors = FASTALIGN_BYTES == 64 ? 4 : 2;
  int64_t j = begin;
  for (; j + kVectors * kLanes <= end; j += kVectors * kLanes) {
    product_tile<In, Out, kAdd, kM, kVectors>(a, a_m, a_p, count_p, b, out, j, 0);
  }
  for (; j + kLanes <= end; j += kLanes) {
    product_tile<In, Out, kAdd, kM, 1>(a, a_m, a_p, count_p, b, out, j, 0);
  }
  if (j < end) product_tile<In, Out, kAdd, kM, 1>(a, a_m, a_p, count_p, b, out, j, end - j);
}

// The same for count_m rows of out on columns [begin, end).
template <typename In, typename Out, bool kAdd>
void product(const float* a, int64_t a_m, int64_t a_p, int64_t count_m, int64_t count_p, const void* const* b,
             void* const* out, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + 4 <= count_m; m += 4) {
    product_rows<In, Out, kAdd, 4>(a + m * a_m, a_m, a_p, count_p, b, out + m, begin, end);
  }
  for (; m < count_m; ++m) {
    product_rows<In, Out, kAdd, 1>(a + m * a_m, a_m, a_p, count_p, b, out + m, begin, end);
  }
}

// dhidden[b] = sum_k d[b, k] weight[k] on columns [begin, end), of `count` rows.
template <typename T>
void dhidden_rows(const float* d, int64_t count, int64_t heads, const void* const* weight, void* const* dhidden,
                  int64_t begin, int64_t end) {
  product<float, T, false>(d, heads, 1, count, heads, weight, dhidden, begin, end);
}

// dweight[k] += sum_b d[b, k] hidden[b] on columns [begin, end), over `count` rows.
template <typename T>
void add_dweight(const float* d, int64_t count, int64_t heads, const void* const* hidden, void* const* dweight,
                 int64_t begin, int64_t end) {
  product<T, float, true>(d, 1, heads, heads, count, hidden, dweight, begin, end);
}

}  // namespace fastalign::FASTALIGN_ISA
