"""APA: what an update moves and by how much, advantages and rewards, the options that bend them."""

import copy
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.models import Policy, RewardEnsemble
from fastalign.rollout import Rollout, SamplingConfig, TransformersEngine
from fastalign.testing import TOLERANCES
from fastalign.train import apa
from fastalign.train.experience import Collector, Experience
from fastalign.train.optim import Optimizer
from fastalign.train.prompts import choose_prompts
from fastalign.train.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor


def tiny_policy(dropout=0.0):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=24,
            attention_dropout=dropout,
        )
    )
    return Policy(model, value_head=True)


def one_token_answers(policy):
    """An experience of four one-token answers to one prompt, and their log-probs under `policy`."""
    rollouts = [Rollout(0, [5, 6], [token], [0.0], False) for token in (10, 11, 12, 13)]
    with torch.no_grad():
        logp = policy.logprobs(apa.experience.packed(rollouts))[0]
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
    tokens = {"advantages": advantages, "ref_logp": start, "returns": torch.zeros(4)}
    config = apa.APAConfig(lambda_=lambda_, epochs=1, lr=3e-3, value_lr=3e-3, warmup=0.0)
    optimizer = Optimizer(config, policy, 1)
    run = Run(config, "apa", 1)

    def change():
        return one_token_answers(policy)[1] - start

    first = apa.update(run, 1, policy, optimizer, found, tokens, config)
    assert first["loss/policy"] == pytest.approx((advantages / lambda_).square().mean().item())
    assert torch.equal(change()[:3].sign(), advantages[:3].sign())
    for step in range(2, 300):
        last = apa.update(run, step, policy, optimizer, found, tokens, config)
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
    config = apa.APAConfig(gamma=1.0, lam=1.0, whiten=False)
    tokens, metrics = apa.learn_from(found, policy, scores[:, 0], config)
    assert tokens["advantages"].tolist() == [2.0, 2.0, 2.0, -1.0]
    assert tokens["returns"].tolist() == [2.0, 2.0, 2.0, -1.0]
    assert metrics["advantage/std"] == pytest.approx(1.5)
    assert metrics["value/explained_variance"] == pytest.approx(0.0)
    assert torch.equal(tokens["ref_logp"], ref_logp)  # pi_init's, never the sampler's
    short, _ = apa.learn_from(found, policy, scores[:, 0], dataclasses.replace(config, lam=0.5))
    assert short["advantages"].tolist() == [0.5, 1.0, 2.0, -1.0]
    half, _ = apa.learn_from(found, policy, scores[:, 0], dataclasses.replace(config, gamma=0.5))
    assert half["advantages"].tolist() == [0.5, 1.0, 2.0, -1.0]
    white, _ = apa.learn_from(found, policy, scores[:, 0], dataclasses.replace(config, whiten=True))
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


def some_rollouts():
    """Six responses of one to five tokens to three prompts."""
    draw = torch.Generator().manual_seed(3)

    def tokens(n):
        return torch.randint(24, (n,), generator=draw).tolist()

    return [
        Rollout(i % 3, [5, 6, 7][: 1 + i % 3], tokens(n), [0.0] * n, True)
        for i, n in enumerate((1, 5, 2, 3, 4, 2))
    ]


def by_transformers(policy, rollouts, temperature):
    """Log-probs of the response tokens, each sequence alone, without dropout."""
    from fastalign.models.attention import attention

    was_training = policy.training
    policy.eval()
    rows = []
    with torch.no_grad(), attention(policy.model, "eager"):
        for r in rollouts:
            logits = policy.model(input_ids=torch.tensor([r.prompt + r.completion])).logits[0]
            logp = (logits / temperature).log_softmax(-1)[len(r.prompt) - 1 : -1]
            rows.append(logp.gather(1, torch.tensor(r.completion)[:, None])[:, 0])
    policy.train(was_training)
    return torch.cat(rows)


def experience_of(rollouts, ref_logp):
    ends = torch.tensor([0] + [len(r.completion) for r in rollouts]).cumsum(0).int()
    scores = torch.zeros(len(rollouts), 1)
    tokens = sum(len(r.prompt) + len(r.completion) for r in rollouts)
    return Experience(rollouts, ends, ref_logp, ref_logp, scores, scores[:, 0], None, tokens)


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
    tokens = {"advantages": zeros, "ref_logp": ref_logp, "returns": zeros}
    optimizer = Optimizer(config, policy, 1)
    found = experience_of(rollouts, ref_logp)
    numbers = apa.update(Run(config, "apa", 1), 1, policy, optimizer, found, tokens, config)
    assert numbers["loss/policy"] < (10 * FLOAT32) ** 2
    assert numbers["entropy"] == pytest.approx(entropy.mean().item(), rel=0.1)
    # The same loss where it is known: pi_init one nat below is an error of 1 on every token.
    tokens["ref_logp"] = ref_logp - 1.0
    numbers = apa.update(Run(config, "apa", 1), 1, policy, optimizer, found, tokens, config)
    assert numbers["loss/policy"] == pytest.approx(1.0, abs=100 * FLOAT32)


def test_micro_batches_add_up_to_the_batch(monkeypatch):
    """Gradients, losses and updates of one pass of 10,000 tokens and of passes of 6."""
    rollouts = some_rollouts()
    found = experience_of(rollouts, torch.linspace(-3, -2, 17))
    tokens = {
        "advantages": torch.linspace(-1, 1, 17),
        "ref_logp": found.ref_logp,
        "returns": torch.linspace(-2, 1, 17),
    }
    runs = []
    for micro_tokens in (10_000, 6):
        config = apa.APAConfig(epochs=2, lr=0.0, value_lr=0.0, batch_tokens=18)
        config.micro_tokens = micro_tokens
        policy = tiny_policy()
        grads: list[torch.Tensor] = []
        optimizer = Optimizer(config, policy, 1)

        def record(*args, optimizer=optimizer, policy=policy, grads=grads):
            grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
            return Optimizer.update(optimizer, *args)

        monkeypatch.setattr(optimizer, "update", record)
        numbers = apa.update(Run(config, "apa", 1), 1, policy, optimizer, found, tokens, config)
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
    values = apa._values(policy, found, apa.APAConfig(micro_tokens=9))
    policy.eval()
    with torch.no_grad():
        alone = [
            policy.values(policy.hidden(apa.experience.packed([r])))[len(r.prompt) - 1 : -1]
            for r in rollouts
        ]
    assert (values - torch.cat(alone)).abs().max() < 100 * FLOAT32
    assert values.std() > 0.01


def test_the_critic_learns_the_returns():
    policy, rollouts = tiny_policy(), some_rollouts()
    found = experience_of(rollouts, torch.zeros(17))
    returns = torch.linspace(-1, 1, 17)
    tokens = {
        "advantages": torch.zeros(17),
        "ref_logp": by_transformers(policy, rollouts, 1.0),
        "returns": returns,
    }
    config = apa.APAConfig(epochs=1, lr=1e-3, value_lr=1e-2, warmup=0.0)
    optimizer = Optimizer(config, policy, 1, {"value_head": 1e-2})
    run = Run(config, "apa", 1)
    first = apa.update(run, 1, policy, optimizer, found, tokens, config)
    assert first["loss/value"] == pytest.approx(0.5 * returns.square().mean().item())
    assert first["loss"] == pytest.approx(first["loss/policy"] + first["loss/value"])
    for step in range(2, 100):
        last = apa.update(run, step, policy, optimizer, found, tokens, config)
    # Not to 0: responses to one prompt share their first state, and differ in the return.
    assert last["loss/value"] < 0.4 * first["loss/value"]


def test_vf_coef_weighs_the_value_loss():
    """Gradients are linear in it: those of 3 are those of 1 and twice the step from 0 to 1."""
    rollouts = some_rollouts()
    found = experience_of(rollouts, torch.zeros(17))
    pack_ = apa.experience.packed(rollouts)
    inputs = {
        "advantages": torch.linspace(-1, 1, 17),
        "ref_logp": found.ref_logp,
        "returns": torch.linspace(-2, 1, 17),
    }
    grads = {}
    for coef in (0.0, 1.0, 3.0):
        policy = tiny_policy().eval()
        apa.backward(policy, pack_, inputs, 17, apa.APAConfig(vf_coef=coef))
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
        return SimpleNamespace(loss=total, logp=logp, entropy=logp)

    monkeypatch.setattr(apa.ops, "linear_loss", head)
    everything = (tiny_policy().eval(), apa.experience.packed(some_rollouts()), torch.zeros(17))
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        policy, pack_, zeros = copy.deepcopy(everything)
    inputs = {"advantages": zeros, "ref_logp": zeros, "returns": zeros}
    with mode:
        parts, seen = apa.backward(policy, pack_, inputs, 17, apa.APAConfig())
    assert parts.shape == (3,) and seen["logp"].shape == (17,)
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
    tokenizer = apa.load_tokenizer(config.policy)
    scores = torch.tensor([[1.0, 4.0, 1.0]])
    saved = RewardEnsemble.load(config.reward).config
    for changes, expected in (
        ({}, 2.0),
        ({"statistic": "min"}, 1.0),
        ({"statistic": "lcb", "coef": 2.0}, 2.0 - 2.0 * 3.0**0.5),
        ({"statistic": "uwo"}, 2.0 - saved.coef * 3.0),
    ):
        ensemble = apa.load_reward(dataclasses.replace(config, **changes), tokenizer)
        assert ensemble.reduce(scores).item() == pytest.approx(expected)
        assert not any(p.requires_grad for p in ensemble.parameters())
    line, evaluation = run_apa(tmp_path / "apa", road, statistic="min")
    assert evaluation["proxy"] == "min"
    heads = [line[f"reward/head_{k}"] for k in range(3)]
    assert line["reward/proxy"] < min(heads) + 1e-6  # the mean of minima, below each head's mean
