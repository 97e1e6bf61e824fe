"""How wide an interval is that holds the truth as often as it says, from few prompts.

A mean over P prompts with the standard error se: mean +- t se, t from Student's distribution with
P - 1 degrees of freedom, since se itself is known from P values only. 1.96 is the t of many
prompts; at 20 of them it is 2.09, at 8 2.36, at 2 12.7.

A rate, which ends at 0 and 1: Wilson's interval, the rates p that the observed one is not further
from than z standard errors of p,

    (rate - p)^2 <= z^2 p (1 - p) / trials,

which has a width where all trials came out the same, and does not leave [0, 1].

Source: Abramowitz and Stegun, 26.7.5 (t as a series in 1 / degrees of freedom); E. B. Wilson,
"Probable inference, the law of succession, and statistical inference", 1927. Tests:
tests/test_theory_interval.py.
"""

from __future__ import annotations

import math
from statistics import NormalDist


def student_t(degrees: int, confidence: float = 0.95) -> float:
    """The t with P(|T| <= t) = ``confidence``; to 1 % up to a confidence of 0.99.

    Args:
        degrees: of freedom, >= 1; P - 1 for a mean over P values.
    """
    if degrees == 1:
        return math.tan(0.5 * math.pi * confidence)
    if degrees == 2:
        return confidence * math.sqrt(2.0 / (1.0 - confidence**2))
    z = NormalDist().inv_cdf(0.5 + 0.5 * confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**k for k, term in enumerate(terms, 1))


def wilson(rate: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper end of Wilson's interval for a rate.

    Args:
        rate: observed, in [0, 1].
        trials: independent ones that it is the mean of, > 0; rate (1 - rate) / se^2 where a
            standard error is known.
    """
    share = NormalDist().inv_cdf(0.5 + 0.5 * confidence) ** 2 / trials
    middle = (rate + 0.5 * share) / (1 + share)
    half = math.sqrt(share * (rate * (1 - rate) + 0.25 * share)) / (1 + share)
    return max(0.0, middle - half), min(1.0, middle + half)
