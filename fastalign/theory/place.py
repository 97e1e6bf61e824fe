"""A policy beside the frontier, from its mean KL and its mean reward alone.

The frontier's reward at a KL is the least, over alpha, of the lines

    reward(alpha) + (KL - KL(alpha)) / alpha,

tangents to it, of which a curve has one for each point. Between two points of a default curve the
least of them is too high by at most about a thousandth of what the whole curve gains. The error of
alpha does not count, so that, with errors of frontier, KL and reward that are independent,

    se(regret)^2 = se(frontier's reward)^2 + (what se(KL) changes)^2 + se(reward)^2.

What se(KL) changes is se(KL) / alpha where the frontier is straight within that error. Near a KL of
0 it is not, and rises upright at 0 itself: so it is the most that the frontier's reward changes
from the KL to the KL +- se(KL).

Where the policy answered the prompts of the curve, and where its reward is high for the prompts
that have a high KL, this is too large rather than too small.

Past the end of the curve its samples say nothing of the frontier itself, but the frontier rises and
is concave: it is between the reward at the end and the tangent there.

Source: arXiv 2404.01730, Lemma 1, and duality. Tests: tests/test_theory_place.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.theory.checks import number
from fastalign.theory.frontier import Frontier


@dataclass(frozen=True)
class Placed:
    """Where a policy stands; regrets in units of the reward."""

    regret: float
    """The frontier's reward at the policy's KL minus the policy's; NaN past the curve's end."""
    se: float
    at_least: float
    """The regret, and past the curve's end the least that it can be."""
    at_least_se: float
    at_most: float
    """The regret, and past the curve's end the most that it can be."""
    at_most_se: float
    frontier_reward: float
    """At the policy's KL; NaN past the curve's end."""
    alpha: float
    """Of the tilt with that KL, or of the curve's end; 0 where the policy has no KL."""
    is_past_end: bool


def place(
    curve: Frontier, kl: float, reward: float, *, kl_se: float = 0.0, reward_se: float = 0.0
) -> Placed:
    """The reward that a policy misses at its own KL, by the formulas above.

    Args:
        curve: as ``frontier(rewards)`` gives it: from KL 0 on, alphas ascending.
        kl: of the policy to the base, nats per response, mean over prompts. An estimate under 0
            (k1 may be) counts as 0.
        reward: mean reward of the policy over the prompts.
        kl_se, reward_se: their standard errors, >= 0.

    Raises:
        ValueError: numbers that are not finite, or a curve without trusted points.
    """
    op = "place"
    kl, reward = max(0.0, number(op, "kl", kl)), number(op, "reward", reward)
    kl_se, reward_se = number(op, "kl_se", kl_se, 0.0), number(op, "reward_se", reward_se, 0.0)
    trusted = curve.reward.isfinite()
    if not bool(trusted.any()):
        raise ValueError(f"{op}: expected a curve with points, got none with a finite reward")
    alpha, kls = curve.alpha[trusted], curve.kl[trusted]
    rewards, errors = curve.reward[trusted], curve.reward_se[trusted]

    def tangents(at: float) -> Tensor:
        gap = at - kls
        # The tangent at alpha = 0 is upright: it bounds a KL of 0 and nothing else.
        lines = torch.where(gap == 0, rewards, rewards + gap / alpha)
        return lines.masked_fill((alpha == 0) & (gap != 0), math.inf)

    lines = tangents(kl)
    best = int(lines.argmin())
    top = float(lines[best])
    near = [float(tangents(at).min()) for at in (max(0.0, kl - kl_se), kl + kl_se)]
    by_kl = max(abs(other - top) for other in near)
    at_most = top - reward
    se = math.hypot(float(errors[best]), by_kl, reward_se)
    is_past_end = kl > float(kls[-1]) * (1 + 1e-9)
    at_least, at_least_se = at_most, se
    if is_past_end:
        at_least = float(rewards[-1]) - reward
        at_least_se = math.hypot(float(errors[-1]), reward_se)
    return Placed(
        regret=math.nan if is_past_end else at_most,
        se=math.nan if is_past_end else se,
        at_least=at_least,
        at_least_se=at_least_se,
        at_most=at_most,
        at_most_se=se,
        frontier_reward=math.nan if is_past_end else top,
        alpha=float(alpha[best]),
        is_past_end=is_past_end,
    )
