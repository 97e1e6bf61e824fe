"""AWR: its weights, their cap, and how few of them carry an update."""

import math
import re

import pytest
import torch
from learners import (
    LENGTHS,
    by_transformers,
    experience_of,
    learner_of,
    signals,
    some_rollouts,
    tiny_policy,
    updated,
)

from fastalign.testing import TOLERANCES
from fastalign.train.actor_critic import whitened
from fastalign.train.awr import AWR, AWRConfig
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor
N = sum(LENGTHS)


def near(x):
    return pytest.approx(float(x), rel=200 * FLOAT32, abs=200 * FLOAT32)


def given(policy, advantages):
    rollouts = some_rollouts()
    logp = by_transformers(policy, rollouts, 1.0)
    tokens = signals(advantages=advantages, ref_logp=logp, returns=torch.zeros(N))
    return logp, experience_of(rollouts, logp), tokens


@pytest.mark.parametrize("cap, beta", [(0.0, 0.7), (2.0, 0.7), (2.0, 3.0)])
def test_an_update_has_the_loss_of_the_formula(cap, beta):
    policy, advantages = tiny_policy(), torch.linspace(-1.5, 1.5, N)
    logp, found, tokens = given(policy, advantages)
    config = AWRConfig(
        beta=beta, weight_cap=cap, lr=0.0, value_lr=0.0, epochs=1, batch_tokens=999, vf_coef=0.0
    )
    numbers = updated(learner_of(policy, AWR(config)), 1, found, tokens)
    weights = (advantages.double() / beta).exp().clamp(max=cap or math.inf)
    assert numbers["loss/policy"] == near((-weights * logp.double()).mean())
    assert numbers["policy/weight"] == near(weights.mean())
    assert numbers["weight/ess"] == near(weights.sum() ** 2 / (weights**2).sum() / N)
    capped = (advantages / beta).exp() > cap if cap else torch.zeros(N)
    assert numbers["policy/clip_fraction"] == near(capped.double().mean())
    assert bool(capped.any()) == (cap > 0 and beta < 1)


def test_updates_raise_the_tokens_of_large_weight():
    policy, better = tiny_policy(), torch.tensor([1.0, -1.0] * 9)[:N]
    logp, found, tokens = given(policy, better)
    config = AWRConfig(beta=0.5, epochs=4, lr=1e-3, warmup=0.0, batch_tokens=999)
    updated(learner_of(policy, AWR(config)), 1, found, tokens)
    change = by_transformers(policy, some_rollouts(), 1.0) - logp
    assert change[better > 0].mean() > 0.01
    assert change[better > 0].mean() > change[better < 0].mean() + 0.02


def test_advantages_are_whitened_over_an_update_with_or_without_its_padding():
    """The batch of the paper's code: V, R and their GAE give these, padding cell and all."""
    rows = [torch.tensor([0.82675, 0.765, 0.7]), torch.tensor([-0.48, -0.4])]
    padded = torch.cat(whitened(rows, "padded"))
    expected = torch.tensor([0.981150, 0.878715, 0.770889, -1.186573, -1.053864])
    assert (padded - expected).abs().max() < 1e-5
    apart = torch.cat(whitened(rows, "update"))
    assert apart.mean().abs() < 1e-6 and apart.std().item() == near(1.0)
    assert [len(row) for row in whitened(rows, "update")] == [3, 2]


def test_whitening_over_an_update_reaches_the_loss():
    policy, advantages = tiny_policy(), torch.linspace(-1.0, 3.0, N) ** 2
    logp, found, tokens = given(policy, advantages)
    for over in ("update", "padded"):
        config = AWRConfig(
            whiten_over=over, lr=0.0, value_lr=0.0, epochs=1, batch_tokens=18, micro_tokens=9
        )
        seen: list[torch.Tensor] = []
        learner = learner_of(policy, AWR(config))
        plain = learner.backward

        def record(*args, plain=plain, seen=seen):
            seen.append(args[2]["advantages"])
            return plain(*args)

        learner.backward = record
        updated(learner, 1, found, tokens)
        assert len(seen) > 3 and torch.cat(seen).shape == (N,)
        means = torch.cat(seen)
        assert means.abs().max() < 3 and advantages.max() > 8
        assert (torch.cat(seen).mean().abs() < 1e-6) == (over == "update")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"beta": 0.0}, "expected beta > 0, got 0"),
        ({"weight_cap": -1.0}, "expected weight_cap >= 0, got -1.0"),
        ({"whiten_over": "batch"}, "unknown whiten_over 'batch': expected one of round, update"),
    ],
)
def test_options_out_of_range_say_so(changes, said):
    with pytest.raises(RunError, match=re.escape(said)):
        AWRConfig(**changes)
