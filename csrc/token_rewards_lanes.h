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
  Lanes sums[kChains] = {};
  IntLanes counts[kChains] = {};
  for_registers(count, [&](int64_t j, int64_t i, int64_t n) __attribute__((always_inline)) {
    const IntLanes kept = kept_tokens(mask ? mask + i : nullptr, n);
    const Lanes ref = load_tokens(ref_logp + i, n);
    const Lanes kl = kl_lanes<kKind>(ref - load_tokens(logp + i, n));
    // Without a coefficient an infinite estimate must not become NaN.
    Lanes reward = f.kl_coef == 0.0f ? Lanes{} : -f.kl_coef * kl;
    if (dpo_logp) reward += clamped(f.dpo_coef * (load_tokens(dpo_logp + i, n) - ref), f.clip_dpo);
    store_tokens(rewards + i, kept ? reward : Lanes{}, n);
    sums[j] += kept ? kl : Lanes{};
    counts[j] -= kept;  // true is -1
  });
  *kl_sum += total_of(sums);
  *kept_count += total_of(counts);
}

// Adds to the sum of the estimates and the number of kept tokens.
template <typename T>
void token_rewards(const T* logp, const T* ref_logp, const T* dpo_logp, const bool* mask, int64_t count,
                   const RewardForm& f, float* rewards, double* kl_sum, int64_t* kept_count) {
  const auto run = f.kind == 0 ? rewards_of_kind<0, T> : f.kind == 1 ? rewards_of_kind<1, T> : rewards_of_kind<2, T>;
  run(logp, ref_logp, dpo_logp, mask, count, f, rewards, kl_sum, kept_count);
}

}  // namespace fastalign::FASTALIGN_ISA
