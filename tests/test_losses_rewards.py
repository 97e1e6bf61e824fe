"""Offline methods on rewards: weights, filters, effective sample sizes; published numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from policies import ALL, device_of
from torch import Tensor

import fastalign as fa
from fastalign.losses import AWR, MLE, RWR, effective_sample_size
from fastalign.ops import policy_loss, whiten

REWARDS = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
# (1 - 2.5) / sqrt(5 / 3) = -1.5 / 1.290994449, and so on.
STANDARDISED = [-1.161895004, -0.387298335, 0.387298335, 1.161895004]
# exp of these: .312893, .678888, 1.472996, 3.195983; their mean is 1.415190.
WEIGHTS = [0.221095845, 0.479715378, 1.040846532, 2.258342245]


def rounded(x: Tensor, digits: int = 9) -> list[float]:
    return [round(value, digits) for value in x.tolist()]


def test_standardised_rewards_and_their_text() -> None:
    """What conditioned maximum likelihood writes into the prompt, to two decimals."""
    z = whiten(REWARDS)
    assert rounded(z) == pytest.approx(STANDARDISED, abs=2e-8)
    assert [f"{value:.2f}" for value in z.tolist()] == ["-1.16", "-0.39", "0.39", "1.16"]


def test_weights_of_published_rewards() -> None:
    w = RWR(1.0).weights(REWARDS)
    assert rounded(w) == WEIGHTS and w.dtype == torch.float64
    assert round(effective_sample_size(w).item(), 6) == 2.475829
    half = RWR(0.5).weights(REWARDS)
    assert round(effective_sample_size(half).item(), 6) == 1.533166
    assert RWR(1.0).weights(REWARDS.bfloat16()).dtype == torch.float32
    scaled = RWR(1.0).weights(3.0 * REWARDS - 100.0)
    assert (scaled - w).abs().max() < 1e-12


def test_the_cap_holds_before_the_mean_is_taken() -> None:
    """Capped at 1, the four are .312893, .678888, 1, 1: over their mean .747945."""
    w = RWR(1.0, weight_cap=1.0).weights(REWARDS)
    assert rounded(w, 6) == [0.418336, 0.907671, 1.336996, 1.336996]


def test_weights_relative_to_a_data_set() -> None:
    """z = (3 - 1) / 2 = 1 and (5 - 1) / 2 = 2: weights e and e^2 over (e + e^2) / 2."""
    w = RWR(1.0, weight_cap=None).weights(torch.tensor([3.0, 5.0]), mean=1.0, std=2.0)
    assert w.tolist() == pytest.approx([2 / (1 + math.e), 2 * math.e / (1 + math.e)], rel=1e-6)


def test_weights_where_nothing_tells_the_responses_apart() -> None:
    assert RWR(0.1).weights(torch.full((3,), 7.0)).tolist() == [1.0, 1.0, 1.0]
    assert RWR(0.1).weights(torch.tensor([7.0])).tolist() == [1.0]
    assert RWR(0.1).weights(torch.empty(0)).shape == (0,)


def test_no_reward_is_too_large() -> None:
    """beta 1e-4: log-weights of +-1e4, and the best response has all of the weight."""
    w = RWR(1e-4, weight_cap=None).weights(REWARDS)
    assert w.tolist() == [0.0, 0.0, 0.0, 4.0]
    assert effective_sample_size(w).item() == 1.0


@pytest.mark.parametrize("backend", ALL)
def test_the_loss_is_weighted_likelihood(backend: str) -> None:
    """logp -1, ..., -4 with the published weights: sum w_i i / 4, statistics of the weights."""
    device = device_of(backend)
    w = RWR(1.0).weights(REWARDS.float()).to(device)
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0], device=device, requires_grad=True)
    with fa.backend(backend):
        loss, statistics = policy_loss(RWR(1.0), logp, {"weights": w})
        plain, _ = policy_loss(MLE(), logp, {"weights": w})
    assert loss.item() == pytest.approx((0.221095845 + 0.959430756 + 3.122539596 + 9.03336898) / 4)
    (slope,) = torch.autograd.grad(loss, logp)
    assert slope.tolist() == pytest.approx([-x / 4 for x in WEIGHTS], rel=1e-6)
    assert statistics["weight"].item() == pytest.approx(1.0, rel=1e-6)
    assert statistics["effective_sample_size"].item() == pytest.approx(2.475829, rel=1e-5)
    assert torch.equal(loss, plain)
    with pytest.raises(ValueError, match="RWR: missing inputs: weights"):
        policy_loss(RWR(1.0), logp, {})


@pytest.mark.parametrize("backend", ALL)
def test_filtering_at_the_median_keeps_the_better_half(backend: str) -> None:
    """Weights 0, 0, 1, 1: the mean over the two that are kept is (3 + 4) / 2."""
    keep = (REWARDS > REWARDS.median()).float()
    assert keep.nonzero()[:, 0].tolist() == [2, 3]
    device = device_of(backend)
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0], device=device)
    with fa.backend(backend):
        loss, statistics = policy_loss(
            MLE(), logp, {"weights": keep.to(device)}, normalizer=keep.sum().item()
        )
    assert loss.item() == 3.5 and statistics["effective_sample_size"].item() == 2.0


@pytest.mark.parametrize("cap", [None, 1e30])
@pytest.mark.parametrize("backend", ALL)
def test_the_effective_sample_size_of_huge_weights(backend: str, cap: float | None) -> None:
    """Log-weights 60, 60, 59 (squares beyond float32), then 1000 and 999: (2 + 1/e)^2 / (2 + 1/e^2)
    and (1 + 1/e)^2 / (1 + 1/e^2). A masked one counts for nothing.
    """
    loss, device = AWR(1.0, weight_cap=cap), device_of(backend)
    logp = torch.full((4,), -1.0, device=device)
    mask = torch.tensor([True, True, True, False], device=device)
    e = math.exp(-1.0)
    cases = [([60.0, 60.0, 59.0, 99.0], (2 + e) ** 2 / (2 + e * e))]
    if cap is None:
        cases.append(([1000.0, 999.0, 0.0, math.nan], (1 + e) ** 2 / (1 + e * e)))
    else:
        cases.append(([1000.0, 999.0, 0.0, math.nan], 2.0))
    for advantages, want in cases:
        inputs = {"advantages": torch.tensor(advantages, device=device)}
        with fa.backend(backend):
            _, statistics = policy_loss(loss, logp, inputs, mask=mask)
            _, none = policy_loss(loss, logp, inputs, mask=torch.zeros_like(mask))
        assert statistics["effective_sample_size"].item() == pytest.approx(want, rel=1e-5)
        assert none["effective_sample_size"].item() == 0.0


def test_effective_sample_size_of_logarithms() -> None:
    """log 1 and log 3: 1.6, as of the weights; so far down or up that no float32 holds a weight."""
    logs = torch.tensor([0.0, math.log(3.0), -math.inf], dtype=torch.float64)
    for shift in (0.0, 1e4, -1e4):
        assert effective_sample_size(logs + shift, logs=True).item() == pytest.approx(1.6)
    assert effective_sample_size(torch.full((3,), -math.inf), logs=True).item() == 0.0
    assert effective_sample_size(torch.empty(0), logs=True).item() == 0.0
    infinite = torch.tensor([1.0, math.inf, math.inf])
    assert effective_sample_size(infinite).item() == 2.0
    assert effective_sample_size(torch.tensor([1.0, math.nan])).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RWR(0.0), "RWR: expected beta > 0 and finite, got RWR"),
        (lambda: RWR(1.0, weight_cap=0.0), "RWR: expected weight_cap > 0 and finite, or None"),
        (lambda: RWR(1.0).weights(torch.ones(2, 2)), r"rewards \[S\] .* got \(2, 2\), torch.float"),
        (lambda: RWR(1.0).weights(torch.tensor([1, 2])), "floating dtype, got .* torch.int64"),
        (lambda: RWR(1.0).weights(REWARDS, std=0.0), "RWR: expected std > 0, got 0.0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
