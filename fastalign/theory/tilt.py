"""Exponential tilting: the most reward that any policy can have at a given KL to the base.

    T_alpha(y) = base(y) e^(alpha r(y)) / Z,      Z = sum_y base(y) e^(alpha r(y))

Among all policies with KL(policy || base) <= kl the one with the highest expected reward is
T_alpha, with the alpha at which KL(T_alpha || base) = kl. It also maximises E r - KL / alpha: it is
what KL-regularised training with beta = 1 / alpha aims at (PPO, DPO; APA and AWR with
lambda = 1 / alpha). For every policy psi and every alpha

    KL(psi || T_alpha) = KL(psi || base) - KL(T_alpha || base) + alpha (E_T r - E_psi r),

so that a policy's regret, the reward it misses at its own KL, is KL(psi || T_alpha) / alpha.

Everything is float64; what is small is kept as logarithms. KL in nats, alpha in 1 / reward.

Source: arXiv 2404.01730, Definition 2, Lemma 1 (the optimum), Lemma 2 (the identity), Lemma 10
(tilts add up). There r = log q of an "alignment distribution" q; here it is any reward. Tests:
tests/test_theory_tilt.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.theory.checks import distribution, number, on_support, same_length
from fastalign.theory.divergence import kl_divergence
from fastalign.theory.solve import solve_increasing


class Tilted(NamedTuple):
    """A tilt and what follows from it, over the symbols that the base has."""

    log_p: Tensor
    """[S] log T_alpha."""
    log_ratio: Tensor
    """[S] log(T_alpha / base)."""
    kl: float
    reward: float
    variance: float
    """Of the reward under T_alpha: the slope of its mean in alpha; the KL's is alpha times it."""


def tilted(log_base: Tensor, reward: Tensor, alpha: float) -> Tilted:
    """T_alpha in logarithms; ``log_base`` [S] finite, ``reward`` [S], alpha any number or +-inf."""
    # Only differences of rewards count: they have digits that rewards far from 0 have not.
    end = reward.max() if alpha >= 0 else reward.min()
    gap = reward - end
    # inf * 0 is NaN: at alpha = inf the best symbols keep their mass, the others lose it.
    shift = torch.where(gap == 0, 0.0, alpha * gap)
    below = (log_base.exp() * torch.expm1(shift)).sum()
    # Near alpha = 0, Z is 1 plus something small, whose digits log(1 + small) keeps.
    log_z = torch.log1p(below) if below > -0.5 else torch.logsumexp(log_base + shift, 0)
    log_ratio = shift - log_z
    log_p = log_base + log_ratio
    p = log_p.exp()
    kl = float(torch.where(p > 0, p * log_ratio, 0.0).sum())
    mean = (p * gap).sum()
    variance = float((p * (gap - mean).square()).sum())
    return Tilted(log_p, log_ratio, max(0.0, kl), float(end + mean), variance)


def _inputs(op: str, base: Tensor, reward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(support [K], log base [S], reward [S])."""
    base = distribution(op, "base", base)
    reward = on_support(op, "reward", reward, base)
    kept = base > 0
    return kept, base[kept].log(), reward[kept]


def tilt(base: Tensor, reward: Tensor, alpha: float) -> Tensor:
    """T_alpha [K] float64: base(y) e^(alpha r(y)) / Z.

    Args:
        base: [K] float64, a distribution; where it is 0, so is the tilt.
        reward: [K], any float dtype, finite where the base has mass.
        alpha: any real number; +-inf is the limit: the base on the symbols of the highest (lowest)
            reward.

    Raises:
        ValueError: inputs that are not as above.
    """
    op = "tilt"
    if math.isnan(alpha):
        raise ValueError(f"{op}: expected a number as alpha, got {alpha}")
    kept, log_base, values = _inputs(op, base, reward)
    out = torch.zeros_like(base)
    out[kept] = tilted(log_base, values, float(alpha)).log_p.exp()
    return out


def alpha_for_kl(base: Tensor, reward: Tensor, kl: float) -> float:
    """The alpha >= 0 at which KL(T_alpha || base) = ``kl`` nats.

    The KL grows from 0 to log(1 / base mass of the highest reward), at alpha = inf.

    Args:
        base, reward: [K], as for ``tilt``.
        kl: nats, >= 0.

    Raises:
        ValueError: a KL that no tilt has (the largest one is named), or inputs not as for ``tilt``.
    """
    op = "alpha_for_kl"
    _, log_base, values = _inputs(op, base, reward)
    kl = number(op, "kl", kl, 0.0)
    largest = largest_kl(log_base, values)
    if kl > largest + 1e-12:
        raise ValueError(
            f"{op}: expected a KL of at most {largest:.12g} nats, that of the base "
            f"restricted to the highest reward, got {kl}"
        )
    if kl == 0:
        return 0.0
    if kl >= largest:
        return math.inf
    span = float(values.max() - values.min())
    unit = (values - values.max()) / span

    def f(x: float) -> tuple[float, float]:
        at = tilted(log_base, unit, x)
        return at.kl, x * at.variance

    return solve_increasing(f, kl) / span


def largest_kl(log_base: Tensor, reward: Tensor) -> float:
    """KL(T_inf || base): -log of the base's mass at the highest reward."""
    return max(0.0, -float(torch.logsumexp(log_base[reward == reward.max()], 0)))


def alpha_for_reward(base: Tensor, reward: Tensor, value: float) -> float:
    """The alpha, of any sign, at which the expected reward under T_alpha is ``value``.

    +-inf when ``value`` is the highest or lowest reward that the base can have.

    Args:
        base, reward: [K], as for ``tilt``.
        value: in units of the reward.

    Raises:
        ValueError: a value outside of the rewards' range, or inputs not as for ``tilt``.
    """
    op = "alpha_for_reward"
    _, log_base, values = _inputs(op, base, reward)
    value = number(op, "value", value)
    low, high = float(values.min()), float(values.max())
    if not low <= value <= high:
        raise ValueError(f"{op}: expected a value in [{low:.12g}, {high:.12g}], got {value}")
    mean = tilted(log_base, values, 0.0).reward
    if value == mean:
        return 0.0
    sign = 1.0 if value > mean else -1.0
    if value in (low, high):
        return sign * math.inf
    unit = sign * (values - mean) / (high - low)

    def f(x: float) -> tuple[float, float]:
        at = tilted(log_base, unit, x)
        return at.reward, at.variance

    return sign * solve_increasing(f, sign * (value - mean) / (high - low)) / (high - low)


def kl_to_tilt(policy: Tensor, base: Tensor, reward: Tensor, alpha: float) -> float:
    """KL(policy || T_alpha) in nats by the right side of the identity above.

    Only the policy's KL to the base and its expected reward enter, so that it can be told of a
    policy that is known by these two; equal to ``kl_divergence(policy, tilt(...))`` to rounding.

    Args:
        policy: [K] float64, a distribution.
        base, reward: [K], as for ``tilt``.
        alpha: finite.

    Raises:
        ValueError: inputs that are not as above.
    """
    op = "kl_to_tilt"
    _, log_base, values = _inputs(op, base, reward)
    values = values - values.max()
    at = tilted(log_base, values, number(op, "alpha", alpha))
    same_length(op, "policy", distribution(op, "policy", policy), base)
    kl = kl_divergence(policy, base)
    if math.isinf(kl):
        return kl
    return kl - at.kl + alpha * (at.reward - float((policy[base > 0] * values).sum()))


class Regret(NamedTuple):
    """How far a policy is from the best one of its KL."""

    regret: float
    """In units of the reward, >= 0 but for rounding: the frontier's reward minus the policy's."""
    kl: float
    """KL(policy || base), nats."""
    reward: float
    """Expected reward of the policy."""
    frontier_reward: float
    """The highest expected reward of all policies with that KL."""
    alpha: float
    """Of the tilt with that KL; inf when the KL is enough for the highest reward."""


def regret(policy: Tensor, base: Tensor, reward: Tensor) -> Regret:
    """The reward that ``policy`` misses at its own KL to the base: KL(policy || T_alpha) / alpha.

    Args:
        policy: [K] float64, a distribution, 0 where the base is.
        base, reward: [K], as for ``tilt``.

    Raises:
        ValueError: inputs that are not as above.
    """
    op = "regret"
    _, log_base, values = _inputs(op, base, reward)
    same_length(op, "policy", distribution(op, "policy", policy), base)
    kl = kl_divergence(policy, base)
    if math.isinf(kl):
        raise ValueError(f"{op}: expected a policy without mass where the base has none")
    most = largest_kl(log_base, values)
    alpha = alpha_for_kl(base, reward, kl) if kl < most else math.inf
    top = values.max()
    best = tilted(log_base, values - top, alpha).reward
    own = float((policy[base > 0] * (values - top)).sum())
    return Regret(best - own, kl, float(top) + own, float(top) + best, alpha)
