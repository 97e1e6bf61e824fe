"""The KL/reward frontier of a real model, from rewards of samples of its base; before any training.

The best policy at inverse temperature alpha is the base weighted by w = e^(alpha r), so its KL and
reward follow from N samples of the base by self-normalised weights, for every alpha at once:

    Z      = mean(w)
    reward = sum(w r) / sum(w)
    KL     = alpha reward - log Z
    ESS    = sum(w)^2 / sum(w^2)               effective sample size

With P prompts each has its own Z; KL and reward are means over prompts, at one alpha for all.

At a given KL the frontier's reward is min over alpha of (KL + mean log Z) / alpha, so the error of
alpha itself does not count, and the delta method gives

    se(reward at this KL) = se(mean log Z) / alpha
                          = sqrt(1 / ESS - 1 / N) / alpha          for one prompt;

for P prompts the se of the mean log Z is the spread of the P values over sqrt(P): it counts the
choice of the prompts and of the samples. Bands (95 %) are reward +- 1.96 of this for one prompt,
for P +- Student's t with P - 1 degrees of freedom (fastalign/theory/interval.py). log Z is too
small by (1 / ESS - 1 / N) / 2 on average, and with it the reward: for one prompt by at most 0.16 se
while ESS >= 10. More prompts do not make that smaller, so for P > 1 it is part of the se, which is
the root of the sum of both squares. Under an ESS of 10 the highest few rewards decide everything:
no reward is given.
Measured for normal rewards, N = 400: the 95 % band holds the truth in 95 of 100 cases at an ESS
over 200, in 93 at 100, in 91 at 50, in 83 near 10.

Source: arXiv 2404.01730, Lemma 1; A. B. Owen, "Monte Carlo theory, methods and examples", chapter 9
(self-normalised weights, effective sample size, delta method). Tests:
tests/test_theory_frontier.py. Benchmark: benchmarks/bench_theory.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from fastalign.theory.checks import number, samples
from fastalign.theory.interval import student_t
from fastalign.theory.solve import solve_increasing

LEAST_ESS = 10.0
POINTS = 100


@dataclass(frozen=True)
class Reweighted:
    """The base's samples, weighted by e^(alpha r), prompt by prompt."""

    alpha: float
    log_z: Tensor
    """[P] log of the mean weight."""
    reward: float
    kl: float
    variance: float
    """Mean over prompts of the reward's variance under the weights: the slope of ``reward``."""
    ess: float
    """Harmonic mean over prompts: what enters the errors is 1 / ESS."""
    kl_se: float
    log_z_se: float
    """Of the mean of ``log_z``, root mean square: for P > 1 with its bias."""
    log_z_bias: float
    """By which ``log_z`` is too small on average, (1 / ESS - 1 / N) / 2."""


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points of the frontier; all [points] float64."""

    alpha: Tensor
    """Inverse temperature, 1 / reward; beta, or APA's and AWR's lambda, is 1 / alpha."""
    kl: Tensor
    """KL to the base, nats."""
    kl_se: Tensor
    """Standard error of ``kl`` at this alpha."""
    reward: Tensor
    """Highest expected reward at this KL; NaN where ``ess`` is under 10."""
    reward_se: Tensor
    """Standard error of ``reward`` at this KL."""
    low: Tensor
    """Lower end of the band."""
    high: Tensor
    """Upper end of the band."""
    ess: Tensor
    """Effective sample size per prompt."""


def frontier(
    rewards: Tensor,
    alphas: Tensor | Sequence[float] | None = None,
    kls: Tensor | Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
) -> Frontier:
    """KL and the highest reward at that KL, with bands, by the formulas of this module's docstring.

    Args:
        rewards: [N] of N samples of the base for one prompt (or a task without prompts), or [P, N]
            of N samples for each of P prompts; any float dtype, N > 10.
        alphas: points at these inverse temperatures, >= 0. kls: or points at these KLs, in nats.
        Neither: 100 alphas, denser near 0, from 0 to where ESS is 10, or, where 10 samples a
            prompt share the highest reward, to 99 % of the largest KL.
        confidence: of the band, pointwise.

    Raises:
        ValueError: rewards that are all equal, no more than 10 a prompt, or not finite; both
            ``alphas`` and ``kls``; a KL that no weighting of these samples has.
    """
    op = "frontier"
    rewards = as_prompts(op, "rewards", rewards)
    if alphas is not None and kls is not None:
        raise ValueError(f"{op}: expected alphas or kls, got both")
    if not 0 < confidence < 1:
        raise ValueError(f"{op}: expected a confidence between 0 and 1, got {confidence}")
    if kls is not None:
        chosen = alphas_for_kls(op, rewards, [number(op, "kl", kl, 0.0) for kl in _numbers(kls)])
    elif alphas is not None:
        chosen = [number(op, "alpha", alpha, 0.0) for alpha in _numbers(alphas)]
    else:
        last = largest_alpha(rewards)
        if math.isinf(last):
            last = alphas_for_kls(op, rewards, [0.99 * largest_kl(rewards)])[0]
        chosen = [last * (k / (POINTS - 1)) ** 2 for k in range(POINTS)]
    points = [reweight(rewards, alpha) for alpha in chosen]
    z = NormalDist().inv_cdf(0.5 + 0.5 * confidence)
    if len(rewards) > 1:
        z = student_t(len(rewards) - 1, confidence)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    # Rounding leaves the last default point a hair under 10.
    trusted = column([p.ess for p in points]) >= LEAST_ESS * (1 - 1e-9)
    reward = column([p.reward for p in points]).masked_fill(~trusted, math.nan)
    reward_se = column([reward_error(rewards, p) for p in points]).masked_fill(~trusted, math.nan)
    return Frontier(
        alpha=column(chosen),
        kl=column([p.kl for p in points]),
        kl_se=column([p.kl_se for p in points]),
        reward=reward,
        reward_se=reward_se,
        low=reward - z * reward_se,
        high=reward + z * reward_se,
        ess=column([p.ess for p in points]),
    )


def reweight(rewards: Tensor, alpha: float) -> Reweighted:
    """Everything at one finite alpha >= 0; ``rewards`` [P, N] float64."""
    prompts, total = rewards.shape
    top = rewards.amax(1, keepdim=True)
    gap = rewards - top
    weight = (alpha * gap).exp()
    mass = weight.sum(1, keepdim=True)
    share = weight / mass
    log_mean = (mass / total).log()
    mean = (share * gap).sum(1, keepdim=True)
    centred = gap - mean
    variance = float((share * centred.square()).sum(1).mean())
    inverse_ess = share.square().sum(1)
    log_z, kl = log_mean + alpha * top, alpha * mean - log_mean
    bias = 0.5 * max(0.0, float(inverse_ess.mean()) - 1.0 / total)
    if prompts > 1:
        kl_se = float(kl.std()) / math.sqrt(prompts)
        log_z_se = math.hypot(float(log_z.std()) / math.sqrt(prompts), bias)
    else:
        influence = alpha * total * share * centred - (total * share - 1.0)
        kl_se = float(influence.square().sum().sqrt()) / total
        log_z_se = math.sqrt(2.0 * bias)
    return Reweighted(
        alpha=alpha,
        log_z=log_z[:, 0],
        reward=float((mean + top).mean()),
        kl=max(0.0, float(kl.mean())),
        variance=variance,
        ess=1.0 / float(inverse_ess.mean()),
        kl_se=kl_se,
        log_z_se=log_z_se,
        log_z_bias=bias,
    )


def reward_error(rewards: Tensor, point: Reweighted) -> float:
    """Standard error of the frontier's reward at the point's KL."""
    prompts, total = rewards.shape
    if point.alpha > 0:
        return point.log_z_se / point.alpha
    # The limit: log Z / alpha is the mean reward.
    if prompts > 1:
        return float(rewards.mean(1).std()) / math.sqrt(prompts)
    return float(rewards.std()) / math.sqrt(total)


def _span(rewards: Tensor) -> float:
    return float((rewards.amax(1) - rewards.amin(1)).max())


def largest_alpha(rewards: Tensor) -> float:
    """Where the effective sample size falls to 10; inf where it never does."""
    best = rewards == rewards.amax(1, keepdim=True)
    if 1.0 / float((1.0 / best.sum(1)).mean()) >= LEAST_ESS:
        return math.inf
    span = _span(rewards)

    gap = (rewards - rewards.amax(1, keepdim=True)) / span

    def f(x: float) -> tuple[float, float]:
        share = (x * gap).softmax(1)
        squares = share.square()
        inverse = float(squares.sum(1).mean())
        centred = gap - (share * gap).sum(1, keepdim=True)
        return math.log(inverse), 2.0 * float((squares * centred).sum(1).mean()) / inverse

    return solve_increasing(f, -math.log(LEAST_ESS)) / span


def largest_kl(rewards: Tensor) -> float:
    """KL of always taking the best of these samples."""
    return -float((rewards == rewards.amax(1, keepdim=True)).double().mean(1).log().mean())


def alphas_for_kls(op: str, rewards: Tensor, kls: Sequence[float]) -> list[float]:
    """The alpha of each KL; ValueError for a KL that no weighting has."""
    largest, span = largest_kl(rewards), _span(rewards)

    def f(x: float) -> tuple[float, float]:
        at = reweight(rewards, x / span)
        return at.kl, x * at.variance / span**2

    found, start = [], 1.0
    for kl in kls:
        if not kl < largest:
            raise ValueError(
                f"{op}: expected a KL under {largest:.6g} nats, that of always taking the best of "
                f"these samples, got {kl}"
            )
        x = solve_increasing(f, kl, start) if kl > 0 else 0.0
        start = x or start
        found.append(x / span)
    return found


def as_prompts(op: str, name: str, rewards: Tensor) -> Tensor:
    """Rewards of the base's samples as [P, N] float64."""
    rewards = samples(op, name, rewards, (1, 2))
    rewards = rewards[None] if rewards.dim() == 1 else rewards
    if rewards.shape[1] <= LEAST_ESS:
        raise ValueError(
            f"{op}: expected more than {LEAST_ESS:.0f} samples a prompt, got {rewards.shape[1]}"
        )
    if bool((rewards == rewards[:, :1]).all()):
        raise ValueError(
            f"{op}: expected rewards that differ, got the same one for all samples of a prompt: "
            f"no policy can gain anything"
        )
    return rewards


def _numbers(values: Tensor | Sequence[float]) -> list[float]:
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1).tolist()
