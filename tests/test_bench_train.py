"""The comparison of trainers: the task it makes, and what it says of runs that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_train, train_task
from fastalign.models import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    train_task.write(folder, train_task.SIZES["tiny"], steps=3)
    return folder


def records(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_word_is_a_token(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder / "model"))
    for record in records(folder, "preferences"):
        for key in ("prompt", "chosen", "rejected"):
            ids = tokenizer(record[key], add_special_tokens=False)["input_ids"]
            assert len(ids) == len(record[key].split()) and tokenizer.unk_token_id not in ids


def test_mean_tokens(folder: Path) -> None:
    found = records(folder, "completions")
    assert len(found) == 3 * train_task.SIZES["tiny"].batch
    whole = [len((r["prompt"] + r["completion"]).split()) + 1 for r in found]
    assert train_task.mean_tokens(folder, "completions") == sum(whole) / len(whole)
    pairs = records(folder, "preferences")
    both = [
        2 * len(r["prompt"].split()) + len((r["chosen"] + r["rejected"]).split()) + 2 for r in pairs
    ]
    assert train_task.mean_tokens(folder, "preferences") == sum(both) / len(both)


def test_lengths_are_spread_like_dialogues(tmp_path: Path) -> None:
    """At the size that is measured: a median below the mean, a tail of several times the median,
    and none that does not fit."""
    import statistics

    size = train_task.SIZES["5m"]
    train_task.write(tmp_path, size, steps=60)
    lengths = [
        len((r["prompt"] + r["completion"]).split()) + 1 for r in records(tmp_path, "completions")
    ]
    assert 120 < statistics.median(lengths) < statistics.mean(lengths) < 260
    assert 3 * statistics.median(lengths) < max(lengths) <= size.max_length


def test_reward_counts_even_words() -> None:
    assert train_task.reward(["w2 w3 w4 w5", "", "w1"]) == [0.5, 0.0, 0.0]


def test_a_worker_that_fails_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit status 1: .*No such file .*size\.json"):
        bench_train.one("fastalign", "sft", tmp_path, "cpu", 300)


def test_speed_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {
        "seconds": [9.0, 9.0, 1.0, 3.0],
        "tokens": [1, 1, 100, 200],
        "peak": 50,
        "at start": 20,
    }

    class Done:
        returncode = 0
        stdout = "a line before\n" + json.dumps(found)

    def run(command: list[str], **_: Any) -> Done:
        return Done()

    monkeypatch.setattr(bench_train.subprocess, "run", run)
    assert bench_train.one("TRL", "sft", tmp_path, "cpu", 1) == {
        "steps": [(100, 1.0), (200, 3.0)],
        "peak": 50,
        "beyond": 30,
    }
    found |= {"seconds": [1.0, 2.0], "tokens": [1, 1]}
    Done.stdout = json.dumps(found)
    with pytest.raises(RuntimeError, match="no steps left after 2"):
        bench_train.one("TRL", "sft", tmp_path, "cpu", 1)


def test_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step at its median over three runs, of which one has a slow first step and one a slow
    second one: 60 and 30 tokens in 1 + 2 s, against 3 + 6 s; 2 bytes against 8."""
    answers = {
        "fastalign": iter([((1.0, 2.0), 2), ((9.0, 2.0), 2), ((1.0, 8.0), 2)]),
        "TRL": iter([((3.0, 99.0), 8), ((3.0, 6.0), 8), ((99.0, 6.0), 8)]),
    }

    def run(seconds: tuple[float, ...], beyond: int) -> dict[str, Any]:
        return {"steps": list(zip((60, 30), seconds, strict=False)), "peak": 9, "beyond": beyond}

    def one(who: str, name: str, *_: Any) -> dict[str, Any]:
        if name == "sft packed":
            raise RuntimeError("no such thing")
        if name == "sft defaults":
            return run((12.0,), 4)
        return run(*next(answers[who]))

    monkeypatch.setattr(bench_train, "one", one)
    rows, failed = bench_train.compare("tiny", ["sft"], "cpu", 3, 4, 1e12)
    assert failed == {"TRL sft packed": "no such thing"}
    by_name = {row["what"]: row for row in rows}
    assert by_name["fastalign sft"]["tokens/s"] == 30.0
    assert by_name["TRL sft"]["fastalign is faster by"] == 3.0
    assert by_name["TRL sft"]["its memory / this"] == 0.25
    assert by_name["TRL sft defaults"]["fastalign is faster by"] == 6.0
    assert by_name["fastalign sft"]["runs"] == 3
