"""`fastalign score`: what is written, what reads it, what is refused."""

import json
import shutil

import pytest
import torch
from labelled_runs import small
from safetensors.torch import load_file

from fastalign import cli
from fastalign.commands import bestofn
from fastalign.commands.score import ScoreConfig, run
from fastalign.data.source import responses
from fastalign.data.synthetic import gold_reward
from fastalign.models import load_tokenizer
from fastalign.rollout import SamplingConfig
from fastalign.testing import TOLERANCES
from fastalign.train.labels import LabelledConfig, load_labelled
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written_is_what_training_would_compute(road, tmp_path):
    """Both responses of each pair: texts as they are, rewards, heads; and it is read back."""
    folder, file = str(road / "reward" / "model"), tmp_path / "new" / "scores.jsonl"
    options = f"--reward {folder} --statistic lcb --coef 0.5 --limit 8 --output {file}"
    cli.main(["score", *options.split()])
    lines = read(file)
    records, _ = responses("synthetic", None, None, 8)
    config = small(LabelledConfig, tmp_path, road, reward=folder, statistic="lcb", coef=0.5)
    data = load_labelled(config)
    data.kept.write()
    heads = load_file(tmp_path / "computed" / "labels.safetensors")["heads"]
    assert [(x["prompt"], x["completion"]) for x in lines] == [
        (r.prompt, r.completion) for r in records
    ]
    assert [x["reward"] for x in lines] == pytest.approx(data.rewards.tolist(), abs=100 * FLOAT32)
    for line, row in zip(lines, heads, strict=True):
        assert line.keys() == {"prompt", "completion", "reward", "heads", "disagreement"}
        assert line["heads"] == pytest.approx(row.tolist(), abs=100 * FLOAT32)
        assert line["disagreement"] == pytest.approx(row.std().item(), abs=100 * FLOAT32)
    again = load_labelled(
        small(LabelledConfig, tmp_path, road, data=str(file), reward=None, limit=None)
    )
    assert again.rewards.tolist() == [x["reward"] for x in lines]
    assert [e.completion for e in again.train.examples] == [
        e.completion for e in data.train.examples
    ]


def test_several_models_as_one(road, tmp_path):
    """Whose tokenizer is that of each."""
    one, file = road / "reward" / "model", tmp_path / "scores.jsonl"
    other = shutil.copytree(one, tmp_path / "other")
    for reward in (one, f"{one}+{other}"):
        run(ScoreConfig(reward=str(reward), limit=3, output=str(file), overwrite=True))
        if reward == one:
            alone = read(file)
    for line, expected in zip(read(file), alone, strict=True):
        assert line["heads"] == pytest.approx(expected["heads"] * 2, abs=100 * FLOAT32)
        assert line["reward"] == pytest.approx(expected["reward"], abs=100 * FLOAT32)


def test_gold_to_the_screen(road, capsys):
    run(ScoreConfig(reward="gold", tokenizer=str(road / "sft" / "model"), limit=2))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4 and set(lines[0]) == {"prompt", "completion", "reward"}
    for line in lines:
        assert line["reward"] == pytest.approx(gold_reward(line["prompt"], line["completion"]))


def test_records_that_are_dropped_take_no_others_place(road, tmp_path, write):
    rows = [
        {"prompt": "word " * n, "completion": f" {n}"} for n in (1, 400, 2)
    ]  # the second does not fit
    file = tmp_path / "scores.jsonl"
    run(ScoreConfig(data=write(*rows), reward=str(road / "reward" / "model"), output=str(file)))
    assert [x["completion"] for x in read(file)] == [" 1", " 2"]


def test_answers_that_were_cut_off_are_scored_as_they_were_sampled(road, tmp_path):
    """No EOS is put behind them, so the reward is that of `bestofn`, and training is told too."""
    reward, folder = str(road / "reward" / "model"), tmp_path / "bestofn"
    bestofn.run(
        bestofn.BestOfNConfig(
            policy=str(road / "sft" / "model"),
            reward=reward,
            limit=4,
            n=4,
            sampling=SamplingConfig(max_new_tokens=6),
            output=str(folder),
        )
    )
    sampled = [x for x in read(folder / "samples.jsonl") if not x["finished"]]
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(x) + "\n" for x in sampled))
    run(ScoreConfig(data=str(tmp_path / "cut.jsonl"), reward=reward, output=str(tmp_path / "s")))
    again = read(tmp_path / "s")
    assert len(sampled) > 8 and all(x["finished"] is False for x in again)
    tokenizer = load_tokenizer(reward)
    as_sampled = 0
    for x, y in zip(sampled, again, strict=True):
        # Text that the tokenizer would have written otherwise is another response.
        if len(tokenizer(x["completion"])["input_ids"]) == x["tokens"]:
            assert y["reward"] == pytest.approx(x["reward"], abs=100 * FLOAT32)
            as_sampled += 1
    assert as_sampled > 4


def test_bad_input(road, tmp_path):
    file = tmp_path / "scores.jsonl"
    file.write_text("mine")
    with pytest.raises(RunError, match="is there already; choose another, or --overwrite"):
        run(ScoreConfig(output=str(file)))
    with pytest.raises(RunError, match="--reward gold has no tokenizer of its own"):
        run(ScoreConfig(reward="gold"))
    with pytest.raises(RunError, match="max_length 300 is more than the 256 tokens that"):
        run(ScoreConfig(reward=str(road / "reward" / "model"), max_length=300))
    assert file.read_text() == "mine"
