"""What samples are worth before and after learning from given responses."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import a_single_thread
from labelled_runs import assert_resumes, lines_of, small, weights_of, without_clocks
from plain_logprobs import plain_logprobs
from preference_runs import config as pairs_config
from preference_runs import records

from fastalign.data.condition import Condition, Tagger
from fastalign.data.synthetic import gold_reward
from fastalign.data.tokens import TokenizedCompletion
from fastalign.models import Policy, load_tokenizer
from fastalign.report import write_report
from fastalign.rollout import Rollout, SamplingConfig
from fastalign.testing import TOLERANCES
from fastalign.train import dpo, dt, mle, sft
from fastalign.train.asking import Asking, AskingCollector
from fastalign.train.dpo import DPOConfig
from fastalign.train.dt import DTConfig
from fastalign.train.mle import MLEConfig
from fastalign.train.run import RunError
from fastalign.train.sampled import Sampled, gold_source

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor
SAMPLING = SamplingConfig(max_new_tokens=6)
SAMPLED = {"eval_reward": "gold", "eval_samples": 2, "sampling": SAMPLING}


def evaluation_of(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def filtered(road, tmp_path_factory):
    """A run of mle that measures its samples by gold."""
    folder = tmp_path_factory.mktemp("filtered")
    with a_single_thread():  # as the runs that it is compared with
        mle.train(small(MLEConfig, folder, road, keep=0.5, lr=1e-3, **SAMPLED))
    return folder


def test_before_and_after_answer_the_same_prompts(filtered):
    """Of 3 held-out prompts 2 responses each; KL is to the start, and the errors of the changes are
    those of the differences prompt by prompt."""
    found = evaluation_of(filtered)
    before, after = found["before"], found["after"]
    assert (found["n_prompts"], found["n_samples"], before["n"], after["n"]) == (3, 2, 6, 6)
    assert before["kl/k1"] == 0 and before["kl/k3"] == 0 and after["kl/k3"] > 0
    assert before["sampling_gap"] < FLOAT32 and after["sampling_gap"] < FLOAT32
    assert 1 <= after["length"] <= 6
    assert {"reward/gold", "kl/k1", "kl/k3", "length", "finished"} == set(found["change_stderr"])
    assert "reward/proxy" not in before
    assert found["change_stderr"]["kl/k1"] == pytest.approx(after["kl/k1_stderr"])
    assert found["names"] == {"before": "the start", "after": "MLE"}
    first, last = (line for line in lines_of(filtered, "eval"))
    for line, numbers in ((first, before), (last, after)):
        assert {name: line[name] for name in numbers} == numbers
        assert line["perplexity"] > 1  # the held-out responses beside the samples
    records = [json.loads(line) for line in (filtered / "samples.jsonl").open()]
    for side in ("before", "after"):
        for record in records:
            gold = gold_reward(record["prompt"], record[side])
            assert record[f"{side}_reward"] == {"gold": pytest.approx(gold, abs=1e-6)}


def test_a_run_learns_the_same_without(filtered, road, tmp_path):
    mle.train(small(MLEConfig, tmp_path, road, keep=0.5, lr=1e-3))
    ours, theirs = weights_of(filtered), weights_of(tmp_path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    plain = without_clocks(lines_of(tmp_path, "train"))
    assert plain == without_clocks(lines_of(filtered, "train"))
    assert not (tmp_path / "evaluation.json").exists()


def test_its_report(filtered):
    write_report(filtered)
    page = (filtered / "report.html").read_text()
    assert "MLE against the start: gold reward" in page
    assert 'id="plot-given-loss"' in page and 'id="before-after"' in page
    assert "Reward against KL" not in page  # which has no course to show


def test_resumed_is_the_same_run(road, tmp_path, monkeypatch):
    config = small(MLEConfig, tmp_path, road, keep=0.5, lr=1e-3, **SAMPLED)
    assert_resumes(mle, config, monkeypatch)
    parts = tmp_path / "parts"
    lines = lines_of(parts)
    mle.train(dataclasses.replace(config, output=str(parts), resume="auto"))
    assert lines_of(parts) == lines  # it was over: nothing is measured again
    whole, parts = (evaluation_of(tmp_path / name) for name in ("whole", "parts"))
    for name in ("before", "after", "change_stderr"):
        assert whole[name] == parts[name]


def test_asked_for_when_the_run_is_over(filtered, road, tmp_path):
    """The start is measured though the policy has moved on; so it is by another reward."""
    config = small(MLEConfig, tmp_path, road, keep=0.5, lr=1e-3)
    mle.train(config)
    mle.train(dataclasses.replace(config, resume="auto", **SAMPLED))
    late, whole = evaluation_of(tmp_path), evaluation_of(filtered)
    assert late["before"] == whole["before"] and late["after"] == whole["after"]
    (tmp_path / "judge.py").write_text(
        "def length(prompts, responses):\n    return [len(r) for r in responses]\n"
    )
    other = SAMPLED | {"eval_reward": f"{tmp_path}/judge.py:length"}
    mle.train(dataclasses.replace(config, resume="auto", **other))
    again = evaluation_of(tmp_path)
    assert again["after"]["reward/held_out"] > 0
    assert again["after"]["reward/gold"] == pytest.approx(whole["after"]["reward/gold"], abs=1e-6)


def test_random_states_stay_what_they_were(road):
    """And every evaluation of the same policy finds the same."""
    folder = str(road / "sft" / "model")
    tokenizer = load_tokenizer(folder)
    policy = Policy.load(folder, tokenizer)
    example = TokenizedCompletion(tokenizer.encode("Human: Say it. Assistant:"), [5], None)
    changes = SAMPLED | {"eval_reward": f"{road}/reward/model", "data": "elsewhere.jsonl"}
    config = small(MLEConfig, road / "none", road, **changes)
    run: Any = SimpleNamespace(meter=SimpleNamespace(phase=lambda name: torch.no_grad()))
    found = []
    for draws in (0, 5):
        torch.rand(draws)
        state = torch.get_rng_state()
        sampled = Sampled(config, policy, tokenizer, [example] * 3)
        found += [sampled.before(run), sampled.after(run)]
        assert torch.equal(torch.get_rng_state(), state)
        assert len(sampled.prompts) == 1  # each once
    assert all(numbers == found[0] for numbers in found)
    assert "reward/held_out" in found[0] and "reward/held_out_std" in found[0]
    assert "reward/proxy" not in found[0]
    for n_samples, taken in ((2, True), (3, False)):  # of other samples nothing is taken
        resumed = Sampled(
            dataclasses.replace(config, eval_samples=n_samples), policy, tokenizer, [example]
        )
        resumed.load_state_dict(sampled.state_dict())
        assert resumed.unfinished != taken


# --- asked for a reward ---------------------------------------------------------------------------


class Scripted:
    """Answers what it is told to, with log-probs that count up."""

    def __init__(self, completions):
        self.completions, self.asked = completions, []

    def sync(self):
        pass

    def generate(self, prompts, n_samples, sampling):
        self.asked += prompts
        return [
            Rollout(i, p, c, [float(k) for k in range(len(c))], True)
            for i, (p, c) in enumerate(zip(prompts, self.completions, strict=True))
        ]


def test_the_policy_reads_the_tag_and_nobody_else(road):
    """Log-probs of the policy are of tagged prompts and answers with their space, without the
    space's own; the reference's are of neither."""
    folder = str(road / "sft" / "model")
    tokenizer = load_tokenizer(folder)
    reference, policy = (Policy.load(folder, tokenizer) for _ in range(2))
    rewards = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    asking = Asking(Tagger(Condition.of(rewards, {}), tokenizer), 2.5)
    eos, space = tokenizer.eos_token_id, tokenizer.encode(" ")
    assert len(space) == 1
    prompts = [tokenizer.encode(t) for t in ("Human: Say it. Assistant:", "Human: No. Assistant:")]
    answers = [tokenizer.encode(" It is good."), tokenizer.encode(" yes")]
    written = [[*answers[0], *space, eos], answers[1]]  # the second was cut off
    engine = Scripted(written)
    collector = AskingCollector(
        asking,
        engine,
        reference,
        gold_source("synthetic"),
        tokenizer,
        SAMPLING,
        512,
        "float32",
        lambda prompt, response: float(len(response)),
    )
    collector.reward.functions = {"synthetic.gold_reward": lambda p, r: [len(x) for x in r]}
    found = collector.collect(prompts, ["Say it.", "No."], 1)
    assert [tokenizer.decode(ids) for ids in engine.asked] == [
        f"Human: {words} Assistant: <rm_score>: 2.50 " for words in ("Say it.", "No.")
    ]
    plain = [[*answers[0], eos], answers[1]]
    assert [r.completion for r in found.rollouts] == plain
    assert [r.prompt for r in found.rollouts] == prompts
    n = len(answers[0])
    assert found.logp.tolist() == [*range(n), n + 1, *range(len(answers[1]))]
    assert found.gold is not None
    assert found.gold.tolist() == [len(" It is good."), len(" yes")] == found.proxy.tolist()
    ref = plain_logprobs(
        folder, [TokenizedCompletion(p, c, None) for p, c in zip(prompts, plain, strict=True)]
    )
    torch.testing.assert_close(found.ref_logp.double(), torch.cat(ref), rtol=0, atol=100 * FLOAT32)
    tagged = [asking.prompt(p) for p in prompts]
    whole = plain_logprobs(
        folder, [TokenizedCompletion(p, c, None) for p, c in zip(tagged, written, strict=True)]
    )
    own = torch.cat([whole[0][:n], whole[0][n + 1 :], whole[1]])
    logp, entropy = collector.logprobs(policy, found.rollouts, entropy=True)
    torch.testing.assert_close(logp.double(), own, rtol=0, atol=100 * FLOAT32)
    assert entropy is not None and entropy.shape == logp.shape and bool((entropy > 0).all())


def test_dt_is_asked_for_the_best_it_has_seen(road, tmp_path):
    config = small(DTConfig, tmp_path, road, limit=6, epochs=1, **SAMPLED)
    model = dt.train(config)
    found, highest = evaluation_of(tmp_path), Condition.load(model).highest
    assert found["target_reward"] == highest
    assert found["names"]["after"] == f"DT at {highest:+.2f}"
    assert found["before"]["kl/k1"] == 0
    assert found["after"]["sampling_gap"] < FLOAT32  # log-probs are of what was read


# --- other methods --------------------------------------------------------------------------------


def test_dpo_and_its_report(road, tmp_path, write):
    config = pairs_config(tmp_path / "run", str(road / "sft" / "model"), write(*records()))
    changes = {"eval_lines": "0:3", "lr": 1e-3, **SAMPLED}
    changes["eval_reward"] = f"{road}/reward/model"
    dpo.train(dataclasses.replace(config, **changes))
    found = evaluation_of(tmp_path / "run")
    assert found["before"]["kl/k1"] == 0 and found["after"]["kl/k3"] > 0
    assert found["n_prompts"] == 3 and "reward/held_out" in found["change_stderr"]
    last = lines_of(tmp_path / "run", "eval")[-1]
    assert {"loss", "rewards/accuracies", "reward/held_out", "kl/k1"} <= last.keys()
    write_report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "DPO against the start: held-out reward" in page
    for part in ("before-after", "preferences", "samples"):
        assert f'<section id="{part}">' in page


def test_the_name_of_the_reward(road, tmp_path):
    """A reward that labels is the proxy; one that does not is held out."""
    for reward, name in ((f"{road}/reward/model", "reward/proxy"), ("gold", "reward/held_out")):
        changes = SAMPLED | {"reward": reward, "eval_reward": f"{road}/reward/model"}
        folder = tmp_path / name
        mle.train(small(MLEConfig, folder, road, epochs=1, limit=4, **changes))
        found = evaluation_of(folder)
        assert name in found["after"] and "reward/gold" in found["after"]
        assert {"reward/proxy", "reward/held_out"} & found["after"].keys() == {name}


def test_bad_input(road, tmp_path, write):
    model = str(road / "sft" / "model")
    for changes, said in (
        ({"eval_reward": "gold", "data": "rows.jsonl"}, "gold is the built-in task's; rows.jsonl"),
        ({"eval_reward": "nowhere"}, "--eval_reward nowhere: there is no nowhere"),
        ({"eval_reward": "0.5*no.py:fn"}, "there is no no.py"),
        ({"eval_samples": 0}, "expected eval_samples >= 1, got 0"),
    ):
        for config in (sft.SFTConfig, DPOConfig):
            with pytest.raises(RunError, match=said):
                config(**({"output": str(tmp_path), "model": model} | changes))
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"target_reward": 1.0}, "--target_reward is asked for in the evaluation: give"),
        ({"target_reward": float("nan"), **SAMPLED}, "expected a finite number, got nan"),
    )
    for changes, said in refused:
        with pytest.raises(RunError, match=said):
            small(DTConfig, tmp_path, road, **changes)
    rows = [{"prompt": "a" * i, "completion": " a", "reward": i} for i in range(1, 4)]
    judge = {
        "data": write(*rows),
        "reward": None,
        "keep": 0.5,
        "eval_reward": f"{road}/reward/model",
    }
    with pytest.raises(RunError, match="--eval_reward needs held-out prompts: give --eval_data"):
        mle.train(small(MLEConfig, tmp_path / "run", road, **judge))
    judge |= {"eval_lines": "0:3", "sampling": SamplingConfig(max_new_tokens=256)}
    with pytest.raises(RunError, match="max_new_tokens 256 leaves no room for any of 3 held-out"):
        mle.train(small(MLEConfig, tmp_path / "run", road, **judge))
    assert not any((tmp_path / "run").iterdir())
