"""How improbable it is that an aligned source's reward per letter is far from its mean.

For strings of m letters from the tilt phi = T_alpha of a memoryless base, with the reward log q of
an alignment distribution q, the surprise per letter -(1 / m) log q(Y^m) obeys a large deviation
principle with the rate

    J(t) = KL(T_beta || phi),      beta such that      H(T_beta || q) = -E_{T_beta}[log q] = t:

P(surprise near t) = e^(-m J(t) + o(m)). J is 0 at t = H(phi || q) and grows to both sides; alpha =
0 gives the base itself.

Source: arXiv 2404.01730, Theorem 1 (tilt), Theorem 3 (base). Tests: tests/test_theory_rate.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.theory.checks import distribution, number, on_support
from fastalign.theory.tilt import alpha_for_reward, tilted


def rate(t: float, base: Tensor, align: Tensor, alpha: float) -> float:
    """J(t) in nats per letter, by the formula in this module's docstring.

    Args:
        t: nats per letter; inf is the answer outside of [-log max q, -log min q], over the letters
            that the base has.
        base: [K] float64, a distribution.
        align: [K] float64, a distribution, positive where the base is: q, with reward log q.
        alpha: of the tilt the strings are drawn from, finite.

    Raises:
        ValueError: inputs that are not as above.
    """
    op = "rate"
    base, align = distribution(op, "base", base), distribution(op, "align", align)
    reward = on_support(op, "log align", align.log(), base)
    t, alpha = number(op, "t", t), number(op, "alpha", alpha)
    kept = base > 0
    log_base, values = base[kept].log(), reward[kept]
    if not float(values.min()) <= -t <= float(values.max()):
        return math.inf
    at = tilted(log_base, values, alpha_for_reward(base, reward, -t))
    drawn = tilted(log_base, values, alpha)
    p = at.log_p.exp()
    return max(0.0, float(torch.where(p > 0, p * (at.log_p - drawn.log_p), 0.0).sum()))
