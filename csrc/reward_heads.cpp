// Reward heads on rows of hidden states on CPU. Formulas and the meaning of the arguments:
// fastalign/ops/reward_heads.py; the products: reward_heads_rows.h.
#include "huge_pages.h"
#include "reduce_scores.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#define FASTALIGN_ROWS "reward_heads_rows.h"
#include "common.h"

namespace {

using fastalign::kMaxHeads;
using fastalign::ScoreGradients;
using fastalign::Statistic;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Products and samples that one thread should have before a second one is worth waking; in the backward pass, products
// and bytes of zeros together that make both worth it.
constexpr int64_t kProductsPerTask = 1 << 20;
constexpr int64_t kSamplesPerTask = 1024;
constexpr int64_t kWorkToShare = 8 << 20;
// Rows and columns whose products the backward pass forms together: they stay in the caches.
constexpr int64_t kRowBlock = 64;
constexpr int64_t kColumnBlock = 256;

const float* floats(const std::optional<Tensor>& x) {
  return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
}

Tensor with_dense_rows(const Tensor& hidden) {
  const bool dense = hidden.stride(1) == 1 || hidden.size(1) == 1;
  return dense ? hidden : torch::stable::contiguous(hidden);
}

// Calls f with a value of the hidden states' type.
template <typename F>
void with_type(const Tensor& hidden, const F& f) {
  switch (hidden.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(fastalign::Bfloat16{});
    case ScalarType::Half:
      return f(fastalign::Float16{});
    default:
      STD_TORCH_CHECK(false, "reward_heads: expected float32, bfloat16 or float16 hidden on CPU");
  }
}

// The row of hidden of each sample.
std::vector<int64_t> rows_of(const std::optional<Tensor>& index_in, int64_t n_rows) {
  if (!index_in) {
    std::vector<int64_t> rows(n_rows);
    std::iota(rows.begin(), rows.end(), 0);
    return rows;
  }
  const Tensor index = torch::stable::contiguous(*index_in);
  const int64_t* named = static_cast<const int64_t*>(index.const_data_ptr());
  const std::vector<int64_t> rows(named, named + index.size(0));
  for (size_t b = 0; b < rows.size(); ++b) {
    STD_TORCH_CHECK(rows[b] >= 0 && rows[b] < n_rows, "reward_heads: expected index in [0, ", n_rows,
                    "), got ", rows[b], " at place ", b);
  }
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> reward_heads_cpu(const Tensor& hidden_in, const Tensor& weight_in,
                                                    const std::optional<Tensor>& bias_in,
                                                    const std::optional<Tensor>& index, int64_t lower,
                                                    int64_t upper, double std_coef, double variance_coef) {
  const Tensor hidden = with_dense_rows(hidden_in), weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  const std::vector<int64_t> rows = rows_of(index, hidden.size(0));
  const int64_t n = static_cast<int64_t>(rows.size()), heads = weight.size(0), width = weight.size(1);
  STD_TORCH_CHECK(heads <= kMaxHeads, "reward_heads: expected at most ", kMaxHeads, " heads, got ", heads);
  const Statistic statistic{lower, upper, static_cast<float>(std_coef), static_cast<float>(variance_coef)};
  Tensor scores = torch::stable::new_empty(hidden, {n, heads}, ScalarType::Float);
  Tensor reduced = torch::stable::new_empty(hidden, {n}, ScalarType::Float);
  Tensor std = torch::stable::new_empty(hidden, {n}, ScalarType::Float);
  float* to_scores = static_cast<float*>(scores.mutable_data_ptr());
  float* to_reduced = static_cast<float*>(reduced.mutable_data_ptr());
  float* to_std = static_cast<float*>(std.mutable_data_ptr());
  const float* w = static_cast<const float*>(weight.const_data_ptr());
  const char* x = static_cast<const char*>(hidden.const_data_ptr());
  const int64_t row_bytes = hidden.stride(0) * static_cast<int64_t>(hidden.element_size());
  const int64_t grain = std::max<int64_t>(4, kProductsPerTask / (width * heads));
  with_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, n, grain, [&](int64_t first, int64_t last) {
      std::vector<const void*> from(last - first);
      for (int64_t b = first; b < last; ++b) from[b - first] = x + rows[b] * row_bytes;
      FASTALIGN_CALL(score_rows<T>, from.data(), last - first, w, floats(bias), width, heads,
                     to_scores + first * heads);
      for (int64_t b = first; b < last; ++b) {
        fastalign::reduce_row(to_scores + b * heads, heads, statistic, to_reduced + b, to_std + b);
      }
    });
  });
  return {scores, reduced, std};
}

// The rows that are named, each once and ascending, and dL/dscores of each summed over the samples that name it, in
// their order.
struct Named {
  std::vector<int64_t> rows;
  std::vector<float> dscores;  // [rows, heads]
};

Named named_rows(std::vector<int64_t> rows, const ScoreGradients& gradients, const float* scores, int64_t heads,
                 const Statistic& statistic) {
  const int64_t n = static_cast<int64_t>(rows.size());
  std::vector<float> dscores(n * heads);
  torch::stable::parallel_for(0, n, kSamplesPerTask, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      fastalign::add_dscores(gradients, scores, b, heads, statistic, &dscores[b * heads]);
    }
  });
  if (std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<int64_t>()) == rows.end()) {
    return {std::move(rows), std::move(dscores)};
  }
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows[a] < rows[b]; });
  Named named;
  named.rows.reserve(n);
  named.dscores.reserve(n * heads);
  for (const int64_t b : order) {
    if (named.rows.empty() || named.rows.back() != rows[b]) {
      named.rows.push_back(rows[b]);
      named.dscores.resize(named.dscores.size() + heads, 0.0f);
    }
    float* sum = named.dscores.data() + named.dscores.size() - heads;
    for (int64_t k = 0; k < heads; ++k) sum[k] += dscores[b * heads + k];
  }
  return named;
}

// Zeros in bytes [begin, end) of the rows of out [n_rows] that are not named.
void clear_others(const std::vector<int64_t>& named, int64_t n_rows, int64_t row_bytes, char* out, int64_t begin,
                  int64_t end) {
  size_t next = 0;
  for (int64_t row = 0; row < n_rows; ++row) {
    if (next < named.size() && named[next] == row) {
      ++next;
    } else {
      std::memset(out + row * row_bytes + begin, 0, end - begin);
    }
  }
}

// Fills dhidden, dweight and dbias, contiguous; those without elements are left alone. Columns are shared out among
// threads, so how many there are does not change a sum.
void reward_heads_backward_cpu(Tensor dhidden, Tensor dweight, Tensor dbias,
                               const std::optional<Tensor>& grad_scores_in,
                               const std::optional<Tensor>& grad_reduced_in,
                               const std::optional<Tensor>& grad_std_in, const Tensor& hidden_in,
                               const Tensor& weight_in, const std::optional<Tensor>& index,
                               const Tensor& scores_in, int64_t lower, int64_t upper, double std_coef,
                               double variance_coef) {
  const Tensor hidden = with_dense_rows(hidden_in), weight = torch::stable::contiguous(weight_in);
  const Tensor scores = torch::stable::contiguous(scores_in);
  const std::optional<Tensor> grads[] = {contiguous(grad_scores_in), contiguous(grad_reduced_in),
                                         contiguous(grad_std_in)};
  const int64_t heads = weight.size(0), width = weight.size(1);
  const Named named =
      named_rows(rows_of(index, hidden.size(0)), {floats(grads[0]), floats(grads[1]), floats(grads[2])},
                 static_cast<const float*>(scores.const_data_ptr()), heads,
                 {lower, upper, static_cast<float>(std_coef), static_cast<float>(variance_coef)});
  const int64_t n = static_cast<int64_t>(named.rows.size());
  const bool needs_hidden = dhidden.numel() > 0, needs_heads = dweight.numel() > 0;
  if (needs_heads) {
    float* to = static_cast<float*>(dbias.mutable_data_ptr());
    for (int64_t k = 0; k < heads; ++k) {
      double sum = 0.0;
      for (int64_t i = 0; i < n; ++i) sum += named.dscores[i * heads + k];
      to[k] = static_cast<float>(sum);
    }
  }

  const int64_t bytes = static_cast<int64_t>(hidden.element_size());
  const char* x = static_cast<const char*>(hidden.const_data_ptr());
  char* dx = needs_hidden ? static_cast<char*>(dhidden.mutable_data_ptr()) : nullptr;
  float* dw = needs_heads ? static_cast<float*>(dweight.mutable_data_ptr()) : nullptr;
  std::vector<const void*> from(n), heads_from(heads);
  std::vector<void*> to(n), heads_to(heads);
  for (int64_t i = 0; i < n; ++i) {
    from[i] = x + named.rows[i] * hidden.stride(0) * bytes;
    to[i] = dx + named.rows[i] * width * bytes;
  }
  for (int64_t k = 0; k < heads; ++k) {
    heads_from[k] = static_cast<const float*>(weight.const_data_ptr()) + k * width;
    heads_to[k] = dw + k * width;
  }
  if (needs_hidden) fastalign::advise_huge_pages(dx, hidden.size(0) * width * bytes);
  if (needs_heads) std::fill(dw, dw + heads * width, 0.0f);
  const int64_t cleared = needs_hidden ? (hidden.size(0) - n) * width * bytes : 0;
  const bool shared = n * width * heads * (needs_hidden + needs_heads) + cleared >= kWorkToShare;
  with_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    const auto tile = [&](int64_t first, int64_t begin, int64_t end) {
      const int64_t count = std::min(kRowBlock, n - first);
      const float* d = named.dscores.data() + first * heads;
      if (needs_heads) {
        FASTALIGN_CALL(add_dweight<T>, d, count, heads, from.data() + first, heads_to.data(), begin, end);
      }
      if (needs_hidden) {
        FASTALIGN_CALL(dhidden_rows<T>, d, count, heads, heads_from.data(), to.data() + first, begin, end);
      }
    };
    torch::stable::parallel_for(0, width, shared ? kColumnBlock : width, [&](int64_t task_begin, int64_t task_end) {
      if (cleared > 0) {
        clear_others(named.rows, hidden.size(0), width * bytes, dx, task_begin * bytes, task_end * bytes);
      }
      for (int64_t first = 0; first < n; first += kRowBlock) {
        for (int64_t begin = task_begin; begin < task_end; begin += kColumnBlock) {
          tile(first, begin, std::min(begin + kColumnBlock, task_end));
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "reward_heads(Tensor hidden, Tensor weight, Tensor? bias, Tensor? index, int lower, int upper, "
      "float std_coef, float variance_coef) -> (Tensor, Tensor, Tensor)");
  m.def(
      "reward_heads_backward(Tensor(a!) dhidden, Tensor(b!) dweight, Tensor(c!) dbias, Tensor? grad_scores, "
      "Tensor? grad_reduced, Tensor? grad_std, Tensor hidden, Tensor weight, Tensor? index, Tensor scores, "
      "int lower, int upper, float std_coef, float variance_coef) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("reward_heads", TORCH_BOX(&reward_heads_cpu));
  m.impl("reward_heads_backward", TORCH_BOX(&reward_heads_backward_cpu));
}
