"""Models that read rewards in their prompts: what they are asked, and what everybody else reads."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import fastalign

from fastalign.commands import bestofn, evaluate
from fastalign.commands.answers import Answers, AnswersConfig
from fastalign.data.condition import Condition, condition
from fastalign.models import Policy
from fastalign.rollout import Rollout, SamplingConfig
from fastalign.train.reward_source import RewardSource

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = SamplingConfig(max_new_tokens=6, batch_size=8)


@pytest.fixture
def asked(road: Path, tmp_path: Path) -> Path:
    """A model as `train dt` leaves it."""
    folder = tmp_path / "dt" / "model"
    shutil.copytree(road / "apa" / "model", folder)
    Condition(0.5, 2.0, -2.0, 2.0, 100).save(folder)
    return folder


def config_of(model: Path, **options: Any) -> AnswersConfig:
    return AnswersConfig(policy=str(model), limit=4, sampling=SHORT, **options)


def test_the_model_alone_reads_the_tag(asked: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "fastalign")
    found = Answers(config_of(asked, target_reward=1.5))
    assert "is asked for +1.50 standard deviations; its training data had -2.00 to" in caplog.text
    drawn = [r for chunk in found.draw(2) for r in chunk]
    prompts = [p.prompt for p in found.prompts]
    tagged = condition(prompts, asked, found.tokenizer, reward=1.5)
    assert [r.prompt for r in drawn] == [t for t in tagged for _ in range(2)]
    assert found.tokenizer.decode(tagged[0]).endswith(" <rm_score>: 1.50 ")
    assert [found.plain(r).prompt for r in drawn] == [p for p in prompts for _ in range(2)]
    record = found.record(drawn[0])
    assert record["prompt"] == found.prompts[0].record.prompt
    plain = Answers(config_of(asked))
    assert [r.prompt for chunk in plain.draw(1) for r in chunk] == prompts


def test_the_space_before_the_end_is_no_part_of_the_answer(asked: Path) -> None:
    found = Answers(config_of(asked, target_reward=1.0))
    words, space = found.tokenizer.encode("abc"), found.tokenizer.encode(" ")
    completion = [*words, *space, found.tokenizer.eos_token_id]
    logp = [-1.0 * i for i in range(len(completion))]
    rollout = Rollout(1, found.conditioned(found.prompts[1].prompt), completion, logp, True)
    plain = found.plain(rollout)
    assert plain.completion == [*words, found.tokenizer.eos_token_id]
    assert plain.logp == [*logp[: len(words)], logp[-1]]
    record = found.record(rollout)
    assert record["completion"] == found.text(rollout) == found.tokenizer.decode(words)
    assert record["tokens"] == len(words) + 1
    assert record["logp"] == sum(logp)  # of all that was drawn


def test_the_tag_has_room(asked: Path) -> None:
    """Of 256 tokens that the model can read the tag takes its own, of those of others none."""
    found = Answers(config_of(asked, target_reward=1.0))
    tag = len(found.conditioned([]))
    assert tag > 5 and found.context == 256 - tag
    assert Answers(config_of(asked, target_reward=1.0), room=100).context == 100
    assert Answers(config_of(asked)).context == 256


def test_what_cannot_be_asked(road: Path, asked: Path, caplog: Any, capsys: Any) -> None:
    argv = ["generate", "--limit", 1, "--sampling.max_new_tokens", 2, "--policy"]
    status, _, err = fastalign(capsys, *argv, road / "sft" / "model", "--target_reward", 1)
    assert status == 2
    assert "sft/model was not trained with rewards in its prompts (no reward_condition" in err
    status, _, err = fastalign(capsys, *argv, asked, "--target_reward", "1e999")
    assert status == 2 and "--target_reward: expected a finite number, got inf" in err
    caplog.set_level(logging.WARNING, "fastalign")
    assert fastalign(capsys, *argv, asked)[0] == 0
    (warning,) = [r.getMessage() for r in caplog.records if "--target_reward" in r.getMessage()]
    assert warning.startswith(f"{asked} was trained with rewards in its prompts, and is asked for")
    caplog.clear()
    assert fastalign(capsys, *argv, asked, "--target_reward", -1)[0] == 0
    assert fastalign(capsys, *argv, road / "sft" / "model")[0] == 0
    assert "--target_reward" not in caplog.text


def test_best_of_n_scores_plain_answers(road: Path, asked: Path, tmp_path: Path) -> None:
    """Each record scored again, from its plain prompt and text, has the same reward."""
    folder = bestofn.run(
        bestofn.BestOfNConfig(
            policy=str(asked),
            reward=str(road / "reward" / "model"),
            output=str(tmp_path / "best"),
            limit=2,
            n=4,
            sampling=SHORT,
            target_reward=2.0,
        )
    )
    seen: list[list[int]] = []
    plain = RewardSource.score

    def score(self: Any, rollouts: list[Rollout], *texts: Any) -> Any:
        seen.extend(r.prompt for r in rollouts)
        return plain(self, rollouts, *texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardSource, "score", score)
        again = replace(
            bestofn.BestOfNConfig(policy=str(asked), limit=2, n=4, sampling=SHORT),
            reward=str(road / "reward" / "model"),
            output=str(tmp_path / "again"),
            target_reward=2.0,
        )
        bestofn.run(again)
    prompts = [p.prompt for p in Answers(config_of(asked, target_reward=2.0)).prompts[:2]]
    assert seen == [p for p in prompts for _ in range(4)]
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert all("rm_score" not in str(r["prompt"]) for r in records)


def run_evaluation(road: Path, tmp_path: Path, policy: Path, baseline: Path) -> dict[str, Any]:
    config = evaluate.EvaluateConfig(
        policy=str(policy),
        baseline=str(baseline),
        reward=str(road / "reward" / "model"),
        output=str(tmp_path / "evaluation"),
        overwrite=True,
        limit=3,
        samples=2,
        sampling=SHORT,
        target_reward=2.0,
    )
    found: dict[str, Any] = json.loads(
        (evaluate.run(config) / "evaluation.json").read_text(), parse_constant=pytest.fail
    )
    return found


def test_evaluate_asks_the_conditional_one(road: Path, asked: Path, tmp_path: Path) -> None:
    """Asked alike, one model beside itself has no KL; beside its copy that is asked nothing, some;
    and the copy is what it is without a target."""
    same = run_evaluation(road, tmp_path, asked, asked)
    assert same["after"]["kl/exact"] == pytest.approx(0.0, abs=1e-5)
    plain = road / "apa" / "model"  # the same weights
    found = run_evaluation(road, tmp_path, asked, plain)
    assert found["after"]["kl/exact"] > 0.01 and found["after"]["reward/proxy"] == pytest.approx(
        same["after"]["reward/proxy"], abs=1e-6
    )
    turned = run_evaluation(road, tmp_path, plain, asked)
    assert turned["after"]["reward/proxy"] == pytest.approx(
        found["before"]["reward/proxy"], abs=1e-6
    )
    assert turned["after"]["kl/exact"] > 0.01
    assert "rm_score" not in (tmp_path / "evaluation" / "samples.jsonl").read_text()


def test_kl_where_the_reference_reads_another_prompt(road: Path, asked: Path) -> None:
    """k1 of each answer against log-softmax over whole logits, each model after its own prompt."""
    config = evaluate.EvaluateConfig(
        policy=str(asked), limit=3, samples=2, sampling=SHORT, micro_tokens=100, target_reward=1.0
    )
    answers = Answers(config)
    base = Policy.load(str(road / "sft" / "model"), answers.tokenizer).eval()
    drawn = [r for chunk in answers.draw(2) for r in chunk]
    plain = [answers.plain(r).prompt for r in drawn]
    _, kl = evaluate.per_token(config, answers.policy, drawn, base, plain)
    for i, r in enumerate(drawn):
        logp = []
        for model, prompt in ((answers.policy, r.prompt), (base, plain[i])):
            ids = torch.tensor([prompt + r.completion])
            model.model.set_attn_implementation("sdpa")
            with torch.no_grad():
                logits = model.model(ids, attention_mask=torch.ones_like(ids)).logits
            rows = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            logp.append(rows.gather(1, torch.tensor(r.completion)[:, None]).sum())
        assert kl["k1"][i].item() == pytest.approx((logp[0] - logp[1]).item(), rel=1e-3, abs=1e-5)
