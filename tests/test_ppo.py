"""PPO: its loss to the digit, the KL penalty in reward and in loss, presets, the ptx term."""

import dataclasses
import inspect
import re
from typing import Any

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
    unread,
    updated,
)

from fastalign.data.packing import token_budget_batches
from fastalign.data.tokens import TokenizedCompletion
from fastalign.models.attention import attention
from fastalign.models.flops import training_flops
from fastalign.rollout import SamplingConfig
from fastalign.streams import stream
from fastalign.testing import TOLERANCES
from fastalign.train.experience import packed
from fastalign.train.ppo import PPO, PRESETS, PPOConfig, train
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor
N = sum(LENGTHS)


def near(x):
    return pytest.approx(float(x), rel=200 * FLOAT32, abs=200 * FLOAT32)


def still(**changes):
    """A configuration whose updates leave the weights where they are."""
    return PPOConfig(**({"lr": 0.0, "value_lr": 0.0, "epochs": 1, "batch_tokens": 999} | changes))


def some_signals(logp):
    """Old and reference log-probs near `logp`, and numbers for the rest, [N] each."""
    draw = torch.Generator().manual_seed(5)
    noise = torch.randn(5, N, generator=draw)
    return signals(
        advantages=noise[0],
        old_logp=logp + 0.4 * noise[1],
        ref_logp=logp + 0.3 * noise[2],
        returns=noise[3],
        old_values=0.5 * noise[4],
    )


@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3"])
def test_an_update_has_the_loss_of_the_formula(kl_kind):
    """Policy, value and entropy terms in float64 by hand; in one pass and in passes of nine."""
    policy, rollouts = tiny_policy(), some_rollouts()
    logp = by_transformers(policy, rollouts, 1.0)
    found, tokens = experience_of(rollouts, logp), some_signals(logp)
    config = still(
        clip=0.1, clip_high=0.3, dual_clip=1.2, value_clip=0.2, kl_in="loss", kl_kind=kl_kind
    )
    config = dataclasses.replace(config, entropy_coef=0.01, vf_coef=0.7)
    numbers = updated(learner_of(policy, PPO(config)), 1, found, tokens, 0.3)
    old, ref, a, ret, was = (
        tokens[name].double()
        for name in ("old_logp", "ref_logp", "advantages", "returns", "old_values")
    )
    ratio = (logp.double() - old).exp()
    loss = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.3) * a)
    loss = torch.where(a < 0, torch.minimum(loss, -1.2 * a), loss)
    gap = ref - logp.double()
    kl = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - 1 - gap}[kl_kind]
    term = (loss + 0.3 * kl).mean() - 0.01 * numbers["entropy"]
    assert numbers["loss/policy"] == near(term)
    held = was + (0 - was).clamp(-0.2, 0.2)  # the head starts at V = 0
    value = 0.5 * torch.maximum(ret**2, (held - ret) ** 2).mean()
    assert numbers["loss/value"] == near(value) and value > 0.51 * (ret**2).mean()
    assert numbers["loss"] == near(term + 0.7 * value)
    clipped = (loss != -ratio * a).double().mean()
    assert 0.1 < numbers["policy/clip_fraction"] < 0.9
    assert numbers["policy/clip_fraction"] == near(clipped)
    assert numbers["policy/ratio"] == near(ratio.mean())
    parts = updated(
        learner_of(policy, PPO(dataclasses.replace(config, micro_tokens=9))), 1, found, tokens, 0.3
    )
    assert parts == {name: near(value) for name, value in numbers.items()}


def test_the_exact_kl_is_that_of_the_whole_vocabulary():
    policy, rollouts = tiny_policy(), some_rollouts()
    logp = by_transformers(policy, rollouts, 1.0)
    found = experience_of(rollouts, logp)
    tokens = some_signals(logp) | {"advantages": torch.zeros(N)}
    learner = learner_of(policy, PPO(still(kl_in="loss", kl_kind="exact")))
    with torch.no_grad():
        learner.reference.model.lm_head.weight.mul_(3.0)
        kl = []
        for r in rollouts:
            ids = torch.tensor([r.prompt + r.completion])
            pair = []
            for model in (policy, learner.reference):
                with attention(model.model, "eager"):
                    logits = model.model(input_ids=ids).logits[0].double()
                pair.append(logits[len(r.prompt) - 1 : -1].log_softmax(-1))
            kl.append((pair[0].exp() * (pair[0] - pair[1])).sum(-1))
    numbers = updated(learner, 1, found, tokens, 0.5)
    assert numbers["loss/policy"] == near(0.5 * torch.cat(kl).mean())
    assert numbers["policy/kl"] == near(torch.cat(kl).mean()) and numbers["policy/kl"] > 0.01


def test_updates_raise_what_was_better_than_expected():
    policy, rollouts = tiny_policy(), some_rollouts()
    logp = by_transformers(policy, rollouts, 1.0)
    found = experience_of(rollouts, logp)
    better = torch.tensor([1.0, -1.0] * 9)[:N]
    tokens = signals(advantages=better, ref_logp=logp, returns=torch.zeros(N))
    learner = learner_of(policy, PPO(PPOConfig(epochs=4, lr=1e-3, warmup=0.0, batch_tokens=999)))
    updated(learner, 1, found, tokens)
    change = by_transformers(policy, rollouts, 1.0) - logp
    assert (change * better).mean() > 0.01
    assert change[better > 0].mean() > change[better < 0].mean() + 0.02


@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3"])
def test_the_penalty_stands_on_every_token_of_the_reward(kl_kind):
    """gamma = lam = 1, V = 0: a token's advantage is all that is to come."""
    policy, rollouts = tiny_policy(), some_rollouts()
    draw = torch.Generator().manual_seed(1)
    ref = torch.randn(N, generator=draw)
    found = experience_of(rollouts, torch.zeros(N))
    scores = torch.tensor([4.0, -9.0, 0.5, 1.0, 2.0, -1.0])
    found = dataclasses.replace(found, ref_logp=ref, proxy=scores)
    config = PPOConfig(kl_kind=kl_kind, lam=1.0, whiten=False, scale_reward=False, clip_reward=3.0)
    config = dataclasses.replace(config, missing_eos_penalty=0.25)
    found.rollouts[1] = dataclasses.replace(found.rollouts[1], finished=False)
    method = PPO(config)
    values = learner_of(policy, method).values(found, unread())
    tokens = method.signal(found, values, 0.5).tokens
    d = ref.double()  # log pi_ref - log pi
    kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[kl_kind]
    terminal = scores.double().clamp(-3, 3) - torch.tensor([0, 0.25, 0, 0, 0, 0])
    expected = []
    for penalties, score in zip(kl.split(LENGTHS), terminal, strict=True):
        rewards = -0.5 * penalties
        rewards[-1] += score
        expected.append(rewards.flip(0).cumsum(0).flip(0))
    assert (tokens["advantages"] - torch.cat(expected)).abs().max() < 100 * FLOAT32
    # In the loss it is not in the reward as well.
    inside = PPO(dataclasses.replace(config, kl_in="loss"))
    tokens = inside.signal(found, values, 0.5).tokens
    flat = terminal.repeat_interleave(torch.tensor(LENGTHS))
    assert (tokens["advantages"] - flat).abs().max() < 100 * FLOAT32
    assert inside.loss(0.5).kl_coef == 0.5 and method.loss(0.5).kl_coef == 0.0


# --- presets ------------------------------------------------------------------------------------


def test_a_preset_sets_what_it_says_and_nothing_else():
    said = inspect.getsource(PPOConfig).split("preset: str")[1].split("clip: float")[0]
    plain, most = PPOConfig(), PPOConfig(preset="ppo-max", ptx_data="synthetic")
    assert set(PRESETS["ppo"]) == set(PRESETS["ppo-max"])
    for name, value in PRESETS["ppo-max"].items():
        assert getattr(most, name) == value
        assert getattr(plain, name) == PRESETS["ppo"][name]
        assert re.search(rf"\b{name}\b", said), name
    differ = {f.name for f in dataclasses.fields(most)}
    differ = {name for name in differ if getattr(plain, name) != getattr(most, name)}
    assert differ == {
        *("preset", "ptx_data", "center_reward", "clip_reward", "critic", "critic_steps"),
        *("ptx_coef", "lam", "value_lr"),
    }
    assert most.value_lr == 3 * most.lr  # a critic of its own


def test_what_is_given_overrides_the_preset():
    given: dict[str, Any] = {"kl_coef": 0.0, "value_clip": 0.0, "ptx_coef": 0.0, "lam": 1.0}
    config = PPOConfig(preset="ppo-max", **given, center_reward=False)
    assert {name: getattr(config, name) for name in given} == given
    assert config.center_reward is False and config.critic == "reward"
    assert dataclasses.replace(config) == config  # resolved once, it stays so


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"preset": "ppo-mix"}, "unknown preset 'ppo-mix': expected one of ppo, ppo-max"),
        ({"preset": "ppo-max"}, "ptx_coef 0.1 (of --preset ppo-max) is the weight of a loss on "),
        ({"ptx_coef": 0.3}, "ptx_coef 0.3 is the weight of a loss on --ptx_data, which is not "),
        ({"ptx_data": "synthetic"}, "--ptx_data is used with a --ptx_coef > 0; it is 0"),
        ({"kl_kind": "exact"}, "--kl_kind exact has a gradient and belongs into the loss"),
        ({"kl_in": "loss", "kl_coef": 0.0}, "--kl_in loss with --kl_coef 0 is no penalty"),
        ({"kl_in": "both"}, "unknown kl_in 'both': expected one of reward, loss"),
        (
            {"kl_control": "adaptive", "kl_coef": 0.0, "kl_target": 6.0},
            "--kl_control adaptive multiplies kl_coef, so it cannot leave kl_coef 0",
        ),
        ({"kl_control": "adaptive"}, "--kl_control adaptive needs a --kl_target > 0"),
        ({"kl_target": 6.0}, "--kl_target is for --kl_control adaptive; the control is fixed"),
        ({"dual_clip": 0.5}, "expected clip > 0 and dual_clip > 1, got 0.2 and 0.5"),
        ({"whiten": False, "whiten_over": "update"}, "--whiten_over update is for --whiten true"),
        (
            {"center_reward": True, "scale_reward": False},
            "--center_reward goes with --scale_reward true; it is false",
        ),
        ({"critic": "twin"}, "unknown critic 'twin': expected one of trunk, separate, reward"),
    ],
)
def test_options_that_do_not_go_together_say_why(changes, said):
    with pytest.raises(RunError, match=re.escape(said)):
        PPOConfig(**changes)


# --- the language-model term --------------------------------------------------------------------


def test_ptx_adds_the_mean_loss_of_other_data_to_the_gradient():
    """With nothing else to learn, the gradient is ptx_coef times that of the other data."""
    policy, rollouts = tiny_policy(), some_rollouts()
    logp = by_transformers(policy, rollouts, 1.0)
    found = experience_of(rollouts, logp)
    zeros = torch.zeros(N)
    tokens = signals(advantages=zeros, ref_logp=logp, returns=zeros)
    config = still(ptx_coef=0.5, ptx_data="given", ptx_tokens=20, grad_clip=1e9)
    method = PPO(config)
    method.imitated = [TokenizedCompletion(r.prompt, r.completion, None) for r in rollouts]
    learner = learner_of(policy, method)
    grads = []
    plain = learner.optimizer.update

    def record(*args):
        grads.append({n: p.grad.clone() for n, p in policy.named_parameters()})
        return plain(*args)

    learner.optimizer.update = record
    numbers = updated(learner, 3, found, tokens)
    # Two passes by hand: whole responses of at most 20 tokens, in the order of their own stream.
    batch = token_budget_batches(found.lengths, 20, generator=stream(0, "ptx", 3, 0))[0]
    assert 1 < len(batch) < len(rollouts)
    chosen = by_transformers(policy, [rollouts[i] for i in batch], 1.0)
    assert numbers["loss/ptx"] == near(-chosen.mean())
    assert numbers["loss"] == near(-0.5 * chosen.mean())
    policy.zero_grad()
    (-0.5 * policy.logprobs(packed([rollouts[i] for i in batch]))[0].mean()).backward()
    for name, p in policy.named_parameters():
        if p.grad is not None:
            error = (p.grad - grads[0][name]).abs().max()
            assert error <= 1e3 * FLOAT32 * p.grad.abs().max() + 1e-7, name
    other = updated(learner, 4, found, tokens)
    assert other["loss/ptx"] != numbers["loss/ptx"]  # drawn anew
    meter = unread()
    method.also(policy, 3, 0, meter)
    lengths, n_tokens = [found.lengths[i] for i in batch], sum(LENGTHS[i] for i in batch)
    assert meter.totals["other"].flops == training_flops(policy, lengths, n_tokens)


def test_a_resumed_run_has_the_same_ptx_data(road, tmp_path):
    config = PPOConfig(
        output=str(tmp_path / "run"),
        policy=str(road / "sft" / "model"),
        reward=str(road / "reward" / "model"),
        ptx_coef=0.1,
        ptx_data="synthetic",
        ptx_limit=3,
        ptx_tokens=200,
        steps=1,
        prompts_per_step=2,
        samples_per_prompt=1,
        eval_limit=2,
        eval_samples=1,
        sampling=SamplingConfig(max_new_tokens=4),
    )
    train(config)
    other = dataclasses.replace(config, ptx_limit=2, resume="auto")
    with pytest.raises(RunError, match="with another ptx_data .3 examples, .* 2 examples"):
        train(other)
    train(dataclasses.replace(config, resume="auto"))
