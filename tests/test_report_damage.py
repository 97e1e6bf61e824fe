"""What the report forgives: empty, cut and damaged files, values that are not finite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import (
    POLICY_PLOTS,
    make_apa,
    parse,
    plots_of,
    write_lines,
)

from fastalign.report import ReportError, write_report
from fastalign.report.read import read_folder


@pytest.mark.parametrize("content", ["", "\n", '{"step": 0, "pha'])
def test_empty_metrics(tmp_path: Path, content: str) -> None:
    (tmp_path / "apa").mkdir()
    (tmp_path / "apa" / "metrics.jsonl").write_text(content)
    path = write_report(tmp_path)
    assert "metrics.jsonl holds no step yet." in parse(path).text
    drawn = plots_of(path.read_text(encoding="utf-8"))
    assert drawn == dict.fromkeys(POLICY_PLOTS, False)
    assert "Not plotted: the metrics hold no entropy, length, finished." in parse(path).text


def test_one_step_and_values_that_are_not_finite(tmp_path: Path) -> None:
    metrics = '{"step": 1, "phase": "train", "reward/proxy": 0.5, "kl/k1": 0.1, "loss": NaN'
    (tmp_path / "metrics.jsonl").write_text(metrics + ', "entropy": Infinity, "length": null}\n')
    path = write_report(tmp_path)
    drawn = plots_of(path.read_text(encoding="utf-8"))
    assert drawn["reward-kl"] and drawn["reward-vs-kl"]
    assert not drawn["collapse"] and not drawn["losses"]
    text = parse(path).text
    assert "values that are not finite: entropy (1x), length (1x), loss (1x)." in text
    assert "So far, one step: the proxy reward of its samples is 0.500." in text


def test_truncated_and_broken_lines(tmp_path: Path) -> None:
    good = [json.dumps({"step": step, "phase": "train", "kl/k1": step}) for step in range(3)]
    lines = [
        good[0],
        "not json",
        good[1],
        "[1, 2]",
        '{"phase": "train"}',
        good[2],
        '{"step": 3, "k',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = read_folder(tmp_path).policy
    assert run is not None
    assert run.series("kl/k1")[1].tolist() == [0.0, 1.0, 2.0]
    assert run.notes == [
        "metrics.jsonl: the last line is cut off (stopped while writing); it is left out.",
        "metrics.jsonl: 2 unreadable line(s) left out (line 2, 4).",
        "metrics.jsonl: line 5 has no step; it is left out.",
    ]


def test_resume_later_line_wins_and_steps_are_sorted(tmp_path: Path) -> None:
    steps = [1, 2, 3, 4, 3, 4, 5, 0]
    lines = [
        {"step": step, "phase": "train", "kl/k1": 10.0 * position + step}
        for position, step in enumerate(steps)
    ]
    lines.append({"step": 4, "phase": "eval", "kl/k1": -1.0})
    write_lines(tmp_path / "metrics.jsonl", lines)
    run = read_folder(tmp_path).policy
    assert run is not None
    at, values = run.series("kl/k1")
    assert at.tolist() == [0, 1, 2, 3, 4, 5]
    assert values.tolist() == [70.0, 1.0, 12.0, 43.0, 54.0, 65.0]
    assert run.series("kl/k1", "eval")[1].tolist() == [-1.0]
    assert run.notes == [
        "metrics.jsonl: 2 step(s) logged again after a resume; the later line counts."
    ]


def test_damaged_evaluation_is_said(tmp_path: Path) -> None:
    make_apa(tmp_path, steps=5)
    (tmp_path / "evaluation.json").write_text('{"before": {"reward')
    text = parse(write_report(tmp_path)).text
    assert "evaluation.json is damaged or holds no before and after" in text
    assert "This run is not finished" in text


def test_long_run_stays_small(tmp_path: Path) -> None:
    make_apa(tmp_path, steps=5000)
    path = write_report(tmp_path)
    assert path.stat().st_size < 3_000_000
    assert "means of 400 bins; thick: running mean over 251 steps" in parse(path).text


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="expected a run folder, got '.*nowhere'"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ReportError, match=r"expected metrics.jsonl in .*, found none") as raised:
        write_report(tmp_path)
    assert "\n" not in str(raised.value) and isinstance(raised.value, ValueError)
