// How the row kernels find their rows of logits on CPU: shapes, strides, targets, settings.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace fastalign {

using torch::stable::Tensor;

struct RowSettings {
  float temperature, inverse_temperature;
  float softcap;  // 0: none
};

// Logits that one thread should have before a second one is worth waking.
constexpr int64_t kLogitsPerTask = 16384;

// What a row kernel reads: [count, vocab], or [outer, inner, vocab] with strides of its own (a slice of a batch), the
// columns of a row side by side. Strides in bytes.
struct Rows {
  const char* logits;
  const int64_t* targets;
  const float* temperature;
  int64_t count, inner, vocab, outer_stride, stride, temperature_stride, ignore_index;
  float softcap;

  const char* row(int64_t i) const { return logits + i / inner * outer_stride + i % inner * stride; }

  RowSettings settings(int64_t row) const {
    const float t = temperature[row * temperature_stride];
    return {t, 1.0f / t, softcap};
  }
};

inline Rows rows_of(const char* op, const Tensor& logits, const Tensor& targets, const Tensor& temperature,
                    double softcap, int64_t ignore_index) {
  const int64_t last = logits.dim() - 1, vocab = logits.size(last), count = targets.size(0);
  const int64_t* y = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t row = 0; row < count; ++row) {
    STD_TORCH_CHECK(y[row] == ignore_index || (y[row] >= 0 && y[row] < vocab), op,
                    ": expected targets in [0, ", vocab, ") or ", ignore_index, ", got ", y[row],
                    " in row ", row);
  }
  const int64_t bytes = static_cast<int64_t>(logits.element_size());
  return {static_cast<const char*>(logits.const_data_ptr()),
          y,
          static_cast<const float*>(temperature.const_data_ptr()),
          count,
          std::max<int64_t>(1, logits.size(last - 1)),
          vocab,
          last == 2 ? logits.stride(0) * bytes : 0,
          logits.stride(last - 1) * bytes,
          temperature.numel() == 1 ? 0 : 1,
          ignore_index,
          static_cast<float>(softcap)};
}

inline Tensor with_dense_rows(const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  const bool dense = logits.stride(last) == 1 || logits.size(last) == 1;
  return dense ? logits : torch::stable::contiguous(logits);
}

inline int64_t rows_per_task(int64_t vocab) { return std::max<int64_t>(1, kLogitsPerTask / vocab); }

}  // namespace fastalign
