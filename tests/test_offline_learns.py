"""Methods on given responses raise what the policy's samples are worth, on the built-in task."""

import json
import re
from typing import Any

import pytest
import torch

from fastalign.data.synthetic import TOPICS, SyntheticTask, gold_reward, topic_of
from fastalign.rollout import SamplingConfig
from fastalign.train import dt, mle, rwr, sft
from fastalign.train.dt import DTConfig
from fastalign.train.labels import standardised
from fastalign.train.mle import MLEConfig
from fastalign.train.rwr import RWRConfig

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = 4


def one_sentence_answers():
    """Prompts about one topic with the first sentences of the task's own answers to such prompts,
    the distinct ones in turn, and their gold rewards."""
    topic = next(iter(TOPICS))
    found = [c for c in SyntheticTask().completions(4000) if topic_of(str(c.prompt)) == topic]
    sentences = [re.match(r"[^.!?]+[.!?]", str(c.completion).strip()) for c in found]
    texts = list(dict.fromkeys(s.group(0) for s in sentences if s is not None))
    prompts = [str(c.prompt) for c in found[:PROMPTS]]
    pairs = [(prompts[i % PROMPTS], text) for i, text in enumerate(texts)]
    return [{"prompt": p, "completion": f" {t}", "reward": gold_reward(p, t)} for p, t in pairs]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that answers as the data do, the good and the poor; and the options of all runs."""
    folder = tmp_path_factory.mktemp("start")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in one_sentence_answers()))
    (folder / "task.py").write_text(
        "from fastalign.data.synthetic import gold_reward\n\n\n"
        "def gold(prompts, responses):\n"
        "    return [gold_reward(p, r) for p, r in zip(prompts, responses)]\n\n\n"
        "def whole(prompts, responses):\n"
        "    return [round(x) for x in gold(prompts, responses)]\n"
    )
    options: dict[str, Any] = {"data": str(data), "eval_lines": f"0:{PROMPTS}", "max_length": 64}
    options |= {"batch_tokens": 512, "warmup": 0.1}
    sft.train(
        sft.SFTConfig(
            output=str(folder / "sft"),
            model="scratch:1m",
            vocab_size=400,
            epochs=14,
            lr=5e-3,
            **options,
        )
    )
    options |= {"model": str(folder / "sft" / "model"), "epochs": 10, "lr": 2e-3}
    options |= {"eval_reward": f"{folder}/task.py:gold", "eval_samples": 12}
    return options | {"sampling": SamplingConfig(max_new_tokens=24)}


def measured(folder):
    """Gold before and after, and the standard error of the change."""
    found = json.loads((folder / "evaluation.json").read_text())
    key = next(k for k in ("reward/proxy", "reward/held_out") if k in found["after"])
    return found["before"][key], found["after"][key], found["change_stderr"][key]


@pytest.mark.parametrize("method", ["mle", "rwr"])
def test_samples_are_worth_more(start, tmp_path, method):
    if method == "mle":
        mle.train(MLEConfig(output=str(tmp_path), keep=0.3, **start))
    else:
        rwr.train(RWRConfig(output=str(tmp_path), beta=0.3, **start))
    before, after, error = measured(tmp_path)
    assert after - before > max(0.3, 2 * error), (before, after, error)


def test_a_high_target_brings_more_than_the_start_and_than_a_low_one(start, tmp_path):
    """Of rewards in whole numbers, so that each tag is seen often."""
    rewards = torch.tensor([round(row["reward"]) for row in one_sentence_answers()])
    z = standardised(rewards)
    targets = f"{z.min():.2f},{z.max():.2f}"
    whole = start["eval_reward"].replace(":gold", ":whole")
    dt.train(DTConfig(output=str(tmp_path), reward=whole, eval_targets=targets, **start))
    before, after, error = measured(tmp_path)
    low, high = json.loads((tmp_path / "targets.json").read_text())
    assert after - before > max(0.3, 2 * error), (before, after, error)
    assert high["reward"] - low["reward"] > 0.5, (low, high)
