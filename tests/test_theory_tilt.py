"""Tilting and divergences: vectors, identities that hold for every policy, limits, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.theory import (
    alpha_for_kl,
    alpha_for_reward,
    kl_divergence,
    kl_to_tilt,
    regret,
    renyi_cross_entropy,
    scaled_cumulant,
    tilt,
)

EXACT = 1e-9


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_distribution(size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64).softmax(0)


# The ternary example of arXiv 2404.01730: p, and q as reward log q.
BASE = vector(0.2, 0.3, 0.5)
ALIGN = vector(6, 1, 2) / 9
LOG_ALIGN = ALIGN.log()


def test_ternary_example() -> None:
    """T = p q^alpha / Z (Lemma 1) with the alpha at which KL(T || p) = 0.11 nats; H(T || q) is
    -E_T log q (Definition 2).
    """
    alpha = alpha_for_kl(BASE, LOG_ALIGN, 0.11)
    phi = tilt(BASE, LOG_ALIGN, alpha)
    assert alpha == pytest.approx(0.709138084546, abs=EXACT)
    want = vector(0.389396494842, 0.163933084234, 0.446670420924)
    assert float((phi - want).abs().max()) < EXACT
    assert kl_divergence(phi, BASE) == pytest.approx(0.11, abs=1e-14)
    assert renyi_cross_entropy(phi, ALIGN, 1.0) == pytest.approx(1.189911377516, abs=EXACT)
    assert renyi_cross_entropy(BASE, ALIGN, 1.0) == pytest.approx(1.492299093211, abs=EXACT)


@pytest.mark.parametrize(
    "order, want", [(0.5, 1.300731601510), (2.0, 0.975317685897), (3.0, 0.811903394483)]
)
def test_renyi_cross_entropy_of_the_ternary_example(order: float, want: float) -> None:
    """H_t(phi || q) = 1 / (1 - t) log sum phi q^(t - 1), Definition 5, and Lemma 3: the scaled
    cumulant of the reward log q at rho = t - 1 is -H_t.
    """
    phi = tilt(BASE, LOG_ALIGN, alpha_for_kl(BASE, LOG_ALIGN, 0.11))
    assert renyi_cross_entropy(phi, ALIGN, order) == pytest.approx(want, abs=EXACT)
    assert scaled_cumulant(phi, LOG_ALIGN, order - 1.0) == pytest.approx(-want, abs=EXACT)


def test_kl_regularised_optimum() -> None:
    """base e^(r / beta) / Z for base (.5, .3, .2), r = (0, 1, 2); at beta = 1
    Z = .5 + .3 e + .2 e^2 = 2.79329579..; E r - beta KL = beta log Z.
    """
    base, reward = vector(0.5, 0.3, 0.2), vector(0, 1, 2)
    pi = tilt(base, reward, 1.0)
    want = vector(0.179000021, 0.291943502, 0.529056477)
    assert float((pi - want).abs().max()) < 1e-9
    kl, mean = kl_divergence(pi, base), float(pi @ reward)
    assert kl == pytest.approx(0.322834279, abs=1e-9)
    assert mean == pytest.approx(1.350056457, abs=1e-9)
    log_z = math.log(0.5 + 0.3 * math.e + 0.2 * math.e**2)
    assert log_z == pytest.approx(1.027222178, abs=1e-9)
    assert mean - kl == pytest.approx(log_z, abs=1e-14)
    half = tilt(base, reward, 0.5)
    assert kl_divergence(half, base) == pytest.approx(0.083529866, abs=1e-9)
    assert float(half @ reward) == pytest.approx(1.028380120, abs=1e-9)


def test_gaussian_tilt() -> None:
    """The tilt of N(0, 1) by e^(alpha x) is N(alpha, 1): KL alpha^2 / 2, so the mean at KL D is
    sqrt(2 D). On cells of width h the KL is off by O(h^2).
    """
    edges = torch.arange(-90_000, 90_001, dtype=torch.float64) * 1e-4
    base = torch.special.ndtr(edges).diff()
    middle = 0.5 * (edges[1:] + edges[:-1])
    for kl in (0.02, 0.5, 2.0):
        pi = tilt(base, middle, alpha_for_kl(base, middle, kl))
        assert float(pi @ middle) == pytest.approx(math.sqrt(2 * kl), abs=2e-9)


def test_best_at_its_kl() -> None:
    """No policy of the same KL has more reward (Lemma 1): random ones, moved to that KL."""
    base, reward = random_distribution(7), torch.randn(7).double()
    for _ in range(50):
        policy = (base.log() + torch.randn(7)).softmax(0)
        found = regret(policy, base, reward)
        assert found.regret > 0
        best = tilt(base, reward, found.alpha)
        assert kl_divergence(best, base) == pytest.approx(kl_divergence(policy, base), abs=1e-12)
        assert found.frontier_reward == pytest.approx(float(best @ reward), abs=1e-12)
        assert found.reward == pytest.approx(float(policy @ reward), abs=1e-12)
        assert found.regret == pytest.approx(kl_divergence(policy, best) / found.alpha, abs=1e-12)


def test_identity_of_lemma_2() -> None:
    """KL(psi || phi) = KL(psi || p) - KL(phi || p) + alpha (E_phi r - E_psi r) for every psi."""
    for _ in range(20):
        base, policy = random_distribution(5), random_distribution(5)
        reward, alpha = 3.0 * torch.randn(5).double(), 4.0 * float(torch.randn(()))
        direct = kl_divergence(policy, tilt(base, reward, alpha))
        assert kl_to_tilt(policy, base, reward, alpha) == pytest.approx(direct, rel=1e-12)
    assert kl_to_tilt(vector(0.5, 0.5), vector(1, 0), vector(1, 2), 1.0) == math.inf


def test_tilts_add_up() -> None:
    """T(T(p, a), b) = T(p, a + b), Lemma 10; an offset of the reward changes nothing."""
    base, reward = random_distribution(6), torch.randn(6).double()
    twice = tilt(tilt(base, reward, 0.7), reward, -2.0)
    assert float((twice - tilt(base, reward, -1.3)).abs().max()) < 1e-15
    assert float((tilt(base, reward, 0.0) - base).abs().max()) < 1e-15
    shifted = tilt(base, reward + 2.0**20, 0.7)
    assert float((shifted - tilt(base, reward, 0.7)).abs().max()) < 1e-9


def test_limits_of_alpha() -> None:
    """At +-inf the base on the symbols of the highest (lowest) reward; no overflow before that."""
    base, reward = vector(0.1, 0.2, 0.3, 0.4, 0), vector(2, 2, -1, 0, 99)
    top = vector(1 / 3, 2 / 3, 0, 0, 0)
    for alpha in (math.inf, 1e300, 1e4):
        assert float((tilt(base, reward, alpha) - top).abs().max()) < 1e-15
    assert tilt(base, reward, -math.inf).tolist() == [0, 0, 1, 0, 0]
    assert alpha_for_kl(base, reward, -math.log(0.3)) == math.inf
    near = alpha_for_kl(base, reward, -math.log(0.3) - 1e-9)
    assert 10 < near < 20
    assert kl_divergence(tilt(base, reward, near), base) == pytest.approx(-math.log(0.3) - 1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("kl", [0.0, 1e-12, 1e-6, 0.3, 1.6])
def test_alpha_for_kl_over_magnitudes(kl: float, scale: float) -> None:
    """alpha has the inverse unit of the reward; a tiny KL is alpha^2 var / 2."""
    base, reward = vector(0.5, 0.3, 0.2), scale * vector(0, 1, 3)
    alpha = alpha_for_kl(base, reward, kl) * scale
    if kl <= 1e-6:
        variance = 0.3 * 1 + 0.2 * 9 - 0.9**2
        assert alpha == pytest.approx(math.sqrt(2 * kl / variance), rel=3 * math.sqrt(kl))
    else:
        assert kl_divergence(tilt(base, reward, alpha / scale), base) == pytest.approx(kl)


def test_alpha_for_reward() -> None:
    reward = vector(-3, 0.5, 2)
    mean = float(BASE @ reward)
    for value in (-2.9, -1.0, mean - 1e-9, 1.0, 1.99):
        alpha = alpha_for_reward(BASE, reward, value)
        assert (alpha > 0) == (value > mean)
        assert float(tilt(BASE, reward, alpha) @ reward) == pytest.approx(value, abs=1e-12)
    assert alpha_for_reward(BASE, reward, 2.0) == math.inf
    assert alpha_for_reward(BASE, reward, -3.0) == -math.inf
    assert alpha_for_reward(vector(1), vector(5), 5.0) == 0.0


def test_symbols_without_mass_and_one_symbol() -> None:
    """Where the base is 0 the reward is never used, not even -inf."""
    base, reward = vector(0.4, 0, 0.6), vector(1, -math.inf, 2)
    assert (
        float((tilt(base, reward, 1.5)[::2] - tilt(base[::2], reward[::2], 1.5)).abs().max()) == 0
    )
    assert tilt(base, reward, 1.5)[1] == 0
    assert tilt(vector(1), vector(3), 9.0).tolist() == [1.0]
    assert alpha_for_kl(vector(1), vector(3), 0.0) == 0.0
    assert kl_divergence(vector(1, 0), vector(0.25, 0.75)) == pytest.approx(math.log(4))
    assert kl_divergence(vector(0.5, 0.5), vector(1, 0)) == math.inf


def test_renyi_at_the_edges() -> None:
    """Order 1 is a limit, +-inf are the extremes of -log q, and q may lack symbols that p has."""
    p, q = random_distribution(6), random_distribution(6)
    order_1 = float(-(p * q.log()).sum())
    assert renyi_cross_entropy(p, q, 1.0) == pytest.approx(order_1, abs=1e-14)
    assert renyi_cross_entropy(p, q, 1 + 1e-9) == pytest.approx(order_1, abs=1e-8)
    assert renyi_cross_entropy(p, q, math.inf) == -math.log(float(q.max()))
    assert renyi_cross_entropy(p, q, -math.inf) == -math.log(float(q.min()))
    assert renyi_cross_entropy(p, q, 1e6) == pytest.approx(-math.log(float(q.max())), abs=1e-5)
    # sum p q^2 = .3 * .25 + .3 * .25: H_3 = -1/2 log .15; and at orders <= 1 the missing one
    # counts.
    p, q = vector(0.4, 0.3, 0.3), vector(0, 0.5, 0.5)
    assert renyi_cross_entropy(p, q, 3.0) == pytest.approx(-0.5 * math.log(0.15), abs=1e-15)
    assert renyi_cross_entropy(p, q, 1.0) == renyi_cross_entropy(p, q, 0.5) == math.inf
    assert renyi_cross_entropy(vector(1, 0), vector(0, 1), 2.0) == math.inf


def test_scaled_cumulant() -> None:
    """log E e^(rho r) / rho: between min and max, growing with rho, the mean at 0."""
    p, reward = random_distribution(6), 5.0 * torch.randn(6).double()
    grid = [-math.inf, -50.0, -1.0, -1e-7, 0.0, 1e-7, 1.0, 50.0, math.inf]
    values = [scaled_cumulant(p, reward, rho) for rho in grid]
    assert values == sorted(values)
    assert values[0] == float(reward.min()) and values[-1] == float(reward.max())
    mean = float(p @ reward)
    assert values[4] == pytest.approx(mean, abs=1e-14)
    half_variance = 0.5 * float(p @ (reward - mean).square())
    assert scaled_cumulant(p, reward, 1e-9) == pytest.approx(mean + 1e-9 * half_variance, abs=1e-13)
    for rho, value in zip(grid[1:-1], values[1:-1], strict=True):
        if abs(rho) >= 1:
            direct = float((p * (rho * reward).exp()).sum().log()) / rho
            assert value == pytest.approx(direct, abs=1e-12)


def test_regret_of_a_policy_beyond_the_highest_reward() -> None:
    """A KL that is enough for the highest reward: the frontier is that reward."""
    base, reward = vector(0.7, 0.2, 0.1), vector(1, 2, 0)
    found = regret(vector(0, 0, 1), base, reward)
    assert found.kl == pytest.approx(math.log(10)) and found.alpha == math.inf
    assert (found.frontier_reward, found.reward, found.regret) == (2.0, 0.0, 2.0)
    assert regret(base, base, reward).regret == pytest.approx(0.0, abs=1e-15)


def test_rewards_far_from_0_keep_their_differences() -> None:
    """10^6 + k / 2^20 are floats, so that the differences are exact: a tilt, its KL and what a
    policy misses are those of the rewards k / 2^20, for which they are known to all digits."""
    unit, base = 2.0**-20, vector(0.2, 0.3, 0.5)
    near = unit * vector(3, 0, 1)
    far, policy = 1e6 + near, vector(0.3, 0.3, 0.4)
    assert alpha_for_kl(base, far, 0.11) == pytest.approx(alpha_for_kl(base, near, 0.11), rel=1e-12)
    for alpha in (0.5 / unit, -2 / unit, 30 / unit):
        exact = kl_divergence(policy, tilt(base, near, alpha))
        assert kl_to_tilt(policy, base, far, alpha) == pytest.approx(exact, rel=1e-12)
    here, there = regret(policy, base, near), regret(policy, base, far)
    assert there.regret == pytest.approx(here.regret, rel=1e-9)
    assert there.reward == pytest.approx(1e6) and there.frontier_reward == pytest.approx(1e6)


P = vector(0.5, 0.5)
BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (tilt, ([0.5, 0.5], P, 1.0), r"tilt: expected base as a float64 tensor \[K\].*got list"),
    (
        tilt,
        (P.float(), P, 1.0),
        r"tilt: expected base as a float64.*got shape \(2,\), torch.float32",
    ),
    (tilt, (vector(0.5, 0.4), P, 1.0), "tilt: expected base to sum to 1, got a sum of 0.9"),
    (tilt, (vector(1.5, -0.5), P, 1.0), "tilt: expected base >= 0, got -0.5 at 1"),
    (tilt, (vector(math.nan, 1), P, 1.0), "tilt: expected base >= 0, got nan at 0"),
    (tilt, (P, vector(1, 2, 3), 1.0), r"tilt: expected reward of shape \(2,\), got \(3,\)"),
    (tilt, (P, vector(1, math.nan), 1.0), "tilt: expected reward to be finite.*got nan at 1"),
    (tilt, (P, vector(-math.inf, 1), 1.0), "tilt: expected reward to be finite.*got -inf at 0"),
    (tilt, (P, P.long(), 1.0), r"tilt: expected reward as a float tensor.*torch.int64"),
    (tilt, (P, P, math.nan), "tilt: expected a number as alpha, got nan"),
    (alpha_for_kl, (P, vector(0, 1), 0.7), "at most 0.69314718056 nats.*got 0.7"),
    (alpha_for_kl, (P, vector(1, 1), 0.1), "at most 0 nats.*got 0.1"),
    (alpha_for_kl, (P, vector(0, 1), -0.1), "alpha_for_kl: expected a finite kl >= 0, got -0.1"),
    (alpha_for_reward, (P, vector(0, 1), 1.5), r"alpha_for_reward: expected a value in \[0, 1\]"),
    (kl_divergence, (P, vector(1)), r"kl_divergence: expected q of shape \(2,\), got \(1,\)"),
    (renyi_cross_entropy, (P, P, math.nan), "renyi_cross_entropy: expected a number as order"),
    (scaled_cumulant, (P, P, math.nan), "scaled_cumulant: expected a number as rho"),
    (
        kl_to_tilt,
        (vector(1), P, P, 1.0),
        r"kl_to_tilt: expected policy of shape \(2,\), got \(1,\)",
    ),
    (kl_to_tilt, (P, P, P, math.inf), "kl_to_tilt: expected a finite alpha"),
    (
        regret,
        (P, vector(1, 0), P),
        "regret: expected a policy without mass where the base has none",
    ),
]


@pytest.mark.parametrize("f, arguments, message", BAD)
def test_bad_input(f: Callable[..., Any], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        f(*arguments)
