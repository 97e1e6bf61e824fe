"""Courses of gold and proxy: drops by hand, best-of-n by enumeration, and what a study shows."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_apa, plots_of, write_lines

from benchmarks.over_optimisation import stages
from fastalign import cli
from fastalign.commands import courses, overoptimise
from fastalign.report import write_report
from fastalign.report.over_optimisation import (
    clear,
    draw,
    groups,
    risen,
    section,
    table_of_drops,
    ticks,
)
from fastalign.train.run import RunError

GOLD = [0.0, 1.0, 2.0, 4.0, 3.0, 1.0]


def test_a_drop_by_hand() -> None:
    found = courses.fall(GOLD)
    assert (found["peak"], found["peak_at"], found["final"], found["drop"]) == (4.0, 3, 1.0, 3.0)
    # Differences 1, 1, 2, -1, -2.
    assert found["drop_stderr"] == pytest.approx(math.sqrt(11 / 5 / 2) * math.sqrt(2))
    # Means of three: 1, 7/3, 3, 8/3; the best one is that of rounds 3 to 5, its middle index 3.
    found = courses.fall(GOLD, 3)
    assert found["peak"] == pytest.approx(3.0) and found["peak_at"] == 3
    assert found["final"] == pytest.approx(8 / 3) and found["drop"] == pytest.approx(1 / 3)
    assert found["drop_stderr"] == pytest.approx(math.sqrt(11 / 5 / 2) * math.sqrt(2 / 3))
    rising = courses.fall([0.0, 1.0, 2.0])
    assert (rising["drop"], rising["peak_at"]) == (0.0, 2)
    assert math.isnan(courses.fall([1.0])["drop_stderr"])
    for window in (0, 7):
        with pytest.raises(ValueError, match=f"expected 1 <= window <= 6, got {window}"):
            courses.fall(GOLD, window)


def test_windows_are_odd() -> None:
    assert [courses.window_of(n) for n in (1, 9, 20, 40, 50, 100)] == [1, 1, 3, 5, 5, 11]


# --- runs -----------------------------------------------------------------------------------------


def make_run(
    folder: Path, gold: list[float], statistic: str = "min", seed: int = 0, **reward: Any
) -> Path:
    """A run whose KL is 0, 1, 2, ... and whose proxy is twice that, with the reward's facts."""
    facts = {"path": "gone", "coef": 1.0, "n_heads": 4, "n_models": 1, "n_parameters": 1000}
    lines: list[dict[str, Any]] = [{"step": 0, "phase": "eval", "time": 1.0, "reward/gold": 0.5}]
    for i, value in enumerate(gold):
        numbers = {"kl/k1": float(i), "reward/proxy": 2.0 * i, "reward/gold": value}
        more = {"reward/disagreement": 0.1 * (i + 1), "reward/gold_std": 9.0}
        lines.append({"step": i + 1, "phase": "train", "time": 2.0 + i, **numbers, **more})
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "config.yaml").write_text(f"seed: {seed}\n")
    before = {"reward/gold": 0.5, "reward/gold_std": 2.0}
    before |= {"reward/proxy": 0.0, "reward/proxy_std": 4.0}
    described = [{"name": "ensemble", "statistic": statistic, **facts, **reward}]
    evaluation = {"before": before, "after": before, "reward": described, "method": "grpo"}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    cost = {"seconds": 7.0, "flops": 70.0}
    account = {"phases": {"score": {"seconds": 2.0, "flops": 20.0}}, "total": cost}
    account |= {"energy": None, "peak_flops": None, "peak_source": None, "resumes": 0}
    (folder / "accounting.json").write_text(json.dumps(account))
    return folder


def test_the_course_of_a_run(tmp_path: Path) -> None:
    trained = tmp_path / "heads"
    make_run(trained, GOLD)  # for its accounting.json
    (trained / "metrics.jsonl").unlink()
    make_run(tmp_path / "a" / "min", GOLD, seed=3, path=str(trained / "model"))
    (found,) = courses.read(tmp_path)["runs"]
    assert found["name"] == "a/min" and found["seed"] == "3"
    assert (found["source"], found["statistic"]) == ("4 heads, one encoder", "min")
    assert found["gold"] == GOLD and found["kl"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert found["step"] == [1, 2, 3, 4, 5, 6] and found["window"] == 1
    assert found["drop"] == 3.0 and found["peak_at"] == 3
    assert found["disagreement"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert (found["disagreement_first"], found["disagreement_last"]) == pytest.approx((0.1, 0.6))
    assert found["cost"] == {
        **{"seconds": 7.0, "score_seconds": 2.0, "training_seconds": 7.0},
        **{"flops": 70.0, "score_flops": 20.0, "training_flops": 70.0},
    }
    assert risen(found, "gold") == [(g - 0.5) / 2.0 for g in GOLD]
    assert risen(found, "proxy") == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


@pytest.mark.parametrize(
    ("facts", "source", "statistic"),
    [
        ({"n_heads": 1}, "one model", "single head"),
        ({"n_heads": 3, "n_models": 3}, "3 models", "min"),
        ({"n_heads": 6, "n_models": 3}, "3 models, 6 heads", "min"),
    ],
)
def test_what_rewards_are_called(
    tmp_path: Path, facts: dict[str, Any], source: str, statistic: str
) -> None:
    make_run(tmp_path, GOLD, **facts)
    (found,) = courses.read(tmp_path)["runs"]
    assert (found["source"], found["statistic"]) == (source, statistic)


def test_a_run_that_did_not_finish_counts_from_its_first_round(tmp_path: Path) -> None:
    make_run(tmp_path, GOLD)
    for name in ("evaluation.json", "accounting.json"):
        (tmp_path / name).unlink()
    (found,) = courses.read(tmp_path)["runs"]
    assert (found["gold_start"], found["gold_std"], found["cost"]) == (0.0, 9.0, {})
    assert (found["source"], found["statistic"]) == ("unfinished run", tmp_path.name)
    assert found["drop"] == 3.0
    assert section({"runs": [found], "best_of_n": [], "reward_models": []}, None)  # type: ignore[arg-type]


def test_a_sum_of_rewards_is_no_seed_of_the_model_in_it(tmp_path: Path) -> None:
    """min and min + 0.5 * length differ: they must not share a panel, nor the sum's answers be
    chosen by the heads alone."""
    sum_of_two = [
        {"name": "ensemble", "statistic": "mean", "coef": 1.0, "n_heads": 2},
        {"name": "length", "weight": 0.5},
    ]
    for name, reward in (("one", sum_of_two[:1]), ("sum", sum_of_two)):
        folder = make_run(tmp_path / name, GOLD)
        told = json.loads((folder / "evaluation.json").read_text())
        told |= {"reward": reward, "proxy": f"label of {name}"}
        (folder / "evaluation.json").write_text(json.dumps(told))
    make_samples(tmp_path / "bon", [{**a, "reward": -a["gold"]} for a in answers()])
    about = json.loads((tmp_path / "bon" / "curve.json").read_text())
    about["source"] = {"proxy": "label of both", "reward": sum_of_two}
    (tmp_path / "bon" / "curve.json").write_text(json.dumps(about))
    found = courses.read(tmp_path)
    assert list(groups(found["runs"])) == [
        ("2 heads, one encoder", "mean"),
        ("a sum with reward models", "label of sum"),
    ]
    (one,) = found["best_of_n"]
    assert (one["source"], one["statistic"]) == ("a sum with reward models", "label of both")
    assert one["gold"][-1] == pytest.approx((-1.0 + 0.0) / 2)  # of three the worst gold


# --- best-of-n ------------------------------------------------------------------------------------

HEADS = [[[0.0, 5.0], [1.0, 1.0], [2.0, -6.0]], [[3.0, 1.0], [2.0, 2.5], [0.1, 0.0]]]
GOLDS = [[1.0, 2.0, -1.0], [0.0, 4.0, 1.0]]


def make_samples(folder: Path, records: list[dict[str, Any]], prompts: int = 2) -> None:
    write_lines(folder / "samples.jsonl", records)
    facts = {"name": "ensemble", "path": "gone", "statistic": "mean", "coef": 1.0, "n_heads": 2}
    about = {"prompts": prompts, "samples": 3, "source": {"proxy": "mean", "reward": [facts]}}
    (folder / "curve.json").write_text(json.dumps(about))


def answers() -> list[dict[str, Any]]:
    return [
        {"reward": sum(heads) / 2, "heads": heads, "gold": gold}
        for row, golds in zip(HEADS, GOLDS, strict=True)
        for heads, gold in zip(row, golds, strict=True)
    ]


def by_enumeration(proxy: Any, n: int) -> float:
    """Mean gold of the best by `proxy` (of one answer's heads) over all sets of n answers."""
    found = []
    for row, golds in zip(HEADS, GOLDS, strict=True):
        for chosen in itertools.combinations(range(3), n):
            found.append(golds[max(chosen, key=lambda i: proxy(row[i]))])
    return sum(found) / len(found)


def test_best_of_n_for_every_statistic(tmp_path: Path) -> None:
    make_samples(tmp_path / "bon", answers())
    found = {c["statistic"]: c for c in courses.read(tmp_path)["best_of_n"]}
    assert list(found) == ["single head", "mean", "min", "lcb", "uwo", "median"]
    proxies = {
        "mean": sum,
        "min": min,
        "lcb": lambda h: sum(h) / 2 - abs(h[0] - h[1]) / math.sqrt(2),
        "uwo": lambda h: sum(h) / 2 - (h[0] - h[1]) ** 2 / 2,
    }
    for statistic, proxy in proxies.items():
        golds = [by_enumeration(proxy, n) for n in (1, 2, 3)]
        assert found[statistic]["gold"] == pytest.approx(golds), statistic
        assert found[statistic]["drop"] == pytest.approx(max(golds) - golds[-1])
    heads = [[by_enumeration(lambda h, k=k: h[k], n) for n in (1, 2, 3)] for k in (0, 1)]
    expected = [(a + b) / 2 for a, b in zip(*heads, strict=True)]
    assert found["single head"]["gold"] == pytest.approx(expected)
    assert found["min"]["kl"] == pytest.approx([0.0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    # Prompt by prompt: the best n of the mean curve is 1 or 2; the errors are over two prompts.
    one = found["single head"]
    assert one["drop_stderr"] >= 0.0 and one["name"] == "bon" and one["n"] == [1, 2, 3]


def test_answers_without_gold_are_left_out(tmp_path: Path) -> None:
    make_samples(tmp_path / "bon", [{k: v for k, v in a.items() if k != "gold"} for a in answers()])
    make_run(tmp_path / "run", GOLD)
    assert courses.read(tmp_path)["best_of_n"] == []


# --- the study ------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    falling = [0.5 + 0.1 * i for i in range(20)] + [2.5 - 0.2 * i for i in range(20)]
    make_run(runs / "seed-0" / "min", falling)
    make_run(runs / "seed-1" / "min", [g + 0.4 for g in falling], seed=1)
    make_run(runs / "seed-0" / "three-min", sorted(falling), n_heads=3, n_models=3)
    make_run(runs / "seed-0" / "single", falling, n_heads=1)
    make_samples(runs / "seed-0" / "bon", answers())
    heads: dict[str, Any] = {f"accuracy/head_{k}": 0.6 for k in range(4)} | {"accuracy": 0.61}
    heads |= {"heads/correlation": 0.9, "heads/correlation/shuffled": 0.4}
    heads |= {"disagreement": 0.2, "disagreement/shuffled": 0.7, "step": 5, "phase": "eval"}
    write_lines(runs / "seed-0" / "heads" / "metrics.jsonl", [heads])
    return runs


def test_a_study(study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastalign"):
        folder = overoptimise.run(overoptimise.OveroptimiseConfig(str(study), str(tmp_path / "o")))
    found = json.loads((folder / "over_optimisation.json").read_text())
    assert [len(found[k]) for k in ("runs", "best_of_n", "reward_models")] == [4, 6, 1]
    assert found["reward_models"][0] == {
        **{"name": "seed-0/heads", "heads": 4, "accuracy": 0.61, "correlation": 0.9},
        **{"correlation_shuffled": 0.4, "disagreement": 0.2, "disagreement_shuffled": 0.7},
    }
    kinds = {"svg": b"<?xml", "png": b"\x89PNG"}
    for name, (kind, begins) in itertools.product(("", "-best-of-n"), kinds.items()):
        file = folder / f"over-optimisation{name}.{kind}"
        assert file.read_bytes().startswith(begins) and file.stat().st_size > 5000
    # Means of five rounds: 2.1, 2.2, ..., of two seeds 0.4 apart.
    said = caplog.text
    assert "along training, min, 4 heads, one encoder: max gold 2.54, at KL 19.0, final" in said
    assert "along training, min, 3 models: max gold 2.34" in said and "no clear fall" in said
    assert re.search("single head, one model: .*; falls", said)
    with pytest.raises(RunError, match="choose another --output, or --overwrite$"):
        overoptimise.run(overoptimise.OveroptimiseConfig(str(study), str(tmp_path / "o")))
    (folder / "over-optimisation.svg").unlink()
    (folder / "old").mkdir()
    overoptimise.run(overoptimise.OveroptimiseConfig(str(study), str(tmp_path / "o"), True))
    assert (folder / "over-optimisation.svg").exists() and not (folder / "old").exists()


def test_one_prompt_has_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in the file, where it is null, nor in what is said: no error of no digits."""
    make_samples(tmp_path / "runs" / "bon", answers()[:3], prompts=1)
    config = overoptimise.OveroptimiseConfig(str(tmp_path / "runs"), str(tmp_path / "o"))
    with caplog.at_level(logging.INFO, "fastalign"):
        found = json.loads((overoptimise.run(config) / "over_optimisation.json").read_text())
    assert {course["drop_stderr"] for course in found["best_of_n"]} == {None}
    assert "drop" in caplog.text and "±" not in caplog.text


def test_what_the_page_says(study: Path) -> None:
    html, plots = section(courses.read(study), None)  # type: ignore[arg-type]
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    min_row = next(row for row in cells if row[0] == "min, 4 heads, one encoder")
    assert min_row[1] == "2" and min_row[-1] == "falls"  # of two seeds
    assert ["seed-0/heads", "4", "61.0%", "0.900", "0.200", "0.400, 0.700"] in cells
    assert [plot.id for plot in plots] == ["over-optimisation", "over-optimisation-best-of-n"]
    text = str(plots[0].svg)
    for words in ("min", "4 heads, one encoder", "3 models", "single head", "proxy", "gold, drop"):
        assert words in text, words


def test_the_kl_of_a_drop_is_that_of_the_rounds_it_is_a_mean_of() -> None:
    """Means of three of a KL that jumps: that of the best rounds, 2 to 4, and of the last three."""
    gold = [0.0, 1.0, 5.0, 6.0, 5.0, 1.0]
    course = {"source": "a", "statistic": "min", "kl": [0.0, 1.0, 2.0, 9.0, 4.0, 26.0], "window": 3}
    _, (row,) = table_of_drops([{**course, "gold": gold, **courses.fall(gold, 3)}])
    assert row[2:6] == ["5.33", "5.0", "4.00", "13.0"]


def test_seeds_and_gold_at_a_kl_that_all_reached() -> None:
    """Two seeds of one reward and one of another, which stops at 4 nats: gold there is 2 and 4,
    the mean 3 with an error of |4 - 2| / 2, and 1 with its own of sqrt(diff^2 / 2)."""

    def course(statistic: str, kl: list[float], gold: list[float]) -> dict[str, Any]:
        more = {"kl": kl, "gold": gold, "window": 1, **courses.fall(gold)}
        return {"source": "a", "statistic": statistic, **more}

    runs = [
        course("min", [0.0, 4.0, 9.0], [0.0, 2.0, 1.0]),
        course("min", [0.0, 5.0, 6.0], [0.0, 4.0, 0.0]),
        course("mean", [1.0, 4.0, 3.0], [0.0, 1.0, 3.0]),
    ]
    assert courses.reached(runs) == 4.0
    head, rows = table_of_drops(runs)
    assert head[-2:] == ["gold at KL 4.0", "verdict"]
    found = {row[0]: row[6:8] for row in rows}
    assert found["min, a"] == ["2.5 ± 1.5", "3.0 ± 1.0"]
    assert found["mean, a"][1] == "1.0 ± 1.1"  # sqrt((1 + 4) / 2 / 2)
    with pytest.raises(ValueError, match=r"gold_at: expected a KL of at most 4.0, got 4.5"):
        courses.gold_at(runs[2], 4.5)


def test_the_report_of_a_run_shows_the_study_beside_it(study: Path, tmp_path: Path) -> None:
    overoptimise.run(overoptimise.OveroptimiseConfig(str(study), str(study / "overoptimise")))
    make_apa(study / "apa", steps=8)
    page = write_report(study / "apa").read_text()
    assert "overoptimise/over_optimisation.json" in page and "seed-0/heads" in page
    assert {"over-optimisation", "over-optimisation-best-of-n"} <= plots_of(page).keys()
    assert (study / "apa" / "over-optimisation.png").stat().st_size > 5000
    (study / "overoptimise" / "over_optimisation.json").write_text('{"runs": [{}]}')
    page = write_report(study / "apa").read_text()
    assert "over_optimisation.json is damaged; it is left out." in page


def test_seeds_share_a_panel_and_a_single_model_a_row(study: Path) -> None:
    runs = courses.read(study)["runs"]
    assert [(s, len(c)) for (s, _), c in groups(runs).items()] == [
        *(("one model", 1), ("4 heads, one encoder", 2), ("3 models", 1))
    ]
    shown = [axis for axis in draw(runs, "training").axes if axis.axison]
    assert [(axis.get_title(loc="left"), axis.texts[0].get_text()) for axis in shown] == [
        *(("single head", "one model"), ("min", "4 heads, one encoder"), ("min", "3 models"))
    ]
    assert len({axis.get_xlim() for axis in shown}) == 1


def test_ticks_have_room() -> None:
    assert ticks(45.0) == [0.0, 2.0, 8.0, 16.0, 32.0]
    assert ticks(3.2) == [0.0, 0.25, 1.0, 2.0]


def test_a_drop_is_clear_from_three_standard_errors(study: Path) -> None:
    assert clear({"drop": 0.31, "drop_stderr": 0.1}) and not clear(
        {"drop": 0.29, "drop_stderr": 0.1}
    )
    assert not clear({"drop": 5.0, "drop_stderr": None})


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"), [("gold", math.nan), ("gold", None), ("heads", ...), ("heads", "1")]
)
def test_damaged_answers(tmp_path: Path, key: str, value: Any) -> None:
    records: list[dict[str, Any]] = answers()
    records[4][key] = value
    if value is ...:
        del records[4][key]
    make_samples(tmp_path / "bon", records)
    with pytest.raises(RunError, match=f"samples.jsonl: expected finite numbers as {key} of every"):
        courses.read(tmp_path)


def test_one_answer_to_each_prompt_is_no_course(tmp_path: Path) -> None:
    make_run(tmp_path / "run", GOLD)
    make_samples(tmp_path / "bon", answers()[:2])
    about = json.loads((tmp_path / "bon" / "curve.json").read_text())
    (tmp_path / "bon" / "curve.json").write_text(json.dumps(about | {"samples": 1}))
    assert courses.read(tmp_path)["best_of_n"] == []


def test_folders_without_gold(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a folder of runs, got .*none"):
        courses.read(tmp_path / "none")
    write_lines(
        tmp_path / "run" / "metrics.jsonl",
        [{"step": i, "phase": "train", "kl/k1": 1.0, "reward/proxy": 2.0} for i in range(5)],
    )
    with pytest.raises(RunError, match="has a gold reward beside its own: train, or draw with"):
        courses.read(tmp_path)


def test_answers_that_are_missing(tmp_path: Path) -> None:
    make_samples(tmp_path / "bon", answers()[:5])
    with pytest.raises(RunError, match="expected 2 x 3 answers, got 5"):
        courses.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"samples": 3, "prompts": 2}'])
def test_a_damaged_curve(tmp_path: Path, text: str) -> None:
    make_samples(tmp_path / "bon", answers())
    (tmp_path / "bon" / "curve.json").write_text(text)
    with pytest.raises(RunError, match=r"bon/curve.json is damaged: expected what bestofn writes"):
        courses.read(tmp_path)


# --- the page of the manual -----------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs/over-optimisation.md").read_text()
LINES = re.findall(r"^fastalign .*$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_commands_of_the_page_parse(line: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*shlex.split(line)[1:], "--print_config"])
    assert ended.value.code in (0, None), capsys.readouterr().err


def test_the_study_s_commands_parse(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = stages(tmp_path, seeds=1, models=2, steps=3, n=4)
    assert [len(stage) for stage in found] == [1, 3, 11]
    for command in (found[0][0], found[1][0], found[2][0], found[2][-1]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, "--print_config"])
        assert ended.value.code in (0, None), capsys.readouterr().err
