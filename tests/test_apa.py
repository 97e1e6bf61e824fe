"""APA: what an update moves and by how much, advantages and rewards, the options that bend them."""

import copy
import dataclasses
import json
from types import SimpleNamespace
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
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from fastalign.models import RewardEnsemble, load_tokenizer
from fastalign.rollout import Rollout, SamplingConfig, TransformersEngine
from fastalign.testing import TOLERANCES
from fastalign.train import apa, update
from fastalign.train.critic import TrunkCritic
from fastalign.train.experience import Collector, Experience, packed
from fastalign.train.optim import Optimizer
from fastalign.train.prompts import choose_prompts
from fastalign.train.reward_source import make_reward
from fastalign.train.update import Learner

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor


def one_token_answers(policy):
    """An experience of four one-token answers to one prompt, and their log-probs under `policy`."""
    rollouts = [Rollout(0, [5, 6], [token], [0.0], False) for token in (10, 11, 12, 13)]
    with torch.no_grad():
        logp = policy.logprobs(packed(rollouts))[0]
    scores = torch.zeros(4, 1)
    cu_seqlens = torch.arange(5).int()
    found = Experience(rollouts, cu_seqlens, logp, logp, scores, scores[:, 0], None, 12)
    return found, logp


@pytest.mark.parametrize("lambda_", [0.5, 2.0])
def test_apa_moves_logprobs_to_ref_plus_advantage_over_lambda(lambda_):
    """Sign after one update, size after many: log pi - log pi_init -> Adv / lambda."""
    policy = tiny_policy()
    found, start = one_token_answers(policy)
    advantages = torch.tensor([0.5, -0.5, 0.25, 0.0])
    tokens = signals(advantages=advantages, ref_logp=start, returns=torch.zeros(4))
    config = apa.APAConfig(lambda_=lambda_, epochs=1, lr=3e-3, value_lr=3e-3, warmup=0.0)
    learner = learner_of(policy, apa.APA(config))

    def change():
        return one_token_answers(policy)[1] - start

    first = updated(learner, 1, found, tokens)
    assert first["loss/policy"] == pytest.approx((advantages / lambda_).square().mean().item())
    assert torch.equal(change()[:3].sign(), advantages[:3].sign())
    for step in range(2, 300):
        last = updated(learner, step, found, tokens)
    assert last["loss/policy"] < 1e-4
    assert (change() - advantages / lambda_).abs().max() < 0.02
    # Equation check with numbers: lambda 0.5 doubles the probability's log-ratio of lambda 1.
    assert change()[0].item() == pytest.approx(0.5 / lambda_, abs=0.02)


def test_the_reward_stands_on_the_last_token():
    """gamma = lam = 1 and V = 0: every token's advantage is the response's scaled reward."""
    policy = tiny_policy()
    rollouts = [
        Rollout(0, [5, 6], [1, 2, 3], [0.0] * 3, True),
        Rollout(1, [7], [4], [0.0], True),
    ]
    scores = torch.tensor([[2.0], [-1.0]])
    cu_seqlens = torch.tensor([0, 3, 4]).int()
    logp, ref_logp = torch.zeros(4), torch.tensor([-1.0, -2.0, -3.0, -4.0])
    found = Experience(rollouts, cu_seqlens, logp, ref_logp, scores, scores[:, 0], None, 7)
    # pi sampled at log-prob 0, pi_init gives -6 and -4: KL(pi || pi_init) is +5 a response.
    assert found.metrics()["kl/k1"] == 5.0
    config = apa.APAConfig(gamma=1.0, lam=1.0, whiten=False, scale_reward=False)

    def learn(**changes):
        method = apa.APA(dataclasses.replace(config, **changes))
        values = learner_of(policy, method).values(found, unread())
        signal = method.signal(found, values, 0.0)
        return signal.tokens, signal.metrics

    tokens, metrics = learn()
    assert tokens["advantages"].tolist() == [2.0, 2.0, 2.0, -1.0]
    assert tokens["returns"].tolist() == [2.0, 2.0, 2.0, -1.0]
    assert metrics["advantage/std"] == pytest.approx(1.5)
    assert metrics["value/explained_variance"] == pytest.approx(0.0)
    assert torch.equal(tokens["ref_logp"], ref_logp)  # pi_init's, never the sampler's
    short, _ = learn(lam=0.5)
    assert short["advantages"].tolist() == [0.5, 1.0, 2.0, -1.0]
    half, _ = learn(gamma=0.5)
    assert half["advantages"].tolist() == [0.5, 1.0, 2.0, -1.0]
    white, _ = learn(whiten=True)
    assert white["advantages"].mean().item() == pytest.approx(0.0, abs=10 * FLOAT32)
    assert torch.equal(white["returns"], tokens["returns"])
    assert found.per_response(torch.tensor([1.0, 2.0, 4.0, 8.0])).tolist() == [7.0, 8.0]


def test_prompts_are_used_once_before_any_is_used_again():
    config = apa.APAConfig(prompts_per_step=4, seed=3)
    chosen = [i for step in range(1, 6) for i in choose_prompts(10, config, step)]
    assert sorted(chosen[:10]) == sorted(chosen[10:]) == list(range(10))
    assert chosen[:10] != chosen[10:]
    assert chosen[4:8] == choose_prompts(10, config, 2)
    many = choose_prompts(10, dataclasses.replace(config, prompts_per_step=25), 1)
    assert many[:20] == chosen and len(many) == 25


def test_the_order_of_prompts_is_drawn_once_an_epoch(monkeypatch):
    drawn = []
    plain = torch.randperm

    def counted(n, **options):
        drawn.append(n)
        return plain(n, **options)

    monkeypatch.setattr(torch, "randperm", counted)
    choose_prompts(1000, apa.APAConfig(prompts_per_step=700), 2)  # 300 of one, 400 of the next
    assert drawn == [1000, 1000]


# --- one update ---------------------------------------------------------------------------------


def collector_of(policy, temperature):
    ids: Any = SimpleNamespace(eos_token_id=0, pad_token_id=1)
    sampling = SamplingConfig(max_new_tokens=5, temperature=temperature)
    unused: Any = None
    return Collector(
        TransformersEngine(policy, ids),
        policy.frozen_copy(),
        unused,
        ids,
        sampling,
        12,
        "float32",
        None,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_update_sees_the_logprobs_that_pi_init_and_the_sampler_gave(dropout, temperature):
    """With advantage 0 and the policy's own log-probs as pi_init's the loss is (p - p)^2 = 0."""
    policy, rollouts = tiny_policy(dropout), some_rollouts()
    policy.train()
    collector = collector_of(policy, temperature)
    truth = by_transformers(policy, rollouts, temperature)
    ref_logp, entropy = collector.logprobs(collector.reference, rollouts, entropy=True)
    assert entropy is not None and entropy.min() > 0
    assert (ref_logp - truth).abs().max() < 10 * FLOAT32
    assert (collector.logprobs(policy, rollouts)[0] - truth).abs().max() < 10 * FLOAT32
    config = apa.APAConfig(
        epochs=2, lr=0.0, value_lr=0.0, batch_tokens=16, sampling=collector.sampling
    )
    zeros = torch.zeros(17)
    tokens = signals(advantages=zeros, ref_logp=ref_logp, returns=zeros)
    found, learner = experience_of(rollouts, ref_logp), learner_of(policy, apa.APA(config))
    numbers = updated(learner, 1, found, tokens)
    assert numbers["loss/policy"] < (10 * FLOAT32) ** 2
    assert numbers["entropy"] == pytest.approx(entropy.mean().item(), rel=0.1)
    # The same loss where it is known: pi_init one nat below is an error of 1 on every token.
    tokens["ref_logp"] = ref_logp - 1.0
    numbers = updated(learner, 1, found, tokens)
    assert numbers["loss/policy"] == pytest.approx(1.0, abs=100 * FLOAT32)


def test_micro_batches_add_up_to_the_batch(monkeypatch):
    """Gradients, losses and updates of one pass of 10,000 tokens and of passes of 6."""
    rollouts = some_rollouts()
    found = experience_of(rollouts, torch.linspace(-3, -2, 17))
    tokens = signals(
        advantages=torch.linspace(-1, 1, 17),
        ref_logp=found.ref_logp,
        returns=torch.linspace(-2, 1, 17),
    )
    runs = []
    for micro_tokens in (10_000, 6):
        config = apa.APAConfig(epochs=2, lr=0.0, value_lr=0.0, batch_tokens=18)
        config.micro_tokens = micro_tokens
        policy = tiny_policy()
        grads: list[torch.Tensor] = []
        learner = learner_of(policy, apa.APA(config))

        def record(*args, optimizer=learner.optimizer, policy=policy, grads=grads):
            grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
            return Optimizer.update(optimizer, *args)

        monkeypatch.setattr(learner.optimizer, "update", record)
        numbers = updated(learner, 1, found, tokens)
        runs.append((grads, numbers))
    (whole, numbers), (parts, again) = runs
    assert len(whole) == len(parts) >= 4  # two or more updates in each of two epochs
    for ours, theirs in zip(parts, whole, strict=True):
        assert (ours - theirs).abs().max() < 10 * FLOAT32 * theirs.abs().max()
    assert again == pytest.approx(numbers, rel=10 * FLOAT32)


def test_values_are_those_of_the_state_before_each_token():
    policy, rollouts = tiny_policy(dropout=0.5), some_rollouts()
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.down.weight)
    policy.train()
    found = experience_of(rollouts, torch.zeros(17))
    values = learner_of(policy, apa.APA(apa.APAConfig(micro_tokens=9))).values(found, unread())
    policy.eval()
    with torch.no_grad():
        alone = [
            policy.values(policy.hidden(packed([r])))[len(r.prompt) - 1 : -1] for r in rollouts
        ]
    assert (values - torch.cat(alone)).abs().max() < 100 * FLOAT32
    assert values.std() > 0.01


def test_the_critic_learns_the_returns():
    policy, rollouts = tiny_policy(), some_rollouts()
    found = experience_of(rollouts, torch.zeros(17))
    returns = torch.linspace(-1, 1, 17)
    tokens = signals(
        advantages=torch.zeros(17),
        ref_logp=by_transformers(policy, rollouts, 1.0),
        returns=returns,
    )
    config = apa.APAConfig(epochs=1, lr=1e-3, value_lr=1e-2, warmup=0.0)
    learner = learner_of(policy, apa.APA(config))
    first = updated(learner, 1, found, tokens)
    assert first["loss/value"] == pytest.approx(0.5 * returns.square().mean().item())
    assert first["loss"] == pytest.approx(first["loss/policy"] + first["loss/value"])
    for step in range(2, 100):
        last = updated(learner, step, found, tokens)
    # Not to 0: responses to one prompt share their first state, and differ in the return.
    assert last["loss/value"] < 0.4 * first["loss/value"]


def test_vf_coef_weighs_the_value_loss():
    """Gradients are linear in it: those of 3 are those of 1 and twice the step from 0 to 1."""
    rollouts = some_rollouts()
    found = experience_of(rollouts, torch.zeros(17))
    pack_ = packed(rollouts)
    inputs = signals(
        advantages=torch.linspace(-1, 1, 17),
        ref_logp=found.ref_logp,
        returns=torch.linspace(-2, 1, 17),
    )
    grads = {}
    for coef in (0.0, 1.0, 3.0):
        policy = tiny_policy().eval()
        learner = learner_of(policy, apa.APA(apa.APAConfig(vf_coef=coef)))
        learner.backward(learner.method.loss(0.0), pack_, inputs, LENGTHS, 17, 17)
        grads[coef] = torch.cat([p.grad.flatten() for p in policy.parameters()])
    of_critic = grads[1.0] - grads[0.0]
    assert of_critic.abs().max() > 1e-2
    expected = grads[0.0] + 3 * of_critic
    assert (grads[3.0] - expected).abs().max() < 100 * FLOAT32 * expected.abs().max()


def test_an_update_never_reads_the_device(monkeypatch):
    """Fake tensors hold nothing: whatever would make the host wait for CUDA is an error. The loss
    head, which has tests of its own, is told that no row is to be dropped."""
    asked: dict[str, Any] = {}

    def head(hidden, weight, targets, loss, inputs, **options):
        asked.update(options, rows=hidden.shape[0], targets=targets.shape[0])
        logp = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        total = loss(logp, None, **inputs).sum() / options["normalizer"]
        return SimpleNamespace(loss=total, logp=logp, entropy=logp, metrics={"ratio": total})

    monkeypatch.setattr(update.ops, "linear_loss", head)
    everything = (tiny_policy().eval(), packed(some_rollouts()), torch.zeros(17))
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        policy, pack_, zeros = copy.deepcopy(everything)
    inputs = signals(advantages=zeros, ref_logp=zeros, returns=zeros)
    with mode:
        config, unused = apa.APAConfig(), policy
        learner = Learner(config, apa.APA(config), policy, TrunkCritic(policy), unused, unused)
        loss = learner.method.loss(0.0)
        parts, seen = learner.backward(loss, pack_, inputs, LENGTHS, 17, 17)
    assert all(part.dim() == 0 for part in parts.values()) and seen["logp"].shape == (17,)
    assert asked["ignore_index"] is None and (asked["rows"], asked["targets"]) == (17, 17)
    assert all(p.grad is not None for p in policy.parameters())


# --- options of a run ---------------------------------------------------------------------------


def run_apa(folder, road, **changes):
    values: dict[str, Any] = {
        "output": str(folder),
        "policy": str(road / "sft" / "model"),
        "reward": str(road / "reward" / "model"),
        "steps": 1,
        "epochs": 1,
        "prompts_per_step": 3,
        "samples_per_prompt": 2,
        "eval_limit": 2,
        "eval_samples": 2,
        "sampling": SamplingConfig(max_new_tokens=6),
    }
    apa.train(apa.APAConfig(**(values | changes)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    return next(line for line in lines if line["phase"] == "train"), evaluation


def test_rewards_are_scaled_by_their_deviation(road, tmp_path):
    """V = 0 at the first step: the advantages are linear in the reward, and so is their spread."""
    scaled, _ = run_apa(tmp_path / "scaled", road)
    raw, _ = run_apa(tmp_path / "raw", road, scale_reward=False)
    assert raw["reward/proxy_std"] == scaled["reward/proxy_std"] > 0.01
    ratio = raw["advantage/std"] / scaled["advantage/std"]
    assert ratio == pytest.approx(raw["reward/proxy_std"], rel=1e-4)
    assert abs(ratio - 1) > 1e-3


def test_the_statistic_asked_for_is_the_one_maximised(road, tmp_path):
    config = apa.APAConfig(reward=str(road / "reward" / "model"), policy=str(road / "sft/model"))
    tokenizer = load_tokenizer(config.policy)
    scores = torch.tensor([[1.0, 4.0, 1.0]])
    saved = RewardEnsemble.load(config.reward).config
    for changes, expected in (
        ({}, 2.0),
        ({"statistic": "min"}, 1.0),
        ({"statistic": "lcb", "coef": 2.0}, 2.0 - 2.0 * 3.0**0.5),
        ({"statistic": "uwo"}, 2.0 - saved.coef * 3.0),
    ):
        asked = dataclasses.replace(config, **changes)
        ensemble = make_reward(asked, tokenizer, torch.device("cpu")).ensemble
        assert ensemble is not None
        assert ensemble.reduce(scores).item() == pytest.approx(expected)
        assert not any(p.requires_grad for p in ensemble.parameters())
    line, evaluation = run_apa(tmp_path / "apa", road, statistic="min")
    assert evaluation["proxy"] == "min"
    heads = [line[f"reward/head_{k}"] for k in range(3)]
    assert line["reward/proxy"] < min(heads) + 1e-6  # the mean of minima, below each head's mean
