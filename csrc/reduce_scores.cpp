// Statistics over the scores of reward heads on CPU, samples in parallel. Formulas and the meaning of the arguments:
// fastalign/ops/reduce_scores.py.
#include "reduce_scores.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

namespace {

using fastalign::kMaxHeads;
using fastalign::ScoreGradients;
using fastalign::Statistic;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Samples that one thread should have before a second one is worth waking.
constexpr int64_t kSamplesPerTask = 1024;

Statistic statistic_of(int64_t lower, int64_t upper, double std_coef, double variance_coef) {
  return {lower, upper, static_cast<float>(std_coef), static_cast<float>(variance_coef)};
}

std::tuple<Tensor, Tensor> reduce_scores_cpu(const Tensor& scores_in, int64_t lower, int64_t upper,
                                             double std_coef, double variance_coef) {
  const Tensor scores = torch::stable::contiguous(scores_in);
  const int64_t n = scores.size(0), heads = scores.size(1);
  STD_TORCH_CHECK(heads <= kMaxHeads, "reduce_scores: expected at most ", kMaxHeads, " heads, got ", heads);
  const Statistic statistic = statistic_of(lower, upper, std_coef, variance_coef);
  Tensor reduced = torch::stable::new_empty(scores, {n}, ScalarType::Float);
  Tensor std = torch::stable::new_empty(scores, {n}, ScalarType::Float);
  const float* s = static_cast<const float*>(scores.const_data_ptr());
  float* to_reduced = static_cast<float*>(reduced.mutable_data_ptr());
  float* to_std = static_cast<float*>(std.mutable_data_ptr());
  torch::stable::parallel_for(0, n, kSamplesPerTask, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      fastalign::reduce_row(s + b * heads, heads, statistic, to_reduced + b, to_std + b);
    }
  });
  return {reduced, std};
}

Tensor dscores_cpu(const std::optional<Tensor>& grad_reduced_in, const std::optional<Tensor>& grad_std_in,
                   const Tensor& scores_in, int64_t lower, int64_t upper, double std_coef,
                   double variance_coef) {
  const auto contiguous = [](const std::optional<Tensor>& x) {
    return x ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
  };
  const auto floats = [](const std::optional<Tensor>& x) {
    return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr;
  };
  const Tensor scores = torch::stable::contiguous(scores_in);
  const std::optional<Tensor> grad_reduced = contiguous(grad_reduced_in);
  const std::optional<Tensor> grad_std = contiguous(grad_std_in);
  const int64_t n = scores.size(0), heads = scores.size(1);
  const Statistic statistic = statistic_of(lower, upper, std_coef, variance_coef);
  const ScoreGradients gradients{nullptr, floats(grad_reduced), floats(grad_std)};
  Tensor out = torch::stable::new_empty(scores, {n, heads}, ScalarType::Float);
  const float* s = static_cast<const float*>(scores.const_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, n, kSamplesPerTask, [&](int64_t first, int64_t last) {
    std::fill(to + first * heads, to + last * heads, 0.0f);
    for (int64_t b = first; b < last; ++b) {
      fastalign::add_dscores(gradients, s, b, heads, statistic, to + b * heads);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "reduce_scores(Tensor scores, int lower, int upper, float std_coef, float variance_coef) "
      "-> (Tensor, Tensor)");
  m.def(
      "dscores(Tensor? grad_reduced, Tensor? grad_std, Tensor scores, int lower, int upper, float std_coef, "
      "float variance_coef) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("reduce_scores", TORCH_BOX(&reduce_scores_cpu));
  m.impl("dscores", TORCH_BOX(&dscores_cpu));
}
