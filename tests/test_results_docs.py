"""docs/results: the tables of the pages have the numbers of the files beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastalign.commands.courses import running_mean
from fastalign.laboratory.command import table
from fastalign.report.over_optimisation import table_of_drops

RESULTS = Path(__file__).parent.parent / "docs" / "results"
LABORATORY = (RESULTS / "laboratory.md").read_text()
OVER = (RESULTS / "over-optimisation.md").read_text()
STUDY = json.loads((RESULTS / "over-optimisation" / "over_optimisation.json").read_text())
NAMES = {"lcb": "LCB", "uwo": "UWO"}


def rows(text: str) -> list[list[str]]:
    """Cells of all lines of Markdown tables, without heads."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if line.startswith("|") and not set(line) <= set("|-: "):
            found.append(cells)
    return found


def section(page: str, title: str) -> list[list[str]]:
    """Rows of the one table under a heading."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return rows(text)[1:]


@pytest.mark.parametrize("at", [0, 1])
def test_the_laboratory_s_table_is_what_the_command_prints(at: int) -> None:
    found = json.loads((RESULTS / "laboratory.json").read_text())["sources"][at]
    computed = rows(table(found).replace("-0.000", "0.000"))[1:]
    assert section(LABORATORY, found["name"]) == computed
    assert len(computed) == 9 and all(len(one["runs"]) == 3 for one in found["methods"])


def named(course: dict[str, Any]) -> str:
    statistic = NAMES.get(course["statistic"], course["statistic"])
    return f"{statistic}, {course['source']}"


def test_drops_along_training() -> None:
    computed = {row[0]: row[2:7] for row in table_of_drops(STUDY["runs"])[1]}
    shown = section(OVER, "Along training")
    assert len(shown) == len(computed) == 9
    for name, *cells in shown:
        numbers = [[float(n) for n in cell.replace("−", "-").split("±")] for cell in cells]
        wanted = [[float(n) for n in c.replace("−", "-").split("±")] for c in computed[name]]
        for number, want, digit in zip(numbers, wanted, (0.01, 0.1) * 2 + (0.01,), strict=False):
            assert number == pytest.approx(want, abs=0.501 * digit), name


def test_gold_at_a_kl() -> None:
    courses = {named(course): course for course in STUDY["runs"]}
    for name, *_, at_8, at_25 in section(OVER, "Along training"):
        course = courses[name]
        gold, kl = (running_mean(course[key], course["window"]) for key in ("gold", "kl"))
        for least, shown in ((8, at_8), (25, at_25)):
            first = int((kl >= least).int().argmax())
            assert f"{float(gold[first]):.2f}" == shown, (name, least)


def test_best_of_n() -> None:
    courses = {
        (c["statistic"], c["source"].removesuffix(", one encoder")): c for c in STUDY["best_of_n"]
    }
    shown = section(OVER, "Along best-of-n")
    assert len(shown) == len(courses) == 12
    for name, peak, kl, final, drop in shown:
        statistic, source = name.replace(" (mean over them)", "").rsplit(", ", 1)
        course = courses[statistic if "single" in statistic else statistic.lower(), source]
        assert f"{course['peak']:.2f}" == peak and f"{course['final']:.2f}" == final, name
        assert f"{course['kl'][course['peak_at']]:.1f}" == kl, name
        error = f"{course['drop']:.2f} ± {course['drop_stderr']:.2f}"
        assert (error if course["drop_stderr"] else "0") == drop, name


def test_disagreement_and_cost() -> None:
    courses = {named(c).removesuffix(", one encoder"): c for c in STUDY["runs"]}
    for name, first, last in section(OVER, "Heads and models"):
        course = courses[name]
        assert f"{course['disagreement_first']:.3f}" == first, name
        assert f"{course['disagreement_last']:.3f}" == last, name
    by_source = {course["source"]: course for course in STUDY["runs"]}
    for source, parameters, training, _ in section(OVER, "Cost"):
        course = by_source[source]
        assert f"{course['n_parameters']:,}" == parameters
        assert f"{course['cost']['training_flops']:.1e}".replace("+", "") == training
