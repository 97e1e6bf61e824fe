"""Where a trained policy stands: its KL to the base, and the reward it misses at that KL.

From responses sampled from the policy, with per token d = ref_logp - logp,

    k1             -sum d                       unbiased, any sign
    k3             sum (e^d - 1 - d)            unbiased, never negative
    rao_blackwell  sum_t KL_t                   unbiased, never negative

are estimates of KL(policy || base) of the response, in nats. KL_t is the exact KL of the token's
distribution given what stands before it (fastalign.ops.token_kl): the expectation of k1's and k3's
term over that token, so that no term has more variance. Standard errors are those of a mean over
independent responses.

The regret at the policy's own KL needs samples of the base too. At the alpha whose tilt has that
KL,

    regret = (KL + mean log Z) / alpha - reward

and the error of alpha does not count (fastalign/theory/frontier.py), so that

    se^2 = [(1 / ESS - 1 / N) + var(KL_j - alpha r_j) / M] / alpha^2

for N samples of the base and M responses to one prompt; for P prompts it is the variance over
prompts of (log Z_x + KL_x) / alpha - r_x, over P, plus the square of the bias that log Z has,
(1 / ESS - 1 / N) / (2 alpha), which more prompts do not make smaller.

Source: J. Schulman, "Approximating KL Divergence" (2020), for k1 and k3; arXiv 2404.01730, Lemmas 1
and 2. Tests: tests/test_theory_policy.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.kl_estimate import kl_estimate
from fastalign.theory.best_of_n import n_for_kl
from fastalign.theory.checks import number, samples
from fastalign.theory.curve import best_of_n_curve
from fastalign.theory.frontier import (
    LEAST_ESS,
    Reweighted,
    alphas_for_kls,
    as_prompts,
    largest_alpha,
    reward_error,
    reweight,
)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over independent values, and its standard error."""

    values: Tensor
    """[B] float64, one per response."""

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def se(self) -> float:
        """NaN for a single value."""
        if len(self.values) < 2:
            return math.nan
        return float(self.values.std()) / math.sqrt(len(self.values))


@dataclass(frozen=True, eq=False)
class PolicyKL:
    """KL(policy || base) of a response, nats, by three estimators."""

    k1: Estimate
    k3: Estimate
    rao_blackwell: Estimate | None
    """None without ``token_kl``."""


def policy_kl(
    logp: Tensor, ref_logp: Tensor, token_kl: Tensor | None = None, *, cu_seqlens: Tensor
) -> PolicyKL:
    """KL of a policy to its base from its own responses, by the formulas above.

    Args:
        logp: [N] log-probs of the responses' tokens under the policy that sampled them, packed.
        ref_logp: [N] the same tokens under the base.
        token_kl: [N] exact KL of each token's distribution, as ``fa.ops.token_kl`` gives it.
        cu_seqlens: [B + 1] int, bounds of the responses: 0, .., N.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, bounds that do not grow.
    """
    op = "policy_kl"
    logp, ref_logp = samples(op, "logp", logp, (1,)), samples(op, "ref_logp", ref_logp, (1,))
    given = [("ref_logp", ref_logp)]
    if token_kl is not None:
        token_kl = samples(op, "token_kl", token_kl, (1,))
        given.append(("token_kl", token_kl))
    for name, values in given:
        if values.shape != logp.shape:
            raise ValueError(
                f"{op}: expected {name} of logp's shape, {tuple(logp.shape)}, "
                f"got {tuple(values.shape)}"
            )
    bounds = torch.as_tensor(cu_seqlens, device=logp.device).long()
    if bounds.dim() != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(logp):
        raise ValueError(
            f"{op}: expected cu_seqlens [B + 1] from 0 to {len(logp)}, got {bounds.tolist()}"
        )
    lengths = bounds.diff()
    if bool((lengths < 0).any()):
        raise ValueError(f"{op}: expected cu_seqlens that never falls, got {bounds.tolist()}")
    response = torch.arange(len(lengths), device=logp.device).repeat_interleave(lengths)

    def summed(values: Tensor) -> Estimate:
        return Estimate(logp.new_zeros(len(lengths)).index_add(0, response, values))

    return PolicyKL(
        summed(kl_estimate(logp, ref_logp, "k1")),
        summed(kl_estimate(logp, ref_logp, "k3")),
        None if token_kl is None else summed(token_kl),
    )


@dataclass(frozen=True)
class SampledRegret:
    """How far a policy is from the best one of its KL, with standard error."""

    regret: float
    """In units of the reward: the frontier's reward minus the policy's."""
    se: float
    kl: float
    """KL(policy || base), nats."""
    reward: float
    """Mean reward of the policy."""
    frontier_reward: float
    """Estimate of the highest mean reward of all policies with that KL."""
    alpha: float
    """Of the tilt with that KL."""
    ess: float
    """Effective sample size of the base's samples at that alpha, per prompt."""


def regret_from_samples(base_rewards: Tensor, rewards: Tensor, kl: Tensor) -> SampledRegret:
    """The reward that a policy misses at its own KL to the base, in units of the reward.

    Args:
        base_rewards: rewards of samples of the base: [N] for one prompt, [P, N] for P prompts.
        rewards: of the policy's responses: [M] for one prompt, [P, M] for the same P prompts.
        kl: the shape of ``rewards``: KL of each response, nats, such as the values of
            ``policy_kl(...).rao_blackwell``.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, rewards of the base that are
            all equal, a mean KL that is not positive, or one at which the base's samples say
            nothing: the effective sample size is under 10 (the largest KL is named).
    """
    op = "regret_from_samples"
    of_base = as_prompts(op, "base_rewards", base_rewards)
    dims = (base_rewards.dim(),)
    rewards, kl = samples(op, "rewards", rewards, dims), samples(op, "kl", kl, dims)
    if kl.shape != rewards.shape:
        raise ValueError(
            f"{op}: expected kl of rewards' shape, {tuple(rewards.shape)}, got {tuple(kl.shape)}"
        )
    prompts = len(of_base)
    rewards, kl = rewards.reshape(-1, rewards.shape[-1]), kl.reshape(-1, kl.shape[-1])
    if len(rewards) != prompts:
        raise ValueError(
            f"{op}: expected rewards for {prompts} prompts like base_rewards, got {len(rewards)}"
        )
    point = trusted_point(op, of_base, float(kl.mean()))
    alpha = point.alpha
    per_prompt = (point.log_z + kl.mean(1)) / alpha - rewards.mean(1)
    if prompts > 1:
        se = math.hypot(float(per_prompt.std()) / math.sqrt(prompts), point.log_z_bias / alpha)
    else:
        own = kl[0] / alpha - rewards[0]
        variance = float(own.var()) / len(own) if len(own) > 1 else math.nan
        se = math.sqrt((point.log_z_se / alpha) ** 2 + variance)
    return SampledRegret(
        regret=float(per_prompt.mean()),
        se=se,
        kl=float(kl.mean()),
        reward=float(rewards.mean()),
        frontier_reward=point.reward,
        alpha=alpha,
        ess=point.ess,
    )


@dataclass(frozen=True)
class Budget:
    """What to train with, or how many to draw, to stay within a KL."""

    alpha: float
    """Inverse temperature of the tilt with that KL, 1 / reward."""
    beta: float
    """1 / alpha: the KL coefficient of PPO and DPO, and the lambda of APA and AWR, for this reward
    as it is. Where the trainer divides advantages by their standard deviation s, it is beta / s."""
    reward: float
    """Expected reward of the best policy with that KL."""
    reward_se: float
    ess: float
    n: int
    """The largest n whose best-of-n is sure to keep within that KL: log n - (n - 1) / n."""
    best_of_n_reward: float
    """Expected reward of best-of-n."""


def for_kl_budget(rewards: Tensor, kl: float) -> Budget:
    """Which alpha, beta (or lambda) and n go with a KL budget, from samples of the base alone.

    Args:
        rewards: of samples of the base: [N] for one prompt, [P, N] for P prompts.
        kl: the budget in nats, > 0; KL of a whole response, mean over prompts.

    Raises:
        ValueError: rewards that are all equal or not finite, a KL that is not positive or at which
            these samples say nothing: the effective sample size is under 10 (the largest KL is
            named).
    """
    op = "for_kl_budget"
    rewards = as_prompts(op, "rewards", rewards)
    point = trusted_point(op, rewards, number(op, "kl", kl))
    # KL <= log(N / ESS) and ESS >= 10, so that n < e^(KL + 1) is always under N.
    n = n_for_kl(kl)
    return Budget(
        alpha=point.alpha,
        beta=1.0 / point.alpha,
        reward=point.reward,
        reward_se=reward_error(rewards, point),
        ess=point.ess,
        n=n,
        best_of_n_reward=float(best_of_n_curve(rewards, rewards)[:, n - 1].mean()),
    )


def trusted_point(op: str, rewards: Tensor, kl: float) -> Reweighted:
    """The frontier's point at this KL; ValueError where ESS is under 10."""
    if not kl > 0:
        raise ValueError(f"{op}: expected a positive KL, got {kl:.6g} nats")
    last = largest_alpha(rewards)
    if math.isfinite(last):
        most = reweight(rewards, last).kl
        if kl > most:
            raise ValueError(
                f"{op}: expected a KL of at most {most:.6g} nats, where the effective sample size "
                f"of these samples falls to {LEAST_ESS:.0f}, got {kl:.6g}"
            )
    return reweight(rewards, alphas_for_kls(op, rewards, [kl])[0])
