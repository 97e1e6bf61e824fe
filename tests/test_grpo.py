"""GRPO: advantages within a prompt's responses, every variant's loss, what is left out."""

import dataclasses
import re

import pytest
import torch
from learners import (
    LENGTHS,
    by_transformers,
    experience_of,
    learner_of,
    some_rollouts,
    tiny_policy,
    updated,
)

from fastalign.losses.grpo import VARIANTS
from fastalign.rollout import SamplingConfig
from fastalign.testing import TOLERANCES
from fastalign.train.grpo import GRPO, GRPOConfig, group_advantages
from fastalign.train.run import Run, RunError
from fastalign.train.update import Buffer

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor
N, S = sum(LENGTHS), len(LENGTHS)
LONGEST = 7


def near(x):
    return pytest.approx(float(x), rel=200 * FLOAT32, abs=200 * FLOAT32)


def config_of(variant="grpo", **changes):
    values = {"lr": 0.0, "batch_tokens": 999, "samples_per_prompt": 3}
    sampling = SamplingConfig(max_new_tokens=LONGEST)
    return GRPOConfig(variant=variant, sampling=sampling, **(values | changes))


def test_advantages_are_distances_from_the_group_s_mean():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5 + 1e-6], [-1.0, 1.0, 0.0]])
    found, flat = group_advantages(rewards, divide=True)
    std = 7.0**0.5
    assert found[0].tolist() == near_list([-2 / (std + 1e-4), -1 / (std + 1e-4), 3 / (std + 1e-4)])
    assert found[2].tolist() == near_list([-1 / 1.0001, 1 / 1.0001, 0.0])
    assert found[1].tolist() == [0.0, 0.0, 0.0] and flat.tolist() == [False, True, False]
    plain, _ = group_advantages(rewards, divide=False)
    assert plain[0].tolist() == [-2.0, -1.0, 3.0]


def near_list(values):
    return [near(value) for value in values]


def experience(logp, proxy):
    found = experience_of(some_rollouts(), logp)
    return dataclasses.replace(found, proxy=torch.tensor(proxy))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_has_the_loss_of_the_variant(variant):
    """In float64 by hand, from the log-probs of the unchanged policy; packed and one by one."""
    policy, rollouts = tiny_policy(), some_rollouts()
    logp = by_transformers(policy, rollouts, 1.0)
    draw = torch.Generator().manual_seed(2)
    old = logp + 0.3 * torch.randn(N, generator=draw)
    ref = logp + 0.3 * torch.randn(N, generator=draw)
    found = experience(old, [1.0, 2.0, 6.0, 0.0, -1.0, 0.5])
    found = dataclasses.replace(found, ref_logp=ref)
    method = GRPO(config_of(variant, kl_coef=0.2, kl_kind="k3"))
    signal = method.signal(found, None, 0.2)
    assert signal.kept == list(range(S)) and signal.metrics["groups/flat"] == 0.0
    of_response, _ = group_advantages(found.proxy.reshape(2, 3), divide=variant != "dr_grpo")
    a = of_response.flatten().double().repeat_interleave(torch.tensor(LENGTHS))
    assert (signal.tokens["advantages"] - a).abs().max() == 0
    log_ratio = logp.double() - old.double()
    gap = ref.double() - logp.double()
    kl = gap.exp() - 1 - gap
    low, high, _ = VARIANTS[variant]
    if variant == "gspo":
        means = torch.stack([x.mean() for x in log_ratio.split(LENGTHS)])
        s, one = means.exp(), of_response.flatten().double()
        per_response = -torch.minimum(s * one, s.clamp(1 - low, 1 + high) * one)
        expected = (per_response + 0.2 * torch.stack([x.mean() for x in kl.split(LENGTHS)])).mean()
    else:
        ratio = log_ratio.exp()
        loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
        if variant == "cispo":
            loss = -ratio.clamp(0, 1 + high) * a * logp.double()
        loss = loss + 0.2 * kl
        expected = {
            "grpo": torch.stack([x.mean() for x in loss.split(LENGTHS)]).mean(),
            "dr_grpo": loss.sum() / (S * LONGEST),
        }.get(variant, loss.mean())
    numbers = updated(learner_of(policy, method), 1, found, signal.tokens, 0.2)
    assert numbers["loss"] == numbers["loss/policy"] == near(expected)
    apart = GRPO(dataclasses.replace(method.config, micro_tokens=1))
    parts = updated(learner_of(policy, apart), 1, found, signal.tokens, 0.2)
    assert parts == {name: near(value) for name, value in numbers.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_raise_the_better_responses(variant):
    policy, rollouts = tiny_policy(), some_rollouts()
    logp = by_transformers(policy, rollouts, 1.0)
    found = experience(logp, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    method = GRPO(config_of(variant, lr=1e-3, warmup=0.0, kl_coef=0.0, epochs=3))
    signal = method.signal(found, None, 0.0)
    updated(learner_of(policy, method), 1, found, signal.tokens)
    change = by_transformers(policy, rollouts, 1.0) - logp
    mean = torch.stack([x.mean() for x in change.split(LENGTHS)])
    better = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]) > 0
    assert mean[better].mean() > mean[~better].mean() + 1e-3


def test_flat_groups_and_cut_responses_are_left_out_and_counted():
    policy = tiny_policy()
    logp = by_transformers(policy, some_rollouts(), 1.0)
    found = experience(logp, [1.0, 1.0, 1.0, 0.0, 2.0, 1.0])
    found.rollouts[4] = dataclasses.replace(found.rollouts[4], finished=False)
    plain = GRPO(config_of("grpo")).signal(found, None, 0.0)
    assert plain.kept == [0, 1, 2, 3, 4, 5]
    assert (plain.metrics["groups/flat"], plain.metrics["groups/dropped"]) == (0.5, 0.0)
    dapo = GRPO(config_of("dapo")).signal(found, None, 0.0)
    assert dapo.kept == [3, 4, 5]
    assert (dapo.metrics["groups/flat"], dapo.metrics["groups/dropped"]) == (0.5, 0.5)
    filtered = GRPO(config_of("dapo", drop_unfinished=True)).signal(found, None, 0.0)
    assert filtered.kept == [3, 5] and filtered.metrics["groups/dropped"] == pytest.approx(4 / 6)
    # The cut response still counts in the mean of its group.
    assert torch.equal(filtered.tokens["advantages"], dapo.tokens["advantages"])
    # The mean is over the tokens that are left: those of the second prompt.
    learner = learner_of(policy, GRPO(config_of("dapo")))
    buffer = Buffer(found, dapo.tokens, dapo.kept)
    run = Run(learner.config, "grpo", 1)
    learner.update(run, 1, buffer, 0.0)
    advantages = dapo.tokens["advantages"][sum(LENGTHS[:3]) :]
    assert buffer.means()["loss/policy"] == near(-advantages.mean())
    assert run.meter.metrics()["tokens_per_s/trained"] > 0
    # Nothing left: no update, no loss, and no failure.
    flat = dataclasses.replace(found, proxy=torch.ones(S))
    nothing = GRPO(config_of("dapo")).signal(flat, None, 0.0)
    assert nothing.kept == [] and nothing.metrics["groups/dropped"] == 1.0
    assert updated(learner, 1, flat, nothing.tokens, kept=[]) == {}


def test_only_the_first_variant_has_a_kl_by_default():
    coefs = {variant: GRPOConfig(variant=variant).kl_coef for variant in VARIANTS}
    assert coefs == dict.fromkeys(VARIANTS, 0.0) | {"grpo": 0.04}
    assert [v for v in VARIANTS if GRPOConfig(variant=v).drop_flat] == ["dapo"]
    loss = GRPO(GRPOConfig(variant="dapo", kl_coef=0.1)).loss(0.25)
    assert (loss.kl_coef, loss.kl_kind, loss.variant) == (0.25, "k3", "dapo")
    assert GRPOConfig(variant="dapo", drop_flat=False).drop_flat is False


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"samples_per_prompt": 1}, "needs a --samples_per_prompt of at least 2; got 1"),
        ({"variant": "grop"}, "unknown variant 'grop': expected one of grpo, dr_grpo, dapo"),
        ({"variant": "cispo", "dual_clip": 2.0}, "--variant cispo does not have"),
        ({"kl_kind": "k4"}, "unknown kl_kind 'k4': expected one of k1, k2, k3, exact"),
        (
            {"variant": "dapo", "kl_control": "adaptive", "kl_target": 1.0},
            "--kl_control adaptive multiplies kl_coef, so it cannot leave kl_coef 0",
        ),
    ],
)
def test_options_that_do_not_go_together_say_why(changes, said):
    with pytest.raises(RunError, match=re.escape(said)):
        GRPOConfig(**changes)
