"""Divergences between two distributions over a small alphabet, exact, in nats.

    KL(p || q)      = sum_y p(y) log(p(y) / q(y))
    H_t(p || q)     = 1 / (1 - t) log sum_y p(y) q(y)^(t-1)         Renyi cross entropy of order t
    H_1(p || q)     = -sum_y p(y) log q(y)                          its limit, the cross entropy
    E_rho(p, r)     = 1 / rho log sum_y p(y) e^(rho r(y))           scaled cumulant; E_0 is the mean
    E_rho(p, log q) = -H_(1+rho)(p || q)

Source: arXiv 2404.01730, Definition 5 and Lemma 3. Tests: tests/test_theory_tilt.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.theory.checks import distribution, on_support, same_length


def kl_divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats; inf where p has mass that q has not.

    A tilt may underflow to 0 where another policy has mass: ``kl_to_tilt`` has the KL all the same.

    Args:
        p: [K] float64, a distribution; zeros are allowed.
        q: the same.

    Raises:
        ValueError: not distributions, or of different length.
    """
    op = "kl_divergence"
    p, q = distribution(op, "p", p), distribution(op, "q", q)
    same_length(op, "q", q, p)
    kept = p > 0
    p, q = p[kept], q[kept]
    return max(0.0, float((p * (p.log() - q.log())).sum()))


def renyi_cross_entropy(p: Tensor, q: Tensor, order: float) -> float:
    """H_t(p || q) in nats, by the formula in this module's docstring, for any real order t.

    Order 1 is the cross entropy, order inf is -log of the largest q(y) where p has mass, order -inf
    -log of the smallest. inf where p has mass that q has not, for orders <= 1.

    Args:
        p, q: [K] float64, distributions; zeros are allowed.

    Raises:
        ValueError: not distributions, of different length, or an order that is NaN.
    """
    op = "renyi_cross_entropy"
    p, q = distribution(op, "p", p), distribution(op, "q", q)
    same_length(op, "q", q, p)
    rho = float(order) - 1.0
    if math.isnan(rho):
        raise ValueError(f"{op}: expected a number as order, got {order}")
    shared = (p > 0) & (q > 0)
    if not torch.equal(shared, p > 0):
        if rho <= 0 or not shared.any():
            return math.inf
        mass = float(p[shared].sum())
        return -math.log(mass) / rho - _scaled_cumulant(p[shared] / mass, q[shared].log(), rho)
    return -_scaled_cumulant(p[shared], q[shared].log(), rho)


def scaled_cumulant(p: Tensor, reward: Tensor, rho: float) -> float:
    """1 / rho log E_p[e^(rho r)], in units of the reward: its mean at 0, max and min at +-inf.

    Args:
        p: [K] float64, a distribution.
        reward: [K], finite where p has mass.
        rho: any real number, or +-inf.

    Raises:
        ValueError: inputs that are not as above.
    """
    op = "scaled_cumulant"
    p = distribution(op, "p", p)
    reward = on_support(op, "reward", reward, p)
    if math.isnan(rho):
        raise ValueError(f"{op}: expected a number as rho, got {rho}")
    return _scaled_cumulant(p[p > 0], reward[p > 0], float(rho))


def _scaled_cumulant(p: Tensor, reward: Tensor, rho: float) -> float:
    if math.isinf(rho):
        return float(reward.max() if rho > 0 else reward.min())
    mean = (p * reward).sum()
    if rho == 0:
        return float(mean)
    y = rho * (reward - mean)
    if float(y.max()) < 1.0:  # log of a sum near 1: log(1 + small) keeps the digits of the small
        log_mean = torch.log1p((p * torch.expm1(y)).sum())
    else:
        log_mean = torch.logsumexp(p.log() + y, 0)
    return float(mean + log_mean / rho)
