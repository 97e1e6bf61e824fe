"""A policy beside the frontier, from means alone: exact cases, bounds past the end, coverage."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastalign.theory import Frontier, alpha_for_kl, frontier, kl_divergence, place, regret, tilt

BASE = torch.tensor([0.35, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64)
REWARD = torch.tensor([-1.0, 0.0, 0.5, 2.0, 2.5], dtype=torch.float64)
SAMPLES = REWARD.repeat_interleave(100 * torch.tensor([7, 6, 4, 2, 1]))  # exactly the base


def test_the_regret_of_a_known_policy() -> None:
    """Its KL and reward are known, so its regret is; 99 tangents find it to a thousandth of what
    the curve gains, 3.3, and never too low."""
    policy = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
    exact = regret(policy, BASE, REWARD)
    found = place(frontier(SAMPLES), exact.kl, exact.reward)
    assert -1e-12 < found.regret - exact.regret < 0.0033
    assert found.frontier_reward == pytest.approx(exact.frontier_reward, abs=0.0033)
    assert found.at_least == found.at_most == found.regret and not found.is_past_end
    own = frontier(SAMPLES, alphas=[exact.alpha])  # its own tangent: no gap at all
    assert place(own, exact.kl, exact.reward).regret == pytest.approx(exact.regret, abs=1e-10)


def test_a_policy_on_the_frontier_misses_nothing() -> None:
    curve = frontier(SAMPLES)
    for alpha in (0.05, 0.4, 1.1):
        pi = tilt(BASE, REWARD, alpha)
        found = place(curve, kl_divergence(pi, BASE), float(pi @ REWARD))
        assert found.regret == pytest.approx(0.0, abs=0.0033)


def test_without_kl_the_frontier_is_the_base() -> None:
    mean = float(BASE @ REWARD)
    for kl in (0.0, -0.3):  # k1 may be under 0
        found = place(frontier(SAMPLES), kl, mean - 0.25, reward_se=0.1)
        assert found.regret == pytest.approx(0.25, abs=1e-12) and found.alpha == 0.0
        # the spread of the rewards, 1.1006..., over sqrt(2000), and the policy's own 0.1
        error = float(SAMPLES.std()) / math.sqrt(2000)
        assert found.se == pytest.approx(math.hypot(error, 0.1))


def three(*, end: float = 2.0) -> Frontier:
    """Rewards N(0, 1): reward = alpha, KL = alpha^2 / 2; at alpha 0, 1 and `end`."""
    alpha = torch.tensor([0.0, 1.0, end], dtype=torch.float64)
    error = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)
    kl, nothing = alpha.square() / 2, torch.zeros(3, dtype=torch.float64)
    return Frontier(alpha, kl, nothing, alpha, error, nothing, nothing, nothing)


def test_errors_by_hand() -> None:
    """At KL 0.6 the tangent at alpha 1 is 1 + 0.1, that at 2 is 2 - 1.4 / 2 = 1.3."""
    found = place(three(), 0.6, 0.9, kl_se=0.05, reward_se=0.04)
    assert found.regret == pytest.approx(0.2, abs=1e-12)
    assert found.se == pytest.approx(math.sqrt(0.02**2 + 0.05**2 + 0.04**2))
    assert found.alpha == 1.0


def test_the_error_of_a_kl_near_0() -> None:
    """Rewards N(0, 1), a KL of 0 known to 0.02: the frontier is sqrt(2 * 0.02) = 0.2 higher there,
    though it rises upright from 0; and the error of a KL of 1e-9 is nearly the same."""
    alpha = torch.linspace(0, 1, 1001, dtype=torch.float64)
    nothing = torch.zeros_like(alpha)
    curve = Frontier(alpha, alpha.square() / 2, *[nothing] * 6)
    curve = replace(curve, reward=alpha)
    for kl in (-0.1, 0.0, 1e-9):
        found = place(curve, kl, 0.0, kl_se=0.02, reward_se=0.15)
        assert found.se == pytest.approx(math.hypot(0.2, 0.15), rel=3e-3), kl
    # From 0.02 the way down, 0.2, is longer than that up.
    assert place(curve, 0.02, 0.0, kl_se=0.02).se == pytest.approx(0.2, rel=1e-3)


def test_past_the_end_there_are_bounds_only() -> None:
    """The curve ends at KL 2 with reward 2 and slope 1 / 2: at KL 5 between 2 and 3.5."""
    found = place(three(), 5.0, 1.5, kl_se=0.1, reward_se=0.04)
    assert found.is_past_end and math.isnan(found.regret) and math.isnan(found.se)
    assert math.isnan(found.frontier_reward)
    assert (found.at_least, found.at_most) == pytest.approx((0.5, 2.0))
    assert found.at_least_se == pytest.approx(math.hypot(0.03, 0.04))
    assert found.at_most_se == pytest.approx(math.sqrt(0.03**2 + 0.05**2 + 0.04**2))
    truth = math.sqrt(2 * 5.0) - 1.5
    assert found.at_least < truth < found.at_most
    assert not place(three(), 2.0, 1.5).is_past_end


@pytest.mark.usefixtures("one_thread")
def test_intervals_hold_a_regret_that_is_known() -> None:
    """40 prompts of 40 rewards N(t, 1), t ~ N(0, 1/4): at KL k the frontier is sqrt(2 k). A policy
    that misses 0.2 there, measured with noise of known size; the larger KL is near the
    curve's end, where the bias of log Z counts.
    """

    def misses(kl: float) -> Tensor:
        rewards = 0.5 * torch.randn(40, 1) + torch.randn(40, 40).double()
        curve = frontier(rewards, kls=[0.8 * kl, kl, 1.2 * kl])
        kl_hat = kl + 0.03 * float(torch.randn(1))
        reward_hat = math.sqrt(2 * kl) - 0.2 + 0.03 * float(torch.randn(1))
        found = place(curve, kl_hat, reward_hat, kl_se=0.03, reward_se=0.03)
        return torch.tensor([found.at_most - 0.2, found.at_most_se])

    for kl in (0.3, 0.7):
        off = torch.stack([misses(kl) for _ in range(200)])
        covered = float((off[:, 0].abs() < 1.96 * off[:, 1]).double().mean())
        assert 0.91 < covered < 0.985, (kl, covered)


def test_the_alpha_of_the_place_is_that_of_its_kl() -> None:
    found = place(frontier(SAMPLES), 0.3, 1.0)
    assert found.alpha == pytest.approx(alpha_for_kl(BASE, REWARD, 0.3), rel=0.05)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"kl": math.nan}, "expected a finite kl, got nan"),
        ({"reward": math.inf}, "expected a finite reward, got inf"),
        ({"kl_se": -0.1}, "expected a finite kl_se >= 0, got -0.1"),
        ({"reward_se": math.nan}, "expected a finite reward_se >= 0, got nan"),
    ],
)
def test_bad_input(more: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"place: {message}"):
        place(three(), **{"kl": 0.5, "reward": 0.1, **more})


def test_a_curve_without_trusted_points() -> None:
    far = frontier(torch.randn(50), alphas=[100.0])
    with pytest.raises(ValueError, match="place: expected a curve with points"):
        place(far, 0.5, 0.1)
