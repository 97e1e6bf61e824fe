"""Guards in the loop: their metrics, an alarm that ends a run, a budget of KL that ends it well.
What a critic is pre-trained on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastalign.rollout import Rollout, SamplingConfig
from fastalign.train import actor_critic, awr, grpo
from fastalign.train.guards import GuardConfig
from fastalign.train.run import Stopped

pytestmark = pytest.mark.usefixtures("one_thread")


def run(road: Path, output: Path, guards: GuardConfig, **changes: Any) -> list[dict[str, Any]]:
    """Trains for four steps; the lines of metrics.jsonl."""
    config: dict[str, Any] = {
        "output": str(output),
        "policy": str(road / "sft" / "model"),
        "reward": str(road / "reward" / "model"),
        "steps": 4,
        "prompts_per_step": 3,
        "samples_per_prompt": 4,
        "eval_limit": 2,
        "eval_samples": 1,
        "lr": 3e-3,
        "sampling": SamplingConfig(max_new_tokens=6),
        "guards": guards,
    }
    grpo.train(grpo.GRPOConfig(**(config | changes)))
    return lines(output)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def steps(found: list[dict[str, Any]], phase: str) -> list[int]:
    return [line["step"] for line in found if line["phase"] == phase]


@pytest.fixture(scope="module")
def whole(road: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A run that no guard ends."""
    return run(road, tmp_path_factory.mktemp("guards") / "whole", GuardConfig())


def test_metrics_of_every_step(whole: list[dict[str, Any]]) -> None:
    found = [line for line in whole if line["phase"] == "train"]
    assert len(found) == 4
    for line in found:
        assert 0 <= line["repeats"] < 1 and 0.25 <= line["distinct"] <= 1
        assert 0 <= line["reward/zero_std"] <= 1 and line["kl/k1_stderr"] >= 0


def test_a_budget_of_kl_ends_the_run_in_order(
    road: Path,
    tmp_path: Path,
    whole: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    kl = [line["kl/k1"] for line in whole if line["phase"] == "train"]
    # The first step after which KL is above what all steps before it had, and not the last one.
    end = next(i for i in range(1, 3) if kl[i] > max(kl[:i]) + 1e-3)
    budget = GuardConfig(max_kl=(kl[end] + max(0.0, *kl[:end])) / 2)
    caplog.set_level(logging.INFO, logger="fastalign")
    found = run(road, tmp_path / "run", budget, checkpoint_every=100)
    assert steps(found, "train") == list(range(1, end + 2)) and steps(found, "eval") == [0, end + 1]
    assert f"step {end + 1}: KL(pi || pi_init) of a response is {kl[end]:.3g} nats" in caplog.text
    facts = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert facts["after"]["n"] == 2 and (tmp_path / "run/model/model.safetensors").exists()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{end + 1:06d}"
    # As it is, there is nothing left to do; with a larger budget there is.
    assert run(road, tmp_path / "run", budget, resume="auto") == found
    found = run(road, tmp_path / "run", GuardConfig(max_kl=1e3), resume="auto")
    assert steps(found, "train") == [1, 2, 3, 4]


def test_a_run_resumed_where_it_is_to_end_now_is_evaluated(road: Path, tmp_path: Path) -> None:
    """Its checkpoint is of a step that was not to be the last one."""
    run(road, tmp_path / "run", GuardConfig(), steps=2, checkpoint_every=1)
    (tmp_path / "run" / "evaluation.json").unlink()
    first = str(tmp_path / "run" / "checkpoints" / "step-000001")
    found = run(road, tmp_path / "run", GuardConfig(), steps=1, resume=first)
    assert steps(found, "train") == [1] and steps(found, "eval") == [0, 1]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]["n"] == 2


def test_an_alarm_ends_the_run_where_it_is_told_to(road: Path, tmp_path: Path) -> None:
    guards = GuardConfig(stop="entropy", entropy=100.0)  # the first step is below that already
    with pytest.raises(Stopped, match="step 1: the policy's entropy .*guards.stop names entropy"):
        run(road, tmp_path / "run", guards)
    assert steps(lines(tmp_path / "run"), "train") == []


@pytest.mark.parametrize(("critic_steps", "n_rounds"), [(1, 1), (20, None)])
def test_pretraining_samples_as_many_rounds_as_it_takes(
    road: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    critic_steps: int,
    n_rounds: int | None,
) -> None:
    """For none of their tokens to be learned from more than four times."""
    seen: list[tuple[list[Rollout], Tensor, int]] = []

    def pretrain(
        critic: Any, rollouts: list[Rollout], returns: Tensor, *, steps: int, **_: Any
    ) -> dict[str, float]:
        seen.append((rollouts, returns, steps))
        return {}

    monkeypatch.setattr(actor_critic, "pretrain", pretrain)
    awr.train(
        awr.AWRConfig(
            output=str(tmp_path / "run"),
            policy=str(road / "sft" / "model"),
            reward=str(road / "reward" / "model"),
            critic="separate",
            critic_steps=critic_steps,
            steps=1,
            prompts_per_step=3,
            samples_per_prompt=2,
            batch_tokens=150,
            eval_limit=2,
            eval_samples=1,
            sampling=SamplingConfig(max_new_tokens=6),
        )
    )
    ((rollouts, returns, steps),) = seen
    tokens = [len(r.prompt) + len(r.completion) for r in rollouts]
    rounds, rest = divmod(len(rollouts), 6)
    assert steps == critic_steps and rest == 0 and rounds == (n_rounds or rounds)
    assert 4 * sum(tokens) >= 150 * critic_steps > 4 * sum(tokens[:-6])
    # Prompts of different rounds are different prompts.
    assert [r.prompt_index for r in rollouts] == [i // 2 for i in range(len(rollouts))]
    # gamma = 1 and no KL: the return is the same at every token of a response, and of each its own.
    of = returns.split([len(r.completion) for r in rollouts])
    assert all(bool((r == r[0]).all()) for r in of)
    assert len({r[0].item() for r in of}) > len(rollouts) / 2
