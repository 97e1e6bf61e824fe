// Rewards of a run of tokens of one sequence, without its terminal reward; formulas: fastalign/ops/token_rewards.py. No
// include guard: common.h includes it once per instruction set.
#include "token_lanes.h"

namespace fastalign::FASTALIGN_ISA {

// NaN stays.
FASTALIGN_INLINE Lanes clamped(Lanes x, float most) {
  x = x > most ? broadcast(most) : x;
  return x < -most ? broadcast(-most) : x;
}

template <int kKind, typename T>
void rewards_of_kind(const T* logp, const T* ref_logp, const T* dpo_logp, const bool* mask, int64_t count,
                     const RewardForm& f, float* rewards, double* kl_sum, int64_t* kept_count) {
  Lanes sum = {};
  IntLanes counts = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i < kLanes ? count - i : kLanes;
    const IntLanes kept = kept_tokens(mask ? mask + i : nullptr, n);
    const Lanes ref = load_tokens(ref_logp + i, n);
    const Lanes kl = kl_lanes<kKind>(ref - load_tokens(logp + i, n));
    // Without a coefficient an infinite estimate must not become NaN.
    Lanes reward = f.kl_coef == 0.0f ? Lanes{} : -f.kl_coef * kl;
    if (dpo_logp) reward += clamped(f.dpo_coef * (load_tokens(dpo_logp + i, n) - ref), f.clip_dpo);
    store_tokens(rewards + i, kept ? reward : Lanes{}, n);
    sum += kept ? kl : Lanes{};
    counts -= kept;  // true is -1
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    *kl_sum += sum[i];
    *kept_count += counts[i];
  }
}

// Adds to the sum of the estimates and the number of kept tokens.
template <typename T>
void token_rewards(const T* logp, const T* ref_logp, const T* dpo_logp, const bool* mask, int64_t count,
                   const RewardForm& f, float* rewards, double* kl_sum, int64_t* kept_count) {
  const auto run = f.kind == 0 ? rewards_of_kind<0, T> : f.kind == 1 ? rewards_of_kind<1, T> : rewards_of_kind<2, T>;
  run(logp, ref_logp, dpo_logp, mask, count, f, rewards, kl_sum, kept_count);
}

}  // namespace fastalign::FASTALIGN_ISA
