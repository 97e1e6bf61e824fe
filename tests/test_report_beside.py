"""Sections of the page whose numbers other commands wrote: where they are found, what they show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import EVALUATION, make_apa, make_sft, parse, plots_of
from matplotlib.figure import Figure

from fastalign.commands.bestofn import curve
from fastalign.commands.frontier import measure
from fastalign.report import write_report
from fastalign.report.beside import find, sections
from fastalign.report.labels import Label, write
from fastalign.report.read import read_folder

NAMES = ("frontier.svg", "frontier.png")


def records(shift: float = 0.0) -> list[dict[str, Any]]:
    """30 answers to each of 20 prompts, rewards N(gold before + shift, 1)."""
    rewards = EVALUATION["before"]["reward/gold"] + shift + torch.randn(20, 30).double()
    return [
        {"i": i, "prompt": str(i), "reward": r, "gold": r, "logp": -20.0}
        for i, row in enumerate(rewards.tolist())
        for r in row
    ]


def put(folder: Path, shift: float = 0.0, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = {**measure(records(shift), "gold", None, [0.3]), "runs": [], **more}
    (folder / "frontier.json").write_text(json.dumps(found))


def test_the_frontier_has_a_section_and_files(tmp_path: Path) -> None:
    make_apa(tmp_path / "runs/apa", steps=20)
    put(tmp_path / "runs/frontier")
    path = write_report(tmp_path / "runs/apa")
    page = parse(path)
    assert plots_of(path.read_text())["frontier"]
    assert page.ids.index("before-after") < page.ids.index("frontier") < page.ids.index("training")
    for words in (
        "From frontier/frontier.json.",
        "30 answers of the base to each of 20 prompts",
        "gold reward, mean over 20 prompts",
        "frontier, with its 95% band",
        "Before training: what goes with a KL budget",
        "past end",  # at 8.41 nats
        "misses at least",
    ):
        assert words in page.text, words
    assert all((path.parent / name).stat().st_size > 5000 for name in NAMES)
    assert b"<svg" in (path.parent / NAMES[0]).read_bytes()
    assert all(address.startswith("#") for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))


def test_the_nearest_counts_and_others_are_not_seen(tmp_path: Path) -> None:
    run = tmp_path / "runs/apa"
    places = [tmp_path / place for place in ("runs/frontier", "runs/apa/frontier", "runs/apa")]
    for unseen in ("frontier", "runs/ppo/frontier", "runs/ppo"):
        put(tmp_path / unseen)
    assert find(run, "frontier.json", "frontier") is None
    for place in places:
        put(place)
        assert find(run, "frontier.json", "frontier") == place / "frontier.json"


def test_a_run_with_another_base_is_not_placed(tmp_path: Path) -> None:
    make_apa(tmp_path / "apa", steps=20)
    put(tmp_path / "frontier", shift=1.0)
    (found,) = sections(read_folder(tmp_path / "apa"))
    assert "Not placed: apa: its baseline has a reward of 0.412 ± 0.030" in found.html
    assert "misses" not in found.html


def test_a_run_within_the_curve_shows_its_regret(tmp_path: Path) -> None:
    make_apa(tmp_path / "apa", steps=20)
    evaluation = json.loads(json.dumps(EVALUATION))
    evaluation["after"] |= {"kl/k1": 0.32, "kl/k1_stderr": 0.02, "reward/gold": 0.412 + 0.6}
    (tmp_path / "apa/evaluation.json").write_text(json.dumps(evaluation))
    others = [{"name": "apa", "note": "of an older evaluation"}, {"name": "ppo", "note": "no KL"}]
    put(tmp_path / "frontier", runs=others)
    (found,) = sections(read_folder(tmp_path / "apa"))
    assert "older evaluation" not in found.html and "Not placed: ppo: no KL" in found.html
    row = re.findall(r">([^<>]+)</td>", found.html)[:5]
    assert row[:2] == ["apa", "0.320 ± 0.020"]
    missed = float(row[4].split(" ± ")[0])
    assert missed == pytest.approx(0.8 - 0.6, abs=0.1)  # the frontier of N(m, 1) is m + sqrt(2 KL)


def test_best_of_n_has_a_section(tmp_path: Path) -> None:
    make_apa(tmp_path / "apa", steps=20)
    (tmp_path / "bestofn").mkdir()
    found = {**curve(records(), 30), "prompts": 20}
    (tmp_path / "bestofn/curve.json").write_text(json.dumps(found))
    (shown,) = sections(read_folder(tmp_path / "apa"))
    assert plots_of(shown.html) == {"best_of_n": True}
    for words in ("the reward it is chosen by", "gold reward", "reward, mean over 20 prompts"):
        assert words in shown.html
    assert set(shown.files) == {"best_of_n.svg", "best_of_n.png"}
    assert shown.files["best_of_n.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"curve": {"kl": []}, "runs": []}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    make_sft(tmp_path / "sft", steps=5)
    (tmp_path / "sft/frontier.json").write_text(content)
    (found,) = sections(read_folder(tmp_path / "sft"))
    assert "frontier.json is damaged; it is left out." in found.html


def test_two_models_without_training_have_no_training_curves(tmp_path: Path) -> None:
    make_apa(tmp_path, steps=20)
    named = {**EVALUATION, "names": {"before": "sft", "after": "mine"}}
    (tmp_path / "evaluation.json").write_text(json.dumps(named))
    line = {"step": 1, "phase": "eval", "reward/gold": 1.0, "kl/k1": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    path = write_report(tmp_path)
    page = parse(path)
    assert plots_of(path.read_text()) == {"reward-vs-kl": True}
    assert "Where both stand" in page.text and "Not plotted" not in page.text
    assert "over training" not in page.text and "One point a step" not in page.text


def test_labels_keep_clear_of_points_and_of_one_another() -> None:
    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    axis.set(xlim=(0, 1), ylim=(0, 1))
    points = [(0.5, 0.5), (0.5, 0.5), (0.52, 0.48), (0.95, 0.95)]
    write(axis, [Label(x, y, f"label {k}", "black") for k, (x, y) in enumerate(points)], points)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 4
    for k, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[k + 1 :])
        assert not any(box.contains(*axis.transData.transform(point)) for point in points)
        assert axis.get_window_extent().contains(box.x1, box.y1)
