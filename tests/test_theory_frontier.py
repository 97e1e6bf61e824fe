"""The frontier from samples: against exact alphabets, coverage of the bands, prompts, bad input."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.theory import alpha_for_kl, frontier, kl_divergence, tilt

BASE = torch.tensor([0.35, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64)
REWARD = torch.tensor([-1.0, 0.0, 0.5, 2.0, 2.5], dtype=torch.float64)


def drawn(*shape: int) -> Tensor:
    """Rewards of independent samples of the base."""
    return REWARD[torch.multinomial(BASE, math.prod(shape), replacement=True)].reshape(shape)


def in_proportion(times: int = 1) -> Tensor:
    """20 samples with exactly the base's proportions: their frontier is the base's own."""
    return REWARD.repeat_interleave(times * torch.tensor([7, 6, 4, 2, 1]))


def test_samples_in_proportion_give_the_exact_frontier() -> None:
    rewards = in_proportion(5)
    for alpha in (0.0, 0.3, 0.9):
        pi = tilt(BASE, REWARD, alpha)
        point = frontier(rewards, alphas=[alpha])
        assert float(point.kl[0]) == pytest.approx(kl_divergence(pi, BASE), abs=1e-14)
        assert float(point.reward[0]) == pytest.approx(float(pi @ REWARD), abs=1e-14)
        # sum(w)^2 / sum(w^2): w / sum(w) is pi / (100 base) for each of the 100 base samples
        assert float(point.ess[0]) == pytest.approx(100 / float((pi**2 / BASE).sum()), abs=1e-12)
    for kl in (0.0, 1e-6, 0.25):
        point = frontier(rewards.float(), kls=torch.tensor([kl], dtype=torch.float64))
        alpha = alpha_for_kl(BASE, REWARD, kl)
        assert float(point.alpha[0]) == pytest.approx(alpha, rel=1e-8)
        assert float(point.kl[0]) == pytest.approx(kl, abs=1e-14)


def test_error_worked_by_hand() -> None:
    """Weights w = e^(alpha r): se of the reward at its KL is sqrt(sum share^2 - 1 / N) / alpha; at
    alpha = 0 it is the se of the mean. se of the KL at its alpha from the influence of each sample,
    alpha w / Z (r - R) - (w / Z - 1).
    """
    rewards = torch.randn(50).double()
    point = frontier(rewards, alphas=[0.0, 0.7])
    share = (0.7 * rewards).softmax(0)
    want = math.sqrt(float(share.square().sum()) - 1 / 50) / 0.7
    assert float(point.reward_se[1]) == pytest.approx(want, rel=1e-12)
    influence = 50 * share * (0.7 * (rewards - share @ rewards) - 1) + 1
    kl_se = math.sqrt(float(influence.square().sum())) / 50
    assert float(point.kl_se[1]) == pytest.approx(kl_se, rel=1e-12)
    assert float(point.reward_se[0]) == pytest.approx(float(rewards.std()) / math.sqrt(50))
    near_0 = frontier(rewards, alphas=[1e-6])
    assert float(near_0.reward_se[0]) == pytest.approx(float(point.reward_se[0]), rel=0.02)
    half = float(point.high[1] - point.reward[1])
    assert half == pytest.approx(1.959963985 * want, rel=1e-9)
    assert float(point.reward[1] - point.low[1]) == pytest.approx(half)
    narrow = frontier(rewards, alphas=[0.7], confidence=0.5)
    assert float(narrow.high[0] - narrow.reward[0]) == pytest.approx(0.674489750 * want, rel=1e-9)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kl", [0.05, 0.4])
def test_bands_cover_the_truth(kl: float) -> None:
    """400 data sets of 300 samples from a small alphabet whose frontier is known: the 95 % band
    holds it in 95 % of them, and the standard error is the spread of the estimates.
    """
    truth = float(tilt(BASE, REWARD, alpha_for_kl(BASE, REWARD, kl)) @ REWARD)
    found = [frontier(rewards, kls=[kl]) for rewards in drawn(400, 300)]
    covered = sum(float(f.low) <= truth <= float(f.high) for f in found) / 400
    assert 0.915 < covered < 0.98
    estimates = torch.cat([f.reward for f in found])
    errors = torch.cat([f.reward_se for f in found])
    assert float(errors.mean() / estimates.std()) == pytest.approx(1.0, abs=0.12)
    assert abs(float(estimates.mean()) - truth) < 0.2 * float(errors.mean())


@pytest.mark.usefixtures("one_thread")
def test_bands_cover_the_truth_over_prompts() -> None:
    """Rewards N(t, 1) with t ~ N(0, 1) for each prompt: at one alpha for all, mean reward
    sqrt(2 KL). 50 prompts of 100 samples; the choice of prompts counts.
    """
    found = [
        frontier(torch.randn(50, 1) + torch.randn(50, 100).double(), kls=[0.3]) for _ in range(200)
    ]
    truth = math.sqrt(0.6)
    covered = sum(float(f.low) <= truth <= float(f.high) for f in found) / 200
    assert 0.91 < covered < 0.98
    assert float(torch.cat([f.reward_se for f in found]).mean()) == pytest.approx(0.1414, rel=0.1)


def test_prompts_share_alpha_not_kl() -> None:
    """A prompt whose rewards are all equal has KL 0; its mean counts all the same."""
    rewards = torch.stack([in_proportion(), torch.full((20,), 3.0).double()])
    pi = tilt(BASE, REWARD, 0.4)
    point = frontier(rewards, alphas=[0.4])
    assert float(point.kl) == pytest.approx(0.5 * kl_divergence(pi, BASE), abs=1e-14)
    assert float(point.reward) == pytest.approx(0.5 * (float(pi @ REWARD) + 3.0), abs=1e-14)
    inverse = 0.5 * (float((pi**2 / BASE).sum()) / 20 + 1 / 20)
    assert float(point.ess) == pytest.approx(1 / inverse)
    one, two = frontier(in_proportion(), kls=[0.1]), frontier(in_proportion()[None], kls=[0.1])
    assert torch.equal(one.reward, two.reward) and torch.equal(one.high, two.high)
    assert torch.equal(
        frontier(in_proportion(), kls=torch.tensor(0.1, dtype=one.kl.dtype)).high, one.high
    )


def test_default_points_end_where_the_weights_get_too_skewed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = frontier(torch.randn(2000))
    assert whole.kl.shape == (100,) and float(whole.kl[0]) == 0.0
    assert float(whole.ess[0]) == pytest.approx(2000)
    assert float(whole.ess[-1]) == pytest.approx(10, rel=1e-6)
    assert bool((whole.kl.diff() > 0).all()) and bool((whole.reward.diff() > 0).all())
    assert bool(whole.high.isfinite().all())


def test_no_reward_is_given_under_an_effective_size_of_10() -> None:
    rewards = torch.randn(400).double()
    end = float(frontier(rewards).alpha[-1])
    beyond = frontier(rewards, alphas=[0.9 * end, 1.1 * end])
    assert float(beyond.ess[0]) > 10 > float(beyond.ess[1]) > 1
    for column in (beyond.reward, beyond.reward_se, beyond.low, beyond.high):
        assert column.isnan().tolist() == [False, True]


def test_rewards_of_0_and_1() -> None:
    """A verifier's: 30 of 100 right. KL may go up to log(100 / 30), ESS never falls under 30."""
    rewards = torch.cat([torch.ones(30), torch.zeros(70)])
    whole = frontier(rewards)
    assert float(whole.kl[-1]) == pytest.approx(0.99 * math.log(100 / 30), rel=1e-9)
    assert float(whole.ess.min()) > 30 and float(whole.reward.max()) > 0.99
    right = float(whole.reward[20])
    exact = right * math.log(right / 0.3) + (1 - right) * math.log((1 - right) / 0.7)
    assert float(whole.kl[20]) == pytest.approx(exact, abs=1e-13)


@pytest.mark.parametrize("scale, offset", [(1e-9, 0.0), (1e9, 0.0), (1.0, 1e6)])
def test_units_and_offset(scale: float, offset: float) -> None:
    rewards = torch.randn(200).double()
    plain, moved = frontier(rewards, kls=[0.5]), frontier(scale * rewards + offset, kls=[0.5])
    tolerance = 1e-7 if offset else 1e-11
    assert float(moved.alpha * scale) == pytest.approx(float(plain.alpha), rel=tolerance)
    assert float((moved.reward - offset) / scale) == pytest.approx(
        float(plain.reward), rel=tolerance
    )
    assert float(moved.reward_se / scale) == pytest.approx(float(plain.reward_se), rel=tolerance)


SOME = torch.arange(20.0)


@pytest.mark.parametrize(
    "rewards, more, message",
    [
        (torch.ones(20), {}, "expected rewards that differ.*no policy can gain"),
        (torch.ones(3, 20) * torch.arange(3)[:, None], {}, "expected rewards that differ"),
        (torch.arange(10.0), {}, "expected more than 10 samples a prompt, got 10"),
        (torch.zeros(0), {}, r"expected rewards as a float tensor \[N\] or \[P, N\], not empty"),
        (torch.arange(20), {}, "expected rewards as a float tensor.*torch.int64"),
        (torch.tensor([math.nan] * 20), {}, r"expected finite rewards, got nan at \[0\]"),
        (SOME, {"alphas": [1.0], "kls": [1.0]}, "expected alphas or kls, got both"),
        (SOME, {"alphas": [-1.0]}, "expected a finite alpha >= 0, got -1.0"),
        (SOME, {"kls": [-1.0]}, "expected a finite kl >= 0, got -1.0"),
        (SOME, {"kls": [3.0]}, "expected a KL under 2.99573 nats.*got 3.0"),
        (SOME, {"confidence": 1.0}, "expected a confidence between 0 and 1, got 1.0"),
    ],
)
def test_bad_input(rewards: Tensor, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"frontier: {message}"):
        frontier(rewards, **more)
