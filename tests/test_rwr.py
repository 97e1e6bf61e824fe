"""Reward-weighted regression: weights, their effective sample size, the loss of a step."""

import json
import logging

import pytest
import torch
from labelled_runs import assert_resumes, lines_of, small
from plain_logprobs import plain_logprobs

from fastalign import losses
from fastalign.data.packing import epochs_of_batches
from fastalign.losses import effective_sample_size
from fastalign.testing import TOLERANCES
from fastalign.train import rwr
from fastalign.train.labels import load_labelled, standardised
from fastalign.train.run import RunError
from fastalign.train.rwr import RWRConfig

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor


def ess(weights):
    return (weights.sum() ** 2 / (weights**2).sum()).item()


def test_weights_of_the_data_set():
    """r = 1, 2, 3, 4: exp(z / beta) over its mean, and how many responses count."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    weights = losses.RWR(1.0).weights(rewards)
    expected = [0.221095845, 0.479715378, 1.040846532, 2.258342245]
    assert weights.tolist() == pytest.approx(expected, abs=1e-9)
    assert effective_sample_size(weights).item() == pytest.approx(2.475829, abs=1e-6)
    weights = losses.RWR(0.5).weights(rewards)
    assert effective_sample_size(weights).item() == pytest.approx(1.533166, abs=1e-6)


def test_a_step_is_the_formula(road, tmp_path):
    """sum(-w logp) / tokens with the weights of the whole data set, in float64."""
    config = small(RWRConfig, tmp_path, road, beta=0.5, weight_cap=3.0, lr=0.0, eval_limit=6)
    data = load_labelled(config)
    rwr.train(config)
    z = standardised(data.rewards)
    raw = torch.exp(z / 0.5).clamp(max=3.0)
    assert (raw == 3.0).any() and (raw < 3.0).any()
    weights = raw / raw.mean()
    logp = plain_logprobs(config.model, data.train.examples)
    schedule = epochs_of_batches(data.train.lengths, 2, 350, config.seed)
    lines = lines_of(tmp_path, "train")
    assert len(schedule) == len(lines) > 4
    for batch, line in zip(schedule, lines, strict=True):
        n_tokens = sum(len(logp[i]) for i in batch)
        loss = -sum(weights[i] * logp[i].sum() for i in batch) / n_tokens
        nll = -sum(logp[i].sum() for i in batch) / n_tokens
        assert line["loss"] == pytest.approx(loss.item(), rel=100 * FLOAT32)
        assert line["nll"] == pytest.approx(nll.item(), rel=100 * FLOAT32)
        assert line["ess"] == pytest.approx(ess(weights[batch]), rel=100 * FLOAT32)
    (facts,) = lines_of(tmp_path, "data")
    assert facts["data/ess"] == pytest.approx(ess(weights), rel=100 * FLOAT32)
    assert facts["data/weight_max"] == pytest.approx(weights.max().item(), rel=100 * FLOAT32)
    held = torch.exp(standardised(data.held_out_rewards, data.rewards) / 0.5).clamp(max=3.0)
    held = held / held.mean()
    rows = plain_logprobs(config.model, data.held_out.examples)
    loss = -sum(w * r.sum() for w, r in zip(held, rows, strict=True)) / sum(len(r) for r in rows)
    assert lines_of(tmp_path, "eval")[0]["loss"] == pytest.approx(loss.item(), rel=100 * FLOAT32)


def test_few_that_count_are_warned_of(road, tmp_path, caplog):
    config = small(RWRConfig, tmp_path / "few", road, beta=0.1, weight_cap=None, epochs=1, limit=6)
    rwr.train(config)
    (facts,) = lines_of(tmp_path / "few", "data")
    assert facts["data/ess"] < 3
    found = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    size = f"{facts['data/ess']:.1f}"
    assert any(m.startswith(f"the effective sample size is {size} of 12 responses") for m in found)
    caplog.clear()
    rwr.train(small(RWRConfig, tmp_path / "many", road, beta=9.0, epochs=1, limit=6))
    assert not [r for r in caplog.records if "effective sample size is" in r.message]


def test_given_responses_without_held_out_ones(road, tmp_path, caplog):
    """A file of one's own, all of it trained on: nothing to evaluate, and the weights are right."""
    rewards = [0.0, 1.0, 2.0, 5.0]
    records = [
        {"prompt": f"Say {i}.", "completion": f" It is {i}.", "reward": r}
        for i, r in enumerate(rewards)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    data = str(tmp_path / "own.jsonl")
    caplog.set_level(logging.INFO, "fastalign")
    rwr.train(small(RWRConfig, tmp_path / "run", road, data=data, reward=None, limit=None))
    z = (torch.tensor(rewards) - 2) / torch.tensor(rewards).std()
    assert f"effective sample size {ess(z.exp()):.1f}" in caplog.text
    assert lines_of(tmp_path / "run", "eval") == []
    assert lines_of(tmp_path / "run", "train")[-1]["loss"] > 0


def test_resumed_is_the_same_run(road, tmp_path, monkeypatch):
    assert_resumes(rwr, small(RWRConfig, tmp_path, road), monkeypatch)


def test_bad_input(road, tmp_path):
    for changes in ({"beta": 0.0}, {"beta": float("nan")}, {"weight_cap": -1.0}):
        with pytest.raises(RunError, match=f"expected {next(iter(changes))} > 0, got"):
            small(RWRConfig, tmp_path, road, **changes)
