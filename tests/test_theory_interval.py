"""Intervals from few prompts: tabulated values of t, Wilson's interval by hand, coverage."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.commands.evaluate import win_rate
from fastalign.theory import frontier
from fastalign.theory.interval import student_t, wilson


@pytest.mark.parametrize(
    "degrees, t95, t99",
    [
        (1, 12.706205, 63.656741),
        (2, 4.302653, 9.924843),
        (3, 3.182446, 5.840909),
        (4, 2.776445, 4.604095),
        (7, 2.364624, 3.499483),
        (19, 2.093024, 2.860935),
        (10**6, 1.959966, 2.575834),
    ],
)
def test_t_as_in_tables(degrees: int, t95: float, t99: float) -> None:
    assert student_t(degrees) == pytest.approx(t95, rel=2e-3)
    assert student_t(degrees, 0.99) == pytest.approx(t99, rel=1e-2)
    if degrees != 3:  # the series' last term counts least there
        assert student_t(degrees) == pytest.approx(t95, rel=4e-4)


def test_wilson_by_hand() -> None:
    """10 of 10: p^10 terms aside, the lower end is 10 / (10 + z^2); 0 of 10 is its mirror image. An
    end p has (rate - p)^2 = z^2 p (1 - p) / trials."""
    z2 = 1.959963985**2
    assert wilson(1.0, 10) == pytest.approx((10 / (10 + z2), 1.0))
    assert wilson(0.0, 10) == pytest.approx((0.0, z2 / (10 + z2)))
    for p in wilson(0.3, 40):
        assert (0.3 - p) ** 2 == pytest.approx(z2 * p * (1 - p) / 40)


def test_frontier_of_few_prompts_has_a_wider_band() -> None:
    """Three prompts, 2 degrees of freedom: 4.30 standard errors to each side. In 300 data sets with
    N(t, 1), t ~ N(0, 1), the band holds sqrt(2 KL) in 95 %; 1.96 would in 81 %."""
    found = [
        frontier(torch.randn(3, 1) + torch.randn(3, 200).double(), kls=[0.3]) for _ in range(300)
    ]
    one = found[0]
    assert float((one.high - one.reward) / one.reward_se) == pytest.approx(4.302653, rel=1e-6)
    covered = sum(float(f.low) <= math.sqrt(0.6) <= float(f.high) for f in found) / 300
    assert 0.915 < covered < 0.985


def test_win_rate_of_one_sided_pairs() -> None:
    """All of 20 pairs won: the rate may be 0.84, and is not known to be 1. Of 20 prompts where the
    truth is 0.9615, N(2.5, 1) against N(0, 1), the interval holds it in 95 %; the normal one would
    in 56 %."""
    ones, zeros = torch.ones(20), torch.zeros(20)
    found = win_rate(ones, zeros, 1)
    assert (found["rate"], found["high"], found["stderr"]) == (1.0, 1.0, 0.0)
    assert found["low"] == pytest.approx(20 / (20 + 1.959963985**2))
    truth = 0.5 * (1 + math.erf(2.5 / 2))
    inside = 0
    for _ in range(300):
        rate = win_rate(2.5 + torch.randn(20), torch.randn(20), 1)
        assert rate["low"] is not None and rate["high"] is not None
        inside += rate["low"] <= truth <= rate["high"]
    assert 0.92 < inside / 300 < 0.995
