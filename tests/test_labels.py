"""Rewards for given responses: from the data, an ensemble, a function, gold; computed once."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from labelled_runs import lines_of, small
from safetensors.torch import load_file

from fastalign.data.files import DataError
from fastalign.data.formats import read_completions
from fastalign.data.source import responses
from fastalign.data.synthetic import gold_reward
from fastalign.data.tokens import TokenizedCompletion
from fastalign.models import RewardEnsemble
from fastalign.models.attention import attention
from fastalign.testing import TOLERANCES
from fastalign.train import labels, mle, rwr
from fastalign.train.kept import Kept, key_of
from fastalign.train.labels import LabelledConfig, load_labelled, standardised
from fastalign.train.meter import Meter
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor
PAIR = {"prompt": "Say it.", "chosen": " It is good.", "rejected": " It is bad."}


def rewarded(*rewards, name="reward"):
    return [{"prompt": f"Say {i}.", "completion": " So.", name: r} for i, r in enumerate(rewards)]


# --- the data -----------------------------------------------------------------------------------


def test_a_score_is_a_reward_where_one_is_asked_for(write):
    found, _ = read_completions(write(*rewarded(1.5, -2, name="score")), require_reward=True)
    assert [r.reward for r in found] == [1.5, -2.0]
    both = [r | {"reward": 7} for r in rewarded(1.5, name="score")]
    (one,), _ = read_completions(write(*both), require_reward=True)
    assert one.reward == 7.0
    # What nobody asked for may be anything.
    (one,), _ = read_completions(write(*rewarded("good", name="score")))
    assert one.reward is None
    with pytest.raises(DataError, match="score must be a number, got str"):
        read_completions(write(*rewarded("good", name="score")), require_reward=True)


def test_both_responses_of_pairs_are_scored(write):
    file = write(PAIR, {"prompt": "And?", "completion": " Yes."})
    found, report = responses(file, None, None, None)
    assert [r.completion for r in found] == [" It is good.", " It is bad.", " Yes."]
    assert [r.prompt for r in found] == ["Say it.", "Say it.", "And?"] and report.kept == 3
    pairs, report = responses("synthetic", None, None, 3)
    assert len(pairs) == report.kept == 6
    assert [r.source for r in pairs[:3]] == ["synthetic:1", "synthetic:1", "synthetic:2"]
    assert pairs[0].prompt == pairs[1].prompt and pairs[0].completion != pairs[1].completion


def test_rewards_in_the_data(road, tmp_path, write):
    file = write(*rewarded(3.0, 1.0, 2.0))
    config = small(LabelledConfig, tmp_path, road, data=file, reward=None, limit=None)
    config = dataclasses.replace(config, eval_lines="1:")
    data = load_labelled(config)
    assert data.rewards.tolist() == [3.0, 1.0, 2.0] and data.rewards.dtype == torch.float64
    assert data.held_out_rewards.tolist() == [1.0, 2.0]
    assert [len(s.examples) for s in (data.train, data.held_out)] == [3, 2]


# --- who labels ---------------------------------------------------------------------------------


def test_an_ensemble_labels(road, tmp_path):
    """Its statistic and its heads, sequence by sequence."""
    folder = str(road / "reward" / "model")
    config = small(LabelledConfig, tmp_path, road, reward=folder, statistic="min", micro_tokens=90)
    data = load_labelled(config)
    ensemble = RewardEnsemble.load(folder).eval()
    scores = []
    with torch.no_grad(), attention(ensemble.encoder, "eager"):
        for e in data.train.examples:
            ids = torch.tensor([e.prompt + e.completion])
            last = ensemble.encoder(input_ids=ids).last_hidden_state[0, -1]
            raw = ensemble.weight @ last + ensemble.bias
            scores.append((raw - ensemble.center) / ensemble.scale)
    expected = torch.stack(scores).min(1).values
    assert len(expected) == 16
    assert (data.rewards - expected).abs().max() < 100 * FLOAT32
    data.kept.write()
    found = load_file(tmp_path / "computed" / "labels.safetensors")
    assert (found["heads"] - torch.stack(scores)).abs().max() < 100 * FLOAT32
    assert torch.equal(found["rewards"], data.rewards)


def test_gold_labels_what_is_trained_on(road, tmp_path):
    """The text of the tokens, prompt by prompt: what was cut off does not count."""
    data = load_labelled(small(LabelledConfig, tmp_path, road))
    records, _ = responses("synthetic", None, None, 8)
    expected = [gold_reward(str(r.prompt), str(r.completion)) for r in records]
    assert data.rewards.tolist() == pytest.approx(expected)
    short = load_labelled(small(LabelledConfig, tmp_path, road, max_length=80))
    assert short.scorer is not None
    texts = short.scorer.texts(short.train.examples)[1]
    assert any(len(t) < len(str(r.completion)) for t, r in zip(texts, records, strict=True))
    expected = [gold_reward(str(r.prompt), t) for r, t in zip(records, texts, strict=True)]
    assert short.rewards.tolist() == pytest.approx(expected)


def test_a_function_labels(road, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def n(prompts, responses):\n    return [len(r) for r in responses]\n")
    data = load_labelled(small(LabelledConfig, tmp_path, road, reward=f"{file}:n"))
    records, _ = responses("synthetic", None, None, 8)
    assert data.rewards.tolist() == [len(str(r.completion)) for r in records]


def test_standardised_rewards():
    z = standardised(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    expected = [-1.161895004, -0.387298335, 0.387298335, 1.161895004]
    assert z.dtype == torch.float64 and z.tolist() == pytest.approx(expected, abs=1e-9)
    of = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert standardised(torch.tensor([5.0]), of).tolist() == pytest.approx([1.936491673])


# --- computed once ------------------------------------------------------------------------------


def examples():
    return [TokenizedCompletion([1, 2], [3], None), TokenizedCompletion([1], [2, 3], None)]


def test_keys_tell_data_and_models_apart():
    one, two = examples()
    cpu = torch.device("cpu")
    full, half = Meter(cpu, torch.float32), Meter(cpu, torch.bfloat16)
    keys = {
        key_of([one, two], full, proxy="mean"),
        key_of([two, one], full, proxy="mean"),
        key_of([one], full, proxy="mean"),
        key_of([one, two], full, proxy="min"),
        key_of([TokenizedCompletion([1], [2, 3], None)] * 2, full, proxy="mean"),
        key_of([one, two], half, proxy="mean"),
        key_of([one, two], Meter(torch.device("meta"), torch.float32), proxy="mean"),
    }
    assert len(keys) == 7
    assert key_of(examples(), Meter(cpu, torch.float32), proxy="mean") in keys


def test_what_was_kept_is_read_back(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastalign")
    kept = Kept(tmp_path)
    assert kept.get("labels", "a", lambda: {"x": torch.ones(3)})["x"].tolist() == [1.0] * 3
    assert not any(tmp_path.iterdir())
    kept.write()

    def never():
        raise AssertionError("computed again")

    assert Kept(tmp_path).get("labels", "a", never)["x"].tolist() == [1.0] * 3
    again = Kept(tmp_path).get("labels", "b", lambda: {"x": torch.zeros(3)})
    assert again["x"].tolist() == [0.0] * 3
    assert "of other data, models or precision" in caplog.text
    file = tmp_path / "computed" / "labels.safetensors"
    file.write_bytes(file.read_bytes()[:30])
    found = Kept(tmp_path).get("labels", "a", lambda: {"x": torch.zeros(2)})
    assert found["x"].tolist() == [0.0] * 2 and "labels.safetensors is damaged" in caplog.text


def test_a_resumed_run_does_not_score_again(road, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fastalign")
    folder = str(road / "reward" / "model")
    config = small(mle.MLEConfig, tmp_path, road, reward=folder, limit=6, epochs=1, keep=0.5)
    mle.train(config)
    assert len([line for line in caplog.messages if line.startswith("energy: ")]) == 1
    cost = json.loads((tmp_path / "accounting.json").read_text())["phases"]["score"]
    assert cost["flops"] > 0 and cost["seconds"] > 0

    def never(*args):
        raise AssertionError("scored again")

    monkeypatch.setattr(labels.Scorer, "label", never)
    mle.train(dataclasses.replace(config, resume="auto"))
    again = json.loads((tmp_path / "accounting.json").read_text())["phases"]["score"]
    assert again == cost
    assert len(lines_of(tmp_path, "data")) == 1


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [mle, rwr])
@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([PAIR] * 2, "reward is missing: give the data a number reward or score (fastalign score"),
        (rewarded(2.0, 2.0, 2.0), "all 3 rewards are 2: there is nothing to tell good responses"),
        (rewarded(2.0), "all 1 rewards are 2"),
    ],
)
def test_rewards_that_are_none(road, tmp_path, write, method, records, said):
    config = {mle: mle.MLEConfig, rwr: rwr.RWRConfig}[method]
    folder = tmp_path / "run"
    with pytest.raises((RunError, DataError)) as error:
        method.train(
            small(config, folder, road, data=write(*records), reward=None, eval_data="synthetic")
            if "missing" in said
            else small(config, folder, road, data=write(*records), reward=None)
        )
    assert said in str(error.value)
    assert not any(folder.iterdir())


def test_rewards_that_cannot_be_had(road, tmp_path, write):
    with pytest.raises(DataError, match="synthetic: its responses have no rewards: label them"):
        load_labelled(small(LabelledConfig, tmp_path, road, reward=None))
    with pytest.raises(RunError, match="--reward gold is the built-in task's; .* has none"):
        load_labelled(small(LabelledConfig, tmp_path, road, data=write(PAIR)))
    with pytest.raises(RunError, match="--statistic and --coef are a reward ensemble's"):
        small(LabelledConfig, tmp_path, road, statistic="min")
    with pytest.raises(RunError, match="unknown statistic 'worst'"):
        small(LabelledConfig, tmp_path, road, reward="x", statistic="worst")
    with pytest.raises(RunError, match="max_length 300 is more than the 256 tokens"):
        load_labelled(small(LabelledConfig, tmp_path, road, max_length=300))
    assert Path(tmp_path / "computed").exists() is False
