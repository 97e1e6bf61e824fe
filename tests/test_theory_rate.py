"""The large deviation rate: vectors, the Cramer transform, and what a finite source does."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.theory import Memoryless, alpha_for_kl, alpha_for_reward, rate, tilt

BASE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
ALIGN = torch.tensor([6, 1, 2], dtype=torch.float64) / 9
REWARD = ALIGN.log()
ALPHA = alpha_for_kl(BASE, REWARD, 0.11)


@pytest.mark.parametrize(
    "t, want",
    [
        (0.5, 0.632101873909),
        (0.9, 0.095300187689),
        (1.0, 0.040380446860),
        (1.3, 0.013523654709),
        (2.0, 0.915626696790),
    ],
)
def test_vectors(t: float, want: float) -> None:
    """J(t) = KL(T_beta || phi) with H(T_beta || q) = t, arXiv 2404.01730, Theorem 1, at the phi of
    KL 0.11; and the same number as Cramer's transform sup_s (s t - log E_phi e^(-s log q)).
    """
    got = rate(t, BASE, ALIGN, ALPHA)
    assert got == pytest.approx(want, abs=1e-9)
    phi = tilt(BASE, REWARD, ALPHA)
    s = ALPHA - alpha_for_reward(BASE, REWARD, -t)  # the supremum is where the tilted mean is t
    cramer = s * t - float((phi * (-s * REWARD).exp()).sum().log())
    assert got == pytest.approx(cramer, abs=1e-12)


def test_beta_of_the_vectors() -> None:
    assert alpha_for_reward(BASE, REWARD, -0.5) == pytest.approx(3.087412270, abs=1e-9)
    assert alpha_for_reward(BASE, REWARD, -1.3) == pytest.approx(0.462525468, abs=1e-9)


def test_zero_at_the_mean_and_inf_outside() -> None:
    """At the ends only one letter is left: J = -log phi of it. alpha = 0 is the base itself."""
    phi = tilt(BASE, REWARD, ALPHA)
    assert rate(float(-(phi * REWARD).sum()), BASE, ALIGN, ALPHA) == pytest.approx(0, abs=1e-15)
    assert rate(float(-(BASE * REWARD).sum()), BASE, ALIGN, 0.0) == pytest.approx(0, abs=1e-15)
    ends = {float(-REWARD[0]): phi[0], float(-REWARD[1]): phi[1]}
    for t, p in ends.items():
        assert rate(t, BASE, ALIGN, ALPHA) == pytest.approx(-math.log(float(p)), abs=1e-12)
    assert rate(float(-REWARD[0]) - 1e-9, BASE, ALIGN, ALPHA) == math.inf
    assert rate(float(-REWARD[1]) + 1e-9, BASE, ALIGN, ALPHA) == math.inf


@pytest.mark.parametrize("t", [0.9, 1.0, 1.5])
def test_is_the_exponent_of_a_finite_source(t: float) -> None:
    """-(1 / m) log P(surprise beyond t) falls to J(t), by about log(m) / m."""
    mean = float(-(tilt(BASE, REWARD, ALPHA) * REWARD).sum())
    gaps = []
    for m in (80, 320):
        source = Memoryless(BASE, REWARD, m)
        surprise = -source.rewards / m
        beyond = surprise <= t if t < mean else surprise >= t
        log_p = float(torch.logsumexp(source.tilt(ALPHA).log_p[beyond], 0))
        gaps.append(-log_p / m - rate(t, BASE, ALIGN, ALPHA))
    assert 0 < gaps[1] < math.log(320) / 320 and gaps[1] < 0.5 * gaps[0]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="rate: expected log align to be finite.*got -inf at 1"):
        rate(1.0, BASE, torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64), ALPHA)
    with pytest.raises(ValueError, match="rate: expected a finite t, got nan"):
        rate(math.nan, BASE, ALIGN, ALPHA)
    with pytest.raises(ValueError, match="rate: expected align to sum to 1"):
        rate(1.0, BASE, 2 * ALIGN, ALPHA)
