"""`--gold`: measured on every response, and without a trace in what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import save_ensemble, tokenizer
from test_online import lines_of, run, same_weights

from fastalign.commands import bestofn
from fastalign.data.synthetic import SyntheticTask, gold_reward, write_jsonl
from fastalign.rollout import Rollout, SamplingConfig
from fastalign.train.reward_source import make_gold, measure_gold
from fastalign.train.run import RunError, Stopped

pytestmark = pytest.mark.usefixtures("one_thread")

NOISY = (
    "import torch\n"
    "def words(prompts, responses):\n"
    "    torch.manual_seed(len(responses))\n"
    "    torch.rand(7)\n"
    "    return [len(r.split()) for r in responses]\n"
)


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A gold reward that meddles with torch's random stream."""
    (tmp_path / "mine.py").write_text(NOISY)
    return f"{tmp_path / 'mine.py'}:words"


@pytest.fixture
def prompts(tmp_path: Path) -> dict[str, Any]:
    """Prompts from a file, which have no gold reward of their own."""
    write_jsonl(SyntheticTask().prompts(8), tmp_path / "prompts.jsonl")
    path = str(tmp_path / "prompts.jsonl")
    return {"prompts": path, "lines": "0:6", "eval_lines": "6:8"}


def test_gold_leaves_no_trace(
    road: Path, tmp_path: Path, words: str, prompts: dict[str, Any]
) -> None:
    golds = {"without": None, "function": words, "model": str(road / "reward" / "model")}
    lines = {}
    for name, gold in golds.items():
        run("grpo", tmp_path / name, road, gold=gold, **prompts)
        lines[name] = lines_of(tmp_path / name)
        same_weights(tmp_path / "without", tmp_path / name)
    measured = ("reward/gold", "reward/gold_std", "reward/gold_stderr")
    for name in ("function", "model"):
        found = [{k: v for k, v in line.items() if k not in measured} for line in lines[name]]
        assert found == lines["without"]
        assert [line["phase"] for line in lines[name] if "reward/gold" in line] == [
            *("eval", "train", "train", "eval")
        ]
    assert not any("reward/gold" in line for line in lines["without"])
    # The ensemble as gold of itself.
    for line in lines["model"]:
        assert line["reward/gold"] == pytest.approx(line["reward/proxy"], rel=1e-6)
    accounts = json.loads((tmp_path / "model" / "accounting.json").read_text())["phases"]
    assert accounts["gold"]["flops"] == accounts["score"]["flops"] > 0


def test_gold_is_of_the_samples_of_the_round(
    road: Path, tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the built-in prompts: a file's function instead of the task's own gold reward."""
    from fastalign.train.experience import Collector

    seen = []
    plain = Collector.collect

    def collect(self: Collector, *args: Any) -> Any:
        found = plain(self, *args)
        seen.append((found, [self.text(r.completion) for r in found.rollouts]))
        return found

    monkeypatch.setattr(Collector, "collect", collect)
    run("apa", tmp_path / "run", road, gold=words)
    found = [line["reward/gold"] for line in lines_of(tmp_path / "run")]
    for value, (experience, texts) in zip(found, seen, strict=True):
        counts = [len(text.split()) for text in texts]
        assert experience.gold is not None and experience.gold.tolist() == counts
        assert value == pytest.approx(sum(counts) / len(counts))


def test_best_of_n_by_a_gold_of_its_own(
    road: Path, tmp_path: Path, words: str, prompts: dict[str, Any]
) -> None:
    config = bestofn.BestOfNConfig(
        output=str(tmp_path / "bestofn"),
        policy=str(road / "sft" / "model"),
        reward=str(road / "reward" / "model"),
        prompts=prompts["prompts"],
        gold=words,
        limit=2,
        n=3,
        sampling=SamplingConfig(max_new_tokens=6),
    )
    folder = bestofn.run(config)
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(records) == 6
    assert [r["gold"] for r in records] == [len(r["completion"].split()) for r in records]
    assert "gold" in json.loads((folder / "curve.json").read_text())


# --- what may be asked for ------------------------------------------------------------------------


def asked(gold: str | None, prompts: str = "synthetic") -> Any:
    config = SimpleNamespace(
        gold=gold, prompts=prompts, policy="p", micro_tokens=64, dtype="float32"
    )
    return make_gold(config, tokenizer(), torch.device("cpu"))


def test_the_task_s_own(tmp_path: Path) -> None:
    assert asked(None) is gold_reward and asked("gold") is gold_reward
    assert asked(None, "mine.jsonl") is None
    with pytest.raises(RunError, match="--gold gold is the built-in task's; the prompts mine"):
        asked("gold", "mine.jsonl")


def test_wrong_golds(tmp_path: Path, words: str) -> None:
    with pytest.raises(RunError, match=r"--gold mine\.py: expected the name of a function"):
        asked("mine.py")
    with pytest.raises(RunError, match=r"--gold .*mine\.py:other: .* has no function other"):
        asked(words.replace(":words", ":other"))
    one = [Rollout(0, [5], [6], [0.0], True)]
    short = words.replace("words", "short")
    Path(short.split(":")[0]).write_text(NOISY + "def short(p, r): return []\n")
    with pytest.raises(Stopped, match="short returned 0 numbers for 1 responses"):
        measure_gold(asked(short), one, ["p"], ["a b"])


def test_a_gold_ensemble_has_its_own_statistic(tmp_path: Path) -> None:
    folder = save_ensemble(tmp_path / "gold", statistic="min")
    one = [Rollout(0, [5, 7], [6], [0.0], True)]
    gold = asked(folder)
    scores = gold.score(one, ["p"], ["r"]).scores
    assert measure_gold(gold, one, ["p"], ["r"]).item() == scores.min().item()
