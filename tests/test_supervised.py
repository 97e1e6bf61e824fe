"""The loop of all methods that learn from given responses: inputs, normalisers, evaluation."""

import json
import math
from typing import Any

import pytest
import torch
from plain_logprobs import plain_logprobs

from fastalign import losses
from fastalign.data import source
from fastalign.data.tokens import TokenizedCompletion
from fastalign.models import Policy, load_tokenizer
from fastalign.testing import TOLERANCES
from fastalign.train import supervised
from fastalign.train.run import RunError, begin
from fastalign.train.supervised import Samples, Supervised, SupervisedConfig

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor


def config_of(folder, road, **changes):
    values: dict[str, Any] = {
        "output": str(folder),
        "model": str(road / "sft" / "model"),
        "max_length": 256,
        "limit": 12,
        "eval_limit": 4,
        "epochs": 1,
        "batch_tokens": 400,
        "eval_every": 1,
    }
    return SupervisedConfig(**(values | changes))


def lines_of(folder, phase):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def examples():
    return [TokenizedCompletion([1, 2], [3, 4, 5], None), TokenizedCompletion([6], [7], 0.5)]


# --- samples ------------------------------------------------------------------------------------


def test_inputs_follow_their_tokens_into_a_pack():
    samples = Samples(examples(), {"weights": torch.tensor([0.3, 0.4, 0.5, 0.7])})
    assert (samples.lengths, samples.response_lengths) == ([5, 2], [3, 1])
    pack, inputs = samples.of([1, 0], torch.device("cpu"))
    assert pack.input_ids.tolist() == [6, 7, 1, 2, 3, 4, 5]
    assert pack.response_targets.tolist() == [7, 3, 4, 5]
    assert inputs["weights"].tolist() == pytest.approx([0.7, 0.3, 0.4, 0.5])
    assert samples.per_token(torch.tensor([2.0, 9.0])).tolist() == [2.0, 2.0, 2.0, 9.0]


def test_reading_held_out_records(caplog):
    config = SupervisedConfig(limit=3, eval_limit=2)
    (train, _), held = supervised.read(config, source.completions)
    assert held is not None
    assert [len(train), len(held[0])] == [3, 2]
    assert {r.prompt for r in train}.isdisjoint(r.prompt for r in held[0])


def test_no_held_out_records(write):
    path = write(*[{"prompt": "a", "completion": " b"}] * 2)
    found, held = supervised.read(SupervisedConfig(data=path), source.completions)
    assert len(found[0]) == 2 and held is None
    assert supervised.tokenize(held, None, 8) == []


# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_tokens", [8192, 90])
def test_weighted_losses_are_those_of_plain_transformers(road, tmp_path, micro_tokens):
    """sum(-w logp) / tokens of the batch and of the held-out data, from one set of weights."""
    config = config_of(tmp_path, road, micro_tokens=micro_tokens, lr=0.0)
    begin(config)
    tokenizer = load_tokenizer(config.model)
    parts = []
    for found in supervised.read(config, source.completions):
        samples = Samples(supervised.tokenize(found, tokenizer, 256))
        samples.inputs["weights"] = torch.rand(samples.starts[-1]) * 3
        parts.append(samples)
    train, held_out = parts
    policy = Policy.load(config.model, tokenizer)
    run = Supervised(config, policy, tokenizer, train, held_out, losses.MLE())
    assert len(run.schedule) >= 2 and sorted(sum(run.schedule, [])) == list(range(12))
    run.run()
    logp = plain_logprobs(config.model, train.examples)
    weights = train.inputs["weights"].double().split(train.response_lengths)
    for batch, line in zip(run.schedule, lines_of(tmp_path, "train"), strict=True):
        n_tokens = sum(train.response_lengths[i] for i in batch)
        loss = -sum((weights[i] * logp[i]).sum() for i in batch) / n_tokens
        assert line["loss"] == pytest.approx(loss.item(), rel=100 * FLOAT32)
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert line["tokens"] == sum(train.lengths[i] for i in batch)
    held = torch.cat(plain_logprobs(config.model, held_out.examples))
    loss = -(held_out.inputs["weights"] * held).mean().item()
    lines = lines_of(tmp_path, "eval")
    assert [line["step"] for line in lines] == list(range(len(run.schedule) + 1))
    for line in lines:
        assert line["loss"] == pytest.approx(loss, rel=100 * FLOAT32)
        assert line["perplexity"] == pytest.approx(math.exp(-held.mean().item()), rel=1e-4)


def test_without_held_out_data_nothing_is_evaluated(road, tmp_path):
    config = config_of(tmp_path, road, limit=4)
    begin(config)
    tokenizer = load_tokenizer(config.model)
    found, _ = supervised.read(config, source.completions)
    samples = Samples(supervised.tokenize(found, tokenizer, 256))
    policy = Policy.load(config.model, tokenizer)
    model = Supervised(config, policy, tokenizer, samples, Samples([])).run()
    assert lines_of(tmp_path, "eval") == [] and (model / "model.safetensors").is_file()


def test_sequences_longer_than_the_context_are_refused(road, tmp_path):
    config = config_of(tmp_path, road, max_length=512)
    policy = Policy.load(config.model, load_tokenizer(config.model))
    with pytest.raises(RunError, match="max_length 512 is more than the 256 tokens"):
        Supervised(config, policy, None, Samples(examples()), Samples([]))
