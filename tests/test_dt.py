"""Return-conditioned fine-tuning: the reward's text, what is learned from, what asking brings."""

import json
import logging

import pytest
import torch
from labelled_runs import assert_resumes, lines_of, small
from plain_logprobs import plain_logprobs

from fastalign import cli
from fastalign.data.condition import FILE, Condition, Tagger, condition
from fastalign.data.tokenizer import train_tokenizer
from fastalign.data.tokens import TokenizedCompletion
from fastalign.errors import UserError
from fastalign.models import load_tokenizer
from fastalign.rollout import SamplingConfig
from fastalign.testing import TOLERANCES
from fastalign.train import dt
from fastalign.train.dt import DTConfig
from fastalign.train.labels import load_labelled, standardised
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor
FOUR = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


def tokenizer():
    return train_tokenizer(["Human: Say it. Assistant: It is <rm_score>: 1.25 good."], 300)


# --- the text -----------------------------------------------------------------------------------


def test_the_text_of_a_reward():
    """r = 1, 2, 3, 4 by their mean and their std with n - 1, as in the source's code."""
    found = Condition.of(FOUR, {})
    texts = [found.text("Q: a? Assistant: ", found.z(r)) for r in FOUR.tolist()]
    assert texts == [
        f"Q: a? Assistant:  <rm_score>: {r} " for r in ("-1.16", "-0.39", "0.39", "1.16")
    ]
    assert (found.mean, found.samples) == (2.5, 4)
    assert found.std == pytest.approx(1.290994449, abs=1e-9)
    assert (found.lowest, found.highest) == pytest.approx((-1.161895004, 1.161895004), abs=1e-9)
    assert found.text("{reward}", 5.0) == "{reward} <rm_score>: 5.00 "


def test_a_sample_is_prompt_answer_space_and_eos():
    words = tokenizer()
    tagger = Tagger(Condition.of(FOUR, {}), words)
    prompt, answer = words.encode("Say it. Assistant:"), words.encode(" It is good.")
    eos = words.eos_token_id
    example = TokenizedCompletion(prompt, [*answer, eos], 4.0)
    found = tagger.sample(example, 1.161895, 512)
    assert found is not None
    assert words.decode(found.prompt) == "Say it. Assistant: <rm_score>: 1.16 "
    assert words.decode(found.completion) == f" It is good. {words.eos_token}"
    assert (found.completion[-1], found.completion.count(eos)) == (eos, 1)
    assert found.prompt[: len(prompt)] == prompt
    assert tagger.answer(found.completion) == example.completion
    assert tagger.answer(answer) == answer  # one that did not end


def test_the_tag_is_never_cut():
    words = tokenizer()
    tagger = Tagger(Condition.of(FOUR, {}), words)
    example = TokenizedCompletion(words.encode("Say it."), [5, 6, 7, words.eos_token_id], None)
    whole = tagger.prompt(example.prompt, -1.25)
    cut = tagger.sample(example, -1.25, len(whole) + 2)
    assert cut is not None and (cut.prompt, cut.completion) == (whole, [5, 6])
    assert tagger.sample(example, -1.25, len(whole)) is None


def test_asking_a_saved_model(tmp_path):
    words = tokenizer()
    with pytest.raises(UserError, match=f"is not conditioned: {FILE} is missing"):
        condition([[1]], tmp_path, words, reward=1.0)
    Condition.of(FOUR, {"proxy": "mean"}).save(tmp_path)
    assert Condition.load(tmp_path) == Condition.of(FOUR, {"proxy": "mean"})
    prompts = [words.encode(t) for t in ("Say it.", "It is")]
    asked = [words.decode(ids) for ids in condition(prompts, tmp_path, words, reward=5)]
    assert asked == ["Say it. <rm_score>: 5.00 ", "It is <rm_score>: 5.00 "]
    (raw, _) = condition(prompts, tmp_path, words, reward=4.0, raw=True)
    assert words.decode(raw) == "Say it. <rm_score>: 1.16 "
    (tmp_path / FILE).write_text('{"mean": 1}')
    with pytest.raises(UserError, match="reward_condition.json is not readable"):
        Condition.load(tmp_path)


# --- a run --------------------------------------------------------------------------------------


def test_a_run(road, tmp_path, caplog):
    """Its first loss is that of answers after tagged prompts; prompts and tags have none."""
    caplog.set_level(logging.INFO, "fastalign")
    config = small(
        DTConfig,
        tmp_path,
        road,
        epochs=1,
        batch_tokens=4096,
        eval_targets="-1,2.5,-1",
        eval_samples=2,
        sampling=SamplingConfig(max_new_tokens=6),
    )
    data = load_labelled(config)
    model = dt.train(config)
    z = standardised(data.rewards)
    words = load_tokenizer(config.model)
    samples = []
    for e, r in zip(data.train.examples, z.tolist(), strict=True):
        prompt = e.prompt + words.encode(f" <rm_score>: {r:.2f} ", add_special_tokens=False)
        answer = [*e.completion[:-1], *words.encode(" "), words.eos_token_id]
        if e.completion[-1] != words.eos_token_id:
            answer = e.completion
        if len(prompt) < 256:
            samples.append(TokenizedCompletion(prompt, answer[: 256 - len(prompt)], None))
    logp = torch.cat(plain_logprobs(config.model, samples))
    (line,) = lines_of(tmp_path, "train")
    assert line["loss"] == pytest.approx(-logp.mean().item(), rel=100 * FLOAT32)
    tagger = Tagger(Condition.load(model), words)
    held = zip(data.held_out.examples, data.held_out_rewards.tolist(), strict=True)
    tagged = [tagger.sample(e, tagger.condition.z(r), 256) for e, r in held]
    nats = -torch.cat(plain_logprobs(config.model, [t for t in tagged if t])).mean().item()
    assert lines_of(tmp_path, "eval")[0]["loss"] == pytest.approx(nats, rel=100 * FLOAT32)
    saved = Condition.load(model)
    assert saved == Condition.of(data.rewards, {"proxy": "gold"})
    found = json.loads((tmp_path / "targets.json").read_text())
    assert [row["target"] for row in found] == [-1.0, 2.5, -1.0]
    assert found[0] == found[2]  # every target draws from the same stream
    for row in found:
        assert row["n"] == 6 and 1 <= row["length"] <= 6
        assert row["achieved"] == pytest.approx(saved.z(row["reward"]), abs=1e-9)
        assert row["gold"] == row["reward"] and row["achieved_stderr"] > 0
    assert "asked for +2.50 standard deviations, got" in caplog.text
    (facts,) = lines_of(tmp_path, "data")
    assert facts["data/samples"] == len(samples)
    assert facts["data/dropped"] == 16 - len(samples)
    assert facts["data/highest"] == pytest.approx(z.max().item())


def test_the_reward_that_is_asked_for_is_learned(road, tmp_path):
    """Responses are good or bad by one word; the model gives what it is asked for."""
    rows = []
    for i in range(48):
        good = i % 2
        rows.append({"prompt": "Say.", "completion": " yes" if good else " no", "reward": good})
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(
        "def yes(prompts, responses):\n"
        "    return [float(r == ' yes') - float(r == ' no') for r in responses]\n"
    )
    config = small(
        DTConfig,
        tmp_path / "run",
        road,
        data=str(file),
        reward=f"{tmp_path}/judge.py:yes",
        limit=None,
        eval_lines="0:2",
        epochs=12,
        batch_tokens=500,
        lr=2e-3,
        eval_targets="-0.99,0.99",
        eval_samples=16,
        sampling=SamplingConfig(max_new_tokens=6),
    )
    dt.train(config)
    low, high = json.loads((tmp_path / "run" / "targets.json").read_text())
    assert low["achieved"] < -0.6 and high["achieved"] > 0.6


def test_resumed_is_the_same_run(road, tmp_path, monkeypatch):
    config = small(DTConfig, tmp_path, road, eval_targets="1", eval_samples=1, eval_prompts=1)
    assert_resumes(dt, config, monkeypatch)
    whole, parts = (
        (tmp_path / run / name).read_text()
        for name in ("targets.json",)
        for run in ("whole", "parts")
    )
    assert whole == parts


def test_the_command_and_its_report(road, tmp_path):
    folder = tmp_path / "run"
    options = f"--model {road}/sft/model --reward {road}/reward/model --max_length 256 --limit 4"
    options += " --eval_limit 2 --eval_targets 1 --eval_samples 1 --sampling.max_new_tokens 4"
    cli.main(["train", "dt", "--output", str(folder), *options.split()])
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "model" / FILE).is_file() and (folder / "targets.json").is_file()


def test_bad_input(road, tmp_path, write):
    rows = [{"prompt": f"{i}", "completion": " a", "reward": i} for i in range(3)]
    for changes, words in (
        ({"eval_targets": "1,high"}, "--eval_targets: expected numbers as in 1,2,3, got 1,high"),
        ({"eval_targets": "1,nan"}, "--eval_targets: expected numbers"),
        ({"eval_targets": "1", "reward": None}, "needs a reward to measure with: give --reward"),
    ):
        with pytest.raises(RunError, match=words):
            small(DTConfig, tmp_path, road, **changes)
    folder = tmp_path / "run"
    file = tmp_path / "judge.py"
    file.write_text("def n(prompts, responses):\n    return [len(p) for p in prompts]\n")
    long = [{"prompt": "a" * 7 * i, "completion": " a"} for i in range(1, 4)]
    options = {"data": write(*long), "reward": f"{file}:n", "eval_targets": "1"}
    with pytest.raises(RunError, match="--eval_targets needs held-out prompts"):
        dt.train(small(DTConfig, folder, road, **options))
    options["sampling"] = SamplingConfig(max_new_tokens=240)
    with pytest.raises(RunError, match="are more than the 256 tokens that .*sft/model can read"):
        dt.train(small(DTConfig, folder, road, eval_lines="0:3", **options))
    tight = {"data": write(*rows), "reward": None, "max_length": 4}
    with pytest.raises(RunError, match="no prompt leaves room for its reward and an answer in"):
        dt.train(small(DTConfig, folder, road, **tight))
    assert not any(folder.iterdir())
