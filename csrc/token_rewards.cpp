// Token-level rewards on CPU: one pass over the tokens, sequences in parallel. Formulas and the meaning of the arguments:
// fastalign/ops/token_rewards.py; the work on a run of tokens: token_rewards_lanes.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fastalign {

struct RewardForm {
  int64_t kind;  // of the KL estimate, an index into KINDS of fastalign/ops/kl_estimate.py
  float kl_coef, clip_score, dpo_coef, clip_dpo, missing_eos_penalty;
};

}  // namespace fastalign

#define FASTALIGN_ROWS "token_rewards_lanes.h"
#include "common.h"

namespace {

using fastalign::Bfloat16;
using fastalign::Float16;
using fastalign::RewardForm;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Tokens that one thread should have before a second one is worth waking.
constexpr int64_t kTokensPerTask = 16384;
// Tokens whose estimates are added in float32.
constexpr int64_t kRun = 1024;

// What is absent is null.
struct Sequences {
  const float* scores;
  const bool *finished, *mask;
  const int64_t* offsets;
  int64_t n_rows, n_steps;

  int64_t begin(int64_t row) const { return offsets ? offsets[row] : row * n_steps; }
};

float terminal_reward(const Sequences& s, const RewardForm& f, int64_t row) {
  float score = s.scores[row];
  score = score > f.clip_score ? f.clip_score : score < -f.clip_score ? -f.clip_score : score;  // NaN stays
  return s.finished && !s.finished[row] ? score - f.missing_eos_penalty : score;
}

// Writes the rewards of one sequence; the sum of its estimates and the number of its kept tokens.
template <typename T>
std::tuple<double, int64_t> rewards_of_row(const T* logp, const T* ref_logp, const T* dpo_logp, const Sequences& s,
                                           const RewardForm& f, int64_t row, float* rewards) {
  const int64_t begin = s.begin(row), end = s.begin(row + 1);
  double kl_sum = 0.0;
  int64_t count = 0;
  for (int64_t i = begin; i < end; i += kRun) {
    FASTALIGN_CALL(token_rewards<T>, logp + i, ref_logp + i, dpo_logp ? dpo_logp + i : nullptr,
                   s.mask ? s.mask + i : nullptr, std::min(kRun, end - i), f, rewards + i, &kl_sum, &count);
  }
  int64_t last = end - 1;
  while (last >= begin && s.mask && !s.mask[last]) --last;
  if (last >= begin) rewards[last] += terminal_reward(s, f, row);
  return {kl_sum, count};
}

std::tuple<Tensor, Tensor, Tensor> token_rewards_cpu(const Tensor& logp_in, const Tensor& ref_logp_in,
                                                     const Tensor& scores_in, const Maybe& dpo_logp_in,
                                                     const Maybe& finished_in, const Maybe& mask_in,
                                                     const Maybe& cu_seqlens_in, int64_t kind, double kl_coef,
                                                     double clip_score, double dpo_coef, double clip_dpo,
                                                     double missing_eos_penalty) {
  const auto contiguous = [](const Maybe& x) {
    return x ? Maybe(torch::stable::contiguous(*x)) : std::nullopt;
  };
  const auto data = [](const Maybe& x) { return x ? x->const_data_ptr() : nullptr; };
  const Tensor logp = torch::stable::contiguous(logp_in), ref_logp = torch::stable::contiguous(ref_logp_in);
  const Tensor scores = torch::stable::contiguous(scores_in);
  const Maybe dpo_logp = contiguous(dpo_logp_in), finished = contiguous(finished_in), mask = contiguous(mask_in);
  const Maybe cu_seqlens = contiguous(cu_seqlens_in);
  const auto narrow = [](double x) { return static_cast<float>(x); };
  const RewardForm form{kind,          narrow(kl_coef), narrow(clip_score), narrow(dpo_coef), narrow(clip_dpo),
                        narrow(missing_eos_penalty)};
  const Sequences sequences{static_cast<const float*>(scores.const_data_ptr()),
                            static_cast<const bool*>(data(finished)),
                            static_cast<const bool*>(data(mask)),
                            static_cast<const int64_t*>(data(cu_seqlens)),
                            scores.size(0),
                            cu_seqlens ? 0 : logp.size(1)};
  const int64_t n_rows = sequences.n_rows;

  Tensor rewards = torch::stable::new_empty(logp, logp.sizes(), ScalarType::Float);
  Tensor sequence_kl = torch::stable::new_empty(logp, {n_rows}, ScalarType::Float);
  Tensor kl = torch::stable::new_empty(logp, {}, ScalarType::Float);
  std::vector<double> sums(n_rows);
  std::vector<int64_t> counts(n_rows);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(logp.const_data_ptr());
    const T* ref = static_cast<const T*>(ref_logp.const_data_ptr());
    const T* dpo = static_cast<const T*>(data(dpo_logp));
    float* to = static_cast<float*>(rewards.mutable_data_ptr());
    const int64_t tokens_per_row = std::max<int64_t>(1, logp.numel() / std::max<int64_t>(1, n_rows));
    const int64_t grain = std::max<int64_t>(1, kTokensPerTask / tokens_per_row);
    torch::stable::parallel_for(0, n_rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        std::tie(sums[row], counts[row]) = rewards_of_row(x, ref, dpo, sequences, form, row, to);
      }
    });
  };
  switch (logp.scalar_type()) {
    case ScalarType::Float:
      run(float{});
      break;
    case ScalarType::BFloat16:
      run(Bfloat16{});
      break;
    case ScalarType::Half:
      run(Float16{});
      break;
    default:
      STD_TORCH_CHECK(false, "token_rewards: expected float32, bfloat16 or float16 log-probs on CPU");
  }
  double sum = 0.0;
  int64_t count = 0;
  float* of_sequences = static_cast<float*>(sequence_kl.mutable_data_ptr());
  for (int64_t row = 0; row < n_rows; ++row) {
    of_sequences[row] = static_cast<float>(sums[row]);
    sum += sums[row];
    count += counts[row];
  }
  *static_cast<float*>(kl.mutable_data_ptr()) = static_cast<float>(sum / std::max<int64_t>(1, count));
  return {rewards, sequence_kl, kl};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "token_rewards(Tensor logp, Tensor ref_logp, Tensor scores, Tensor? dpo_logp, Tensor? finished, Tensor? mask, "
      "Tensor? cu_seqlens, int kind, float kl_coef, float clip_score, float dpo_coef, float clip_dpo, "
      "float missing_eos_penalty) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("token_rewards", TORCH_BOX(&token_rewards_cpu));
}
