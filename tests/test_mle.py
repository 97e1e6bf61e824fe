"""Filtered maximum likelihood: what is kept, what is lost, what is trained on."""

import json
import logging
import math

import pytest
import torch
from labelled_runs import assert_resumes, lines_of, small
from plain_logprobs import plain_logprobs

from fastalign import cli
from fastalign.testing import TOLERANCES
from fastalign.train import mle
from fastalign.train.labels import load_labelled
from fastalign.train.mle import MLEConfig, best_of_prompts, threshold_of
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor


def kept(rewards, keep):
    rewards = torch.tensor(rewards)
    return (rewards > threshold_of(rewards, keep)).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("rewards", "keep", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], 0.5, [2, 3]),
        ([4.0, 1.0, 3.0, 2.0, 5.0], 0.5, [0, 4]),  # two of five are at most a half
        ([4.0, 1.0, 3.0, 2.0, 5.0], 0.6, [0, 2, 4]),
        ([1.0, 2.0, 3.0], 1.0, [0, 1, 2]),
        ([0.0, 1.0, 0.0, 1.0], 0.5, [1, 3]),
        ([0.0, 1.0, 0.0, 0.0], 0.5, [1]),  # ties below the best stay out together
        ([1.0, 1.0, 1.0, 0.0], 0.5, []),  # ... and so do the best
        ([3.0, 2.0], 0.3, []),
        ([float(i) for i in range(100)], 0.29, list(range(71, 100))),  # 0.29 * 100 < 29 in floats
    ],
)
def test_a_share_of_all(rewards, keep, expected):
    assert kept(rewards, keep) == expected


def test_the_best_of_each_prompt():
    prompts: list[tuple[int, ...]] = [(1,), (1,), (2,), (2,), (2,), (2,), (3,), (4,), (4,)]
    rewards = torch.tensor([5.0, 4.0, -1.0, -2.0, -3.0, -4.0, -9.0, 7.0, 7.0])
    found = best_of_prompts(rewards, prompts, 0.5)
    assert found.nonzero().flatten().tolist() == [0, 2, 3, 6, 7, 8]


def test_a_run_keeps_the_best_and_says_so(road, tmp_path, caplog):
    """Its first loss is that of the kept responses, its held-out loss that of as good ones."""
    caplog.set_level(logging.INFO, "fastalign")
    config = small(MLEConfig, tmp_path, road, keep=0.3, epochs=1, batch_tokens=4096, eval_limit=8)
    data = load_labelled(config)
    mle.train(config)
    order = data.rewards.sort(descending=True)
    best = order.indices[:4].tolist()  # of 16
    t = order.values[4]
    assert len({round(r, 6) for r in order.values[:5].tolist()}) == 5
    (facts,) = lines_of(tmp_path, "data")
    prompts = {tuple(e.prompt) for e in data.train.examples}
    left = {tuple(data.train.examples[i].prompt) for i in best}
    expected = {
        "data/samples": 16,
        "data/kept": 4,
        "data/prompts": 8,
        "data/prompts_lost": len(prompts - left),
        "data/reward": data.rewards.mean().item(),
        "data/reward_kept": data.rewards[best].mean().item(),
        "data/lowest_kept": order.values[3].item(),
    }
    assert {k: v for k, v in facts.items() if k.startswith("data/")} == pytest.approx(expected)
    assert len(prompts - left) >= 4
    assert f"kept 4 of 16 responses: mean reward {data.rewards.mean():.3f} ->" in caplog.text
    logp = torch.cat(plain_logprobs(config.model, [data.train.examples[i] for i in best]))
    (line,) = lines_of(tmp_path, "train")
    assert line["loss"] == pytest.approx(-logp.mean().item(), rel=100 * FLOAT32)
    good = (data.held_out_rewards > t).nonzero().flatten().tolist()
    assert 0 < len(good) < 16
    held = torch.cat(plain_logprobs(config.model, [data.held_out.examples[i] for i in good]))
    assert lines_of(tmp_path, "eval")[0]["loss"] == pytest.approx(
        -held.mean().item(), rel=100 * FLOAT32
    )


@pytest.mark.parametrize("changes", [{"filter": "per_prompt", "keep": 0.5}, {"threshold": 0.0}])
def test_other_filters(road, tmp_path, changes):
    config = small(MLEConfig, tmp_path, road, epochs=1, batch_tokens=4096, **changes)
    data = load_labelled(config)
    mle.train(config)
    (facts,) = lines_of(tmp_path, "data")
    if "threshold" in changes:
        rows = (data.rewards > data.rewards.mean()).nonzero().flatten().tolist()
    else:  # the pairs stand side by side
        rows = [i + int(data.rewards[i + 1] > data.rewards[i]) for i in range(0, 16, 2)]
        assert facts["data/prompts_lost"] == 0
    assert facts["data/kept"] == len(rows)
    logp = torch.cat(plain_logprobs(config.model, [data.train.examples[i] for i in rows]))
    (line,) = lines_of(tmp_path, "train")
    assert line["loss"] == pytest.approx(-logp.mean().item(), rel=100 * FLOAT32)


def test_resumed_is_the_same_run(road, tmp_path, monkeypatch):
    config = small(MLEConfig, tmp_path, road, keep=0.5, eval_every=2)
    assert_resumes(mle, config, monkeypatch)


def test_the_command_and_its_report(road, tmp_path):
    folder = tmp_path / "run"
    options = f"--model {road}/sft/model --reward {road}/reward/model --max_length 256 --limit 4"
    cli.main(["train", "mle", "--output", str(folder), *options.split(), "--eval_limit", "2"])
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "model" / "config.json").read_text())["vocab_size"] == 300


def test_bad_input(road, tmp_path, write):
    rows = [{"prompt": f"{i}", "completion": " a", "reward": r} for i, r in enumerate([1, 1, 0])]
    folder = tmp_path / "run"
    config = small(MLEConfig, folder, road, data=write(*rows), reward=None, keep=0.5)
    said = "keeps none of 3 responses: 2 share the highest reward, 0.58 standard deviations above"
    with pytest.raises(RunError, match=said) as error:
        mle.train(config)
    assert str(error.value).endswith("raise --keep to 0.667")
    config = small(MLEConfig, folder, road, data=write(*rows), reward=None, threshold=9.0)
    with pytest.raises(RunError, match="keeps none of 3"):
        mle.train(config)
    assert not any(folder.iterdir())
    for changes, words in (
        ({"keep": 0.0}, "expected 0 < keep <= 1, got 0.0"),
        ({"keep": 1.5}, "expected 0 < keep <= 1, got 1.5"),
        ({"filter": "best"}, "unknown filter 'best': expected global or per_prompt"),
        ({"threshold": math.nan}, "expected a finite threshold, got nan"),
        ({"threshold": 0.0, "filter": "per_prompt"}, "--filter per_prompt contradicts it"),
    ):
        with pytest.raises(RunError, match=words):
            small(MLEConfig, tmp_path, road, **changes)
