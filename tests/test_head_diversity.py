"""How far heads differ, in distribution and out of it, and who is told that they became one."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from test_online import run

from fastalign.data.tokens import TokenizedPreference
from fastalign.train import reward
from fastalign.train.head_diversity import (
    correlation,
    shuffled,
    warn_of_one_head,
    warn_of_statistic,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_correlation_by_hand() -> None:
    """Heads (1, 2, 3), (2, 4, 6) and (3, 2, 1), three times: 1, -1 and -1; offsets and scales do
    not count."""
    scores = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 2.0], [3.0, 6.0, 1.0]]).repeat(3, 1)
    assert correlation(scores) == {"heads/correlation": pytest.approx(-1 / 3)}
    assert correlation(scores[:, :2] * 3 - 7, "x") == {"x": pytest.approx(1.0)}
    assert correlation(scores[:4]) == {} and correlation(scores[:5]) != {}
    assert correlation(torch.cat([scores, torch.ones(9, 1)], 1)) == {}


def test_shuffled_pairs() -> None:
    long = list(range(10, 40))
    pairs = [
        TokenizedPreference([1, 2], [*long, 0], [5, 0], margin=0.5),
        TokenizedPreference([3], [*long, 0], []),
    ]
    found = shuffled(pairs, 0)
    assert [p.prompt for p in found] == [[1, 2], [3]] and found[0].margin == 0.5
    assert found[0].rejected == [5, 0] and found[1].rejected == []
    for pair in found:
        assert pair.chosen[-1] == 0 and pair.chosen[:-1] != long
        assert sorted(pair.chosen[:-1]) == long
    assert found[0].chosen != found[1].chosen
    assert shuffled(pairs, 0) == found != shuffled(pairs, 1)


@pytest.mark.parametrize("found", [0.9995, 0.99, math.nan])
def test_who_is_warned(found: float, caplog: pytest.LogCaptureFixture) -> None:
    metrics = {"heads/correlation": found, "reward/disagreement": 0.0123}
    for statistic in ("mean", "min", "median", "lcb", "uwo"):
        caplog.clear()
        warn_of_statistic(metrics, statistic)
        warned = found == 0.9995 and statistic != "mean"
        assert bool(caplog.text) == warned
        if warned:
            assert f"--statistic {statistic} has nothing to guard with" in caplog.text
            assert "correlate at 0.99950 (disagreement 0.0123)" in caplog.text
    caplog.clear()
    warn_of_one_head(metrics | {"heads/correlation/shuffled": 0.25})
    assert ("correlate at 0.99950 (0.25000 with tokens" in caplog.text) == (found == 0.9995)


def test_one_head_has_nothing_to_differ_from(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_statistic({"reward/proxy": 1.0}, "min")
    warn_of_one_head({"accuracy": 0.5})
    assert not caplog.text


@pytest.mark.parametrize(("head_init", "equal"), [(0.0, True), (1.0, False)])
def test_from_training_to_the_first_round(
    road: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, head_init: float, equal: bool
) -> None:
    """Heads that begin alike and see the same pairs stay one; the run that would take their minimum
    says so too."""
    reward.train(
        reward.RewardConfig(
            output=str(tmp_path / "reward"),
            model=str(road / "sft" / "model"),
            limit=20,
            batch_tokens=1500,
            max_length=256,
            heads=2,
            head_init=head_init,
            bootstrap="none",
            freeze_encoder=True,
            lr=1e-3,
            eval_limit=12,
        )
    )
    lines = (tmp_path / "reward" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(lines[-1])
    assert ("the heads have become one" in caplog.text) == equal
    assert (found["disagreement"] < 1e-5) == (found["disagreement/shuffled"] < 1e-5) == equal
    assert (found["disagreement"] == found["disagreement/shuffled"]) == equal  # 0, both
    assert (found["heads/correlation"] > 0.999) == equal
    assert (found["heads/correlation/shuffled"] > 0.999) == equal
    caplog.clear()
    model = str(tmp_path / "reward" / "model")
    with caplog.at_level(logging.WARNING, "fastalign"):
        options = {"statistic": "min", "steps": 1, "prompts_per_step": 4, "eval_samples": 4}
        run("grpo", tmp_path / "run", road, reward=model, **options)
    assert ("--statistic min has nothing to guard with" in caplog.text) == equal
    train = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert (train["heads/correlation"] > 0.999) == equal
