// Statistics over the K scores of one sample and their gradients; formulas: fastalign/ops/reduce_scores.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace fastalign {

constexpr int64_t kMaxHeads = 64;

// The mean of the ascending scores `lower` and `upper` where these are no -1, else
// mean - std_coef * std - variance_coef * variance.
struct Statistic {
  int64_t lower, upper;
  float std_coef, variance_coef;
};

// `off` is the mean of the distances from the first score.
struct Moments {
  float mean, off, variance, std;
};

struct Middle {
  float lower, upper;
};

// From the mean, by way of the first score: equal scores are 0 from it, and not from a mean that is rounded.
inline float deviation(const float* scores, int64_t k, float off) { return (scores[k] - scores[0]) - off; }

inline Moments moments_of(const float* scores, int64_t heads) {
  float sum = 0.0f, apart = 0.0f, squares = 0.0f;
  for (int64_t k = 0; k < heads; ++k) {
    sum += scores[k];
    apart += scores[k] - scores[0];
  }
  const float mean = sum / static_cast<float>(heads), off = apart / static_cast<float>(heads);
  if (heads == 1) {
    return {mean, 0.0f, 0.0f, 0.0f};
  }
  for (int64_t k = 0; k < heads; ++k) {
    const float centred = deviation(scores, k, off);
    squares += centred * centred;
  }
  const float variance = squares / static_cast<float>(heads - 1);
  return {mean, off, variance, std::sqrt(variance)};
}

// NaN where one of the scores is.
inline Middle middle_of(const float* scores, int64_t heads, const Statistic& statistic) {
  float ordered[kMaxHeads];
  for (int64_t k = 0; k < heads; ++k) {
    if (std::isnan(scores[k])) {
      return {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::quiet_NaN()};
    }
    ordered[k] = scores[k];
  }
  std::sort(ordered, ordered + heads);
  return {ordered[statistic.lower], ordered[statistic.upper]};
}

inline void reduce_row(const float* scores, int64_t heads, const Statistic& statistic, float* reduced,
                       float* std) {
  const Moments moments = moments_of(scores, heads);
  *std = moments.std;
  if (statistic.lower >= 0) {
    const Middle middle = middle_of(scores, heads, statistic);
    *reduced = 0.5f * middle.lower + 0.5f * middle.upper;
    return;
  }
  *reduced = moments.mean;
  // A coefficient of 0 must not turn an infinite spread into NaN.
  if (statistic.std_coef != 0.0f) *reduced -= statistic.std_coef * moments.std;
  if (statistic.variance_coef != 0.0f) *reduced -= statistic.variance_coef * moments.variance;
}

// Of one sample; null pointers are gradients that are absent.
struct ScoreGradients {
  const float *scores, *reduced, *std;
};

// Adds dL/dscores of sample b to `out` [heads].
inline void add_dscores(const ScoreGradients& gradients, const float* all_scores, int64_t b, int64_t heads,
                        const Statistic& statistic, float* out) {
  const float* scores = all_scores + b * heads;
  if (gradients.scores) {
    for (int64_t k = 0; k < heads; ++k) out[k] += gradients.scores[b * heads + k];
  }
  if (!gradients.reduced && !gradients.std) {
    return;
  }
  const Moments moments = moments_of(scores, heads);
  const float ddof = static_cast<float>(std::max<int64_t>(1, heads - 1));
  float to_mean = 0.0f;     // a factor of 1
  float to_centred = 0.0f;  // a factor of the deviation from the mean
  const float inverse_std = moments.std == 0.0f ? 0.0f : 1.0f / (ddof * moments.std);
  if (gradients.std) to_centred += gradients.std[b] * inverse_std;
  if (gradients.reduced && statistic.lower >= 0) {
    const Middle middle = middle_of(scores, heads, statistic);
    float at_lower = 0.0f, at_upper = 0.0f;
    for (int64_t k = 0; k < heads; ++k) {
      at_lower += scores[k] == middle.lower ? 1.0f : 0.0f;
      at_upper += scores[k] == middle.upper ? 1.0f : 0.0f;
    }
    for (int64_t k = 0; k < heads; ++k) {
      const float share = (scores[k] == middle.lower ? 0.5f : 0.0f) / at_lower +
                          (scores[k] == middle.upper ? 0.5f : 0.0f) / at_upper;
      out[k] += gradients.reduced[b] * share;
    }
  } else if (gradients.reduced) {
    to_mean = gradients.reduced[b] / static_cast<float>(heads);
    if (statistic.std_coef != 0.0f) to_centred -= gradients.reduced[b] * statistic.std_coef * inverse_std;
    if (statistic.variance_coef != 0.0f) {
      to_centred -= gradients.reduced[b] * 2.0f * statistic.variance_coef / ddof;
    }
  }
  if (to_centred == 0.0f) {
    for (int64_t k = 0; k < heads; ++k) out[k] += to_mean;
    return;
  }
  for (int64_t k = 0; k < heads; ++k) out[k] += to_mean + to_centred * deviation(scores, k, moments.off);
}

}  // namespace fastalign
