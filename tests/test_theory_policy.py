"""A policy's KL and regret from samples, the choice of beta and n: against exact small cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.theory import (
    alpha_for_kl,
    best_of_n,
    best_of_n_kl_bound,
    for_kl_budget,
    kl_divergence,
    policy_kl,
    regret,
    regret_from_samples,
    tilt,
)

BASE = torch.tensor([0.35, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64)
REWARD = torch.tensor([-1.0, 0.0, 0.5, 2.0, 2.5], dtype=torch.float64)
POLICY = torch.tensor([0.2, 0.25, 0.25, 0.2, 0.1], dtype=torch.float64)
LETTERS, LENGTH = 3, 3


class Markov:
    """Strings of three letters whose logits depend on the letter before."""

    def __init__(self) -> None:
        self.logits = torch.randn(LETTERS + 1, LETTERS, dtype=torch.float64)

    def rows(self, strings: Tensor) -> Tensor:
        """[B * LENGTH, LETTERS] logits of each letter's distribution."""
        before = torch.cat([torch.full_like(strings[:, :1], LETTERS), strings[:, :-1]], 1)
        return self.logits[before.flatten()]

    def logp(self, strings: Tensor) -> Tensor:
        return fa.ops.token_logprobs(self.rows(strings), strings.flatten())

    def sample(self, count: int) -> Tensor:
        letters = torch.full((count,), LETTERS)
        drawn = []
        for _ in range(LENGTH):
            letters = torch.multinomial(self.logits[letters].softmax(-1), 1)[:, 0]
            drawn.append(letters)
        return torch.stack(drawn, 1)


def estimates(policy: Markov, base: Markov, strings: Tensor) -> Any:
    exact = fa.ops.token_kl(policy.rows(strings), base.rows(strings))
    bounds = torch.arange(0, LENGTH * len(strings) + 1, LENGTH)
    return policy_kl(policy.logp(strings), base.logp(strings), exact, cu_seqlens=bounds)


def test_all_three_are_unbiased() -> None:
    """Over all 27 strings, weighted by the policy, each estimator's mean is the exact KL."""
    policy, base = Markov(), Markov()
    strings = torch.tensor(list(itertools.product(range(LETTERS), repeat=LENGTH)))
    p, q = (m.logp(strings).reshape(-1, LENGTH).sum(1).exp() for m in (policy, base))
    kl = kl_divergence(p, q)
    found = estimates(policy, base, strings)
    assert kl > 0.1
    for estimate in (found.k1, found.k3, found.rao_blackwell):
        assert float(p @ estimate.values) == pytest.approx(kl, abs=1e-12)
    spread = [float(p @ (e.values - kl).square()) for e in (found.rao_blackwell, found.k1)]
    assert spread[0] < 0.5 * spread[1]
    assert float(found.k3.values.min()) >= 0 and float(found.rao_blackwell.values.min()) >= 0


def test_standard_errors_are_those_of_the_mean() -> None:
    """400 runs of 100 responses: the spread of the means, and how often 2 se hold the truth."""
    policy, base = Markov(), Markov()
    every = torch.tensor(list(itertools.product(range(LETTERS), repeat=LENGTH)))
    p, q = (m.logp(every).reshape(-1, LENGTH).sum(1).exp() for m in (policy, base))
    kl = kl_divergence(p, q)
    values = estimates(policy, base, policy.sample(400 * 100))
    for name in ("k1", "rao_blackwell"):
        runs = getattr(values, name).values.reshape(400, 100)
        some = [fa.theory.Estimate(run) for run in runs]
        held = sum(abs(e.mean - kl) < 2 * e.se for e in some) / 400
        assert 0.91 < held < 0.985
        assert float(runs.mean(1).std()) == pytest.approx(some[0].se, rel=0.35)


def test_responses_of_unequal_length() -> None:
    """Sums over each response, an empty one is 0: d = ref - logp = (1, -1, 2) in responses of 2, 0,
    1. k1 = (0, 0, -2); k3 = (e - 2 + 1/e, 0, e^2 - 3).
    """
    logp = torch.tensor([-2.0, -1.0, -3.0])
    ref = torch.tensor([-1.0, -2.0, -1.0])
    found = policy_kl(logp, ref, cu_seqlens=torch.tensor([0, 2, 2, 3], dtype=torch.int32))
    assert found.rao_blackwell is None
    assert found.k1.values.tolist() == [0.0, 0.0, -2.0]
    want = [math.e - 2 + 1 / math.e, 0.0, math.e**2 - 3]
    assert found.k3.values.tolist() == pytest.approx(want, abs=1e-12)
    assert found.k1.mean == pytest.approx(-2 / 3) and found.k1.se == pytest.approx(2 / 3)
    alone = policy_kl(logp, ref, cu_seqlens=torch.tensor([0, 3]))
    assert alone.k1.mean == -2.0 and math.isnan(alone.k1.se)


def drawn(p: Tensor, *shape: int) -> Tensor:
    return torch.multinomial(p, math.prod(shape), replacement=True).reshape(shape)


def test_regret_equals_the_exact_one_for_samples_in_proportion() -> None:
    """20 base samples and 20 responses in exact proportion, KL of each as log(policy / base)."""
    base = REWARD.repeat_interleave(torch.tensor([7, 6, 4, 2, 1]))
    letters = torch.arange(5).repeat_interleave(torch.tensor([4, 5, 5, 4, 2]))
    kl = (POLICY / BASE).log()[letters]
    found, want = regret_from_samples(base, REWARD[letters], kl), regret(POLICY, BASE, REWARD)
    assert want.regret > 0.005
    for name in ("regret", "kl", "reward", "frontier_reward", "alpha"):
        assert getattr(found, name) == pytest.approx(getattr(want, name), abs=1e-12), name
    assert found.frontier_reward - found.reward == pytest.approx(found.regret, abs=1e-12)


@pytest.mark.usefixtures("one_thread")
def test_regret_and_its_error_from_samples() -> None:
    """300 runs of 400 base samples and 200 responses: 95 % of the regrets lie within 1.96 se of the
    exact one.
    """
    want = regret(POLICY, BASE, REWARD).regret
    base, letters = drawn(BASE, 300, 400), drawn(POLICY, 300, 200)
    kl = (POLICY / BASE).log()
    found = [
        regret_from_samples(REWARD[one], REWARD[own], kl[own])
        for one, own in zip(base, letters, strict=True)
    ]
    held = sum(abs(f.regret - want) < 1.96 * f.se for f in found) / 300
    assert 0.91 < held < 0.985
    regrets = torch.tensor([f.regret for f in found])
    assert float(regrets.mean()) == pytest.approx(want, abs=4 * float(regrets.std()) / 17)


@pytest.mark.usefixtures("one_thread")
def test_regret_over_prompts() -> None:
    """The reward is shifted by N(0, 9) from prompt to prompt: base and policy share the prompts, so
    that this leaves the regret and its error alone. 150 runs of 40 prompts, 100 + 20 samples each.
    """
    want = regret(POLICY, BASE, REWARD).regret
    kl = (POLICY / BASE).log()
    found = []
    for _ in range(150):
        shift = 3.0 * torch.randn(40, 1, dtype=torch.float64)
        own = drawn(POLICY, 40, 20)
        base = REWARD[drawn(BASE, 40, 100)] + shift
        found.append(regret_from_samples(base, REWARD[own] + shift, kl[own]))
    held = sum(abs(f.regret - want) < 1.96 * f.se for f in found) / 150
    assert 0.89 < held < 0.99
    assert max(f.se for f in found) < 0.1


@pytest.mark.usefixtures("one_thread")
def test_few_samples_of_the_base_for_many_prompts() -> None:
    """200 prompts with 40 rewards N(t, 1) each, and a policy that misses 0.2 at a KL of 0.5: the
    bias of log Z, not the spread over prompts, decides how far the regret is off."""
    alpha, held, spread = 1.0, 0, 0
    for _ in range(60):
        shift = 0.5 * torch.randn(200, 1).double()
        base = shift + torch.randn(200, 40).double()
        gained = alpha + torch.randn(200, 4).double()
        found = regret_from_samples(base, shift + gained - 0.2, alpha * gained - alpha**2 / 2)
        held += abs(found.regret - 0.2) < 1.96 * found.se
        bias = 0.5 * (1 / found.ess - 1 / 40) / found.alpha
        spread += abs(found.regret - 0.2) < 1.96 * math.sqrt(found.se**2 - bias**2)
    assert held >= 52 and spread <= 50


def test_budget_in_exact_proportion() -> None:
    """Alpha, reward and n of the exact small case; best-of-n from 2000 samples in proportion."""
    rewards = REWARD.repeat_interleave(torch.tensor([700, 600, 400, 200, 100]))
    for kl in (0.25, 0.7):
        found = for_kl_budget(rewards, kl)
        alpha = alpha_for_kl(BASE, REWARD, kl)
        assert found.alpha == pytest.approx(alpha, rel=1e-9) and found.beta * found.alpha == 1.0
        assert found.reward == pytest.approx(float(tilt(BASE, REWARD, alpha) @ REWARD), abs=1e-9)
        assert best_of_n_kl_bound(found.n) <= kl < best_of_n_kl_bound(found.n + 1)
        pi = best_of_n(BASE, REWARD, found.n)
        assert kl_divergence(pi, BASE) <= kl
        # Without replacement from 2000 is not quite with replacement.
        assert found.best_of_n_reward == pytest.approx(float(pi @ REWARD), abs=2e-3)
        assert found.best_of_n_reward < found.reward
        assert found.reward_se == pytest.approx(
            math.sqrt(1 / found.ess - 1 / 2000) / found.alpha, rel=1e-9
        )
    both = for_kl_budget(torch.stack([rewards, rewards + 1.0]), 0.7)
    assert both.reward == pytest.approx(found.reward + 0.5) and both.n == found.n
    assert both.best_of_n_reward == pytest.approx(found.best_of_n_reward + 0.5)


TWO = torch.zeros(2)
BASE20 = torch.arange(20.0)
BAD: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (
        policy_kl,
        (TWO, torch.zeros(3)),
        {"cu_seqlens": TWO.long()},
        r"ref_logp of logp's shape, \(2,\)",
    ),
    (policy_kl, (TWO, TWO, torch.zeros(3)), {"cu_seqlens": TWO.long()}, "token_kl of logp's shape"),
    (policy_kl, (TWO, TWO), {"cu_seqlens": torch.tensor([0, 1])}, r"from 0 to 2, got \[0, 1\]"),
    (
        policy_kl,
        (TWO, TWO),
        {"cu_seqlens": torch.tensor([0, 3, 1, 2])},
        "cu_seqlens that never falls",
    ),
    (
        policy_kl,
        (TWO / 0, TWO),
        {"cu_seqlens": torch.tensor([0, 2])},
        r"finite logp, got nan at \[0\]",
    ),
    (
        regret_from_samples,
        (BASE20, TWO, torch.ones(3)),
        {},
        r"kl of rewards' shape, \(2,\), got \(3,\)",
    ),
    (regret_from_samples, (BASE20, TWO, -torch.ones(2)), {}, "expected a positive KL, got -1 nats"),
    (
        regret_from_samples,
        (BASE20, TWO, torch.ones(2)),
        {},
        "at most 0.[0-9]+ nats.*falls to 10, got 1",
    ),
    (
        regret_from_samples,
        (BASE20, TWO[None], TWO[None]),
        {},
        r"expected rewards as a float tensor \[N\]",
    ),
    (
        regret_from_samples,
        (torch.stack([BASE20, BASE20]), torch.ones(3, 2), torch.ones(3, 2)),
        {},
        "expected rewards for 2 prompts like base_rewards, got 3",
    ),
    (for_kl_budget, (BASE20, 0.0), {}, "expected a positive KL, got 0 nats"),
    (for_kl_budget, (BASE20, math.nan), {}, "expected a finite kl"),
    (for_kl_budget, (torch.ones(20), 0.1), {}, "expected rewards that differ"),
    (for_kl_budget, (BASE20, 2.0), {}, "at most 0.[0-9]+ nats"),
]


@pytest.mark.parametrize("f, arguments, more, message", BAD)
def test_bad_input(
    f: Callable[..., Any], arguments: tuple[Any, ...], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{f.__name__}: .*({message})"):
        f(*arguments, **more)
