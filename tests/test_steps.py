"""The gradient of every SFT and reward step, in one pass and in micro-batches, against autograd on
one sequence at a time."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastalign.data.packing import epochs_of_batches
from fastalign.models import load_tokenizer
from fastalign.models.attention import attention
from fastalign.testing import TOLERANCES
from fastalign.train import reward, sft, supervised
from fastalign.train.optim import Optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor
MICRO = 120  # tokens: two or three sequences, of batches of six or more


def gradients_of(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.fixture
def recorded(monkeypatch):
    """Every update's gradients, and the module it was of."""
    seen = []
    plain = Optimizer.update

    def update(self, *args):
        seen.append((gradients_of(self.module), self.module))
        return plain(self, *args)

    monkeypatch.setattr(Optimizer, "update", update)
    return seen


def run(train, config, recorded):
    """(gradients of each step, its losses, the trained module)."""
    recorded.clear()
    train(config)
    text = (Path(config.output) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    found = [line["loss"] for line in lines if line["phase"] == "train"]
    return [g for g, _ in recorded], found, recorded[-1][1]


def assert_same_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys() and len(ours) > 5
    largest = max(g.abs().max() for g in theirs.values())
    assert largest > 1e-3
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() < tolerance * largest, name


def sft_config(folder, road, **changes):
    return sft.SFTConfig(
        output=str(folder),
        model=str(road / "sft" / "model"),
        max_length=256,
        limit=24,
        epochs=1,
        batch_tokens=700,
        eval_limit=2,
        lr=0.0,  # every step starts from the same weights
        **changes,
    )


def test_sft(road, tmp_path, recorded, monkeypatch):
    plain = supervised.ops.linear_loss

    def no_row_is_dropped(*args, ignore_index=-100, **options):
        assert ignore_index is None  # counting the rows to drop would make the host wait for CUDA
        return plain(*args, ignore_index=None, **options)

    monkeypatch.setattr(supervised.ops, "linear_loss", no_row_is_dropped)
    config = sft_config(tmp_path / "whole", road)
    whole, losses, policy = run(sft.train, config, recorded)
    micro = sft_config(tmp_path / "micro", road, micro_tokens=MICRO)
    parts, again, _ = run(sft.train, micro, recorded)
    _, samples, _ = sft.load_data(config)
    examples = samples.examples
    schedule = epochs_of_batches(samples.lengths, 1, 700, config.seed)
    assert len(schedule) == len(whole) == len(parts) >= 3
    assert again == pytest.approx(losses, rel=10 * FLOAT32)
    for step, batch in enumerate(schedule):
        assert_same_gradients(parts[step], whole[step], 100 * FLOAT32)
        policy.zero_grad()
        total = torch.zeros(())
        with attention(policy.model, "eager"):
            for e in (examples[i] for i in batch):
                logits = policy.model(input_ids=torch.tensor([e.prompt + e.completion])).logits[0]
                rows = logits[len(e.prompt) - 1 : -1].log_softmax(-1)
                total = total - rows.gather(1, torch.tensor(e.completion)[:, None]).sum()
        (total / sum(len(examples[i].completion) for i in batch)).backward()
        mean = total.item() / sum(len(examples[i].completion) for i in batch)
        assert losses[step] == pytest.approx(mean, rel=100 * FLOAT32)
        assert_same_gradients(parts[step], gradients_of(policy), 1000 * FLOAT32)


def reward_config(folder, road, **changes):
    return reward.RewardConfig(
        output=str(folder),
        model=str(road / "sft" / "model"),
        max_length=256,
        heads=3,
        limit=14,
        epochs=1,
        batch_tokens=900,
        eval_limit=2,
        seed=2,
        lr=0.0,
        **changes,
    )


def test_reward(road, tmp_path, recorded):
    config = reward_config(tmp_path / "whole", road)
    whole, losses, ensemble = run(reward.train, config, recorded)
    micro = reward_config(tmp_path / "micro", road, micro_tokens=2 * MICRO)
    parts, again, _ = run(reward.train, micro, recorded)
    pairs, _ = reward.load_data(config, load_tokenizer(config.model))
    schedule = epochs_of_batches([reward.pair_length(p) for p in pairs], 1, 900, 2)
    assert len(schedule) == len(whole) == len(parts) >= 2
    assert again == pytest.approx(losses, rel=10 * FLOAT32)
    weights = reward.bootstrap_weights(len(pairs), 3, 2).float()
    assert (weights == 0).any() and (weights > 1).any()

    def scores(tokens):
        hidden = ensemble.encoder(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
        return ensemble.weight @ hidden + ensemble.bias

    for step, batch in enumerate(schedule):
        assert_same_gradients(parts[step], whole[step], 100 * FLOAT32)
        ensemble.zero_grad()
        with attention(ensemble.encoder, "eager"):
            gaps = torch.stack(
                [
                    scores(p.prompt + p.chosen) - scores(p.prompt + p.rejected)
                    for p in (pairs[i] for i in batch)
                ]
            )
        kept = weights[batch]
        loss = ((kept * F.softplus(-gaps)).sum(0) / kept.sum(0).clamp(min=1)).mean()
        loss.backward()
        assert losses[step] == pytest.approx(loss.item(), rel=100 * FLOAT32)
        assert_same_gradients(parts[step], gradients_of(ensemble), 1000 * FLOAT32)


def test_a_head_without_a_pair_in_the_batch_adds_nothing():
    """Two heads, of which the second drew none of these pairs: it counts in K, with a loss of 0."""
    chosen, rejected = torch.tensor([[1.0, 5.0], [0.0, 5.0]]), torch.zeros(2, 2)
    weights = torch.tensor([[2, 0], [1, 0]])
    loss = reward.pair_loss(chosen, rejected, weights, weights.sum(0))
    expected = (2 * F.softplus(torch.tensor(-1.0)) + F.softplus(torch.tensor(0.0))) / 3 / 2
    assert loss.item() == pytest.approx(expected.item())
