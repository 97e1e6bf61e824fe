"""What a run cost, in its report, and several runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import Loads, make_apa, make_sft, parse

from fastalign import cli
from fastalign.report import ReportError, write_report
from fastalign.report.accounting import (
    Cost,
    accounting_section,
    comparison,
    costs_of,
    scaled,
    share,
)
from fastalign.report.read import read_folder


def cost(seconds: float, joules: float | None, flops: float | None, **more: float) -> dict:
    zero = {"tokens": 0, "trained": 0, "memory_gib": 0.0}
    return {"seconds": seconds, "joules": joules, "flops": flops, **zero, **more}


def make_account(path: Path, scale: float = 1.0, **changes: Any) -> None:
    phases = {
        "update": cost(60 * scale, 3e4 * scale, 3e15 * scale, trained=5000, memory_gib=3.5),
        "generate": cost(30 * scale, 1e4 * scale, 1e15 * scale, tokens=20_000, memory_gib=1.5),
        "evaluate": cost(10.0, 2e3, 0.0),
        "other": cost(0.0, 0.0, 0.0),
    }
    total = cost(100 * scale, 4.2e4, 4e15 * scale, tokens=20_000, trained=5000, memory_gib=3.5)
    account = {
        "method": "x",
        "step": 10,
        "device": "NVIDIA H200",
        "energy": "NVML energy counter",
        "peak_flops": 989e12,
        "peak_source": "the data sheet of H200",
        "resumes": 2,
        "phases": phases,
        "total": total,
    }
    (path / "accounting.json").write_text(json.dumps(account | changes))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_sft(tmp_path / "runs" / "sft")
    make_apa(tmp_path / "runs" / "apa")
    (tmp_path / "runs" / "rwr").mkdir()
    for name, scale in (("sft", 0.5), ("apa", 1.0), ("rwr", 0.123)):
        make_account(tmp_path / "runs" / name, scale)
    return tmp_path / "runs"


def shown(folder: Path) -> str:
    """What people see of the section."""
    page = Loads()
    page.feed(accounting_section(read_folder(folder)))
    return page.text


def test_what_only_measures_is_no_part_of_a_cost(runs: Path) -> None:
    """A gold reward of its own, and an evaluation that scores."""
    account = json.loads((runs / "apa" / "accounting.json").read_text())
    account["phases"]["gold"] = cost(900.0, 1e6, 7e16, tokens=3)
    account["phases"]["evaluate"] = cost(10.0, 2e3, 5e16)
    account["total"]["flops"] += 12e16
    (runs / "apa" / "accounting.json").write_text(json.dumps(account))
    assert Cost.of("apa", read_folder(runs / "apa").accounts["apa"]) == Cost(
        "apa", 90.0, 4e4, 4e15, 20_000.0, 5000.0
    )
    assert "44.4 TFLOP/s while training, 4.49% of 989 TFLOP/s" in shown(runs / "apa")


def test_the_phases_of_a_run(runs: Path) -> None:
    text = shown(runs / "apa")
    # 4e15 FLOPs in the 90 s that were not evaluation: 44.4 TFLOP/s of 989.
    assert "44.4 TFLOP/s while training, 4.49% of 989 TFLOP/s (the data sheet of H200)" in text
    assert "Energy: NVML energy counter." in text and "Resumed 2×" in text
    generate = text.index("generate30.0 s30.0%10.0 kJ1.00 PFLOP20,000—1.50 GiB")
    update = text.index("update1 min 00 s60.0%30.0 kJ3.00 PFLOP—5,0003.50 GiB")
    evaluate = text.index("evaluate10.0 s10.0%2.00 kJ———")
    total = text.index("all1 min 40 s42.0 kJ4.00 PFLOP20,0005,0003.50 GiB")
    assert generate < update < evaluate < total
    assert "compute" not in text[generate:]  # nothing to compare it with


def test_a_parent_folder_compares_its_runs(runs: Path) -> None:
    text = parse(write_report(runs)).text
    assert "rwr needs 12.3% of apa's compute (12.3% of its seconds, 12.3% of its joules)." in text
    assert "sft needs 50.0% of apa's compute" in text
    # Without the 10 s of evaluation.
    assert "apa4.00 PFLOP100%1 min 30 s40.0 kJ20,0005,000" in text


def test_against_another_run(runs: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "elsewhere" / "apa"
    other.mkdir(parents=True)
    make_account(other, 8.0)
    capsys.readouterr()
    cli.main(["report", str(runs / "apa"), "--against", str(other)])
    path, said = capsys.readouterr().out.splitlines()
    assert path == str(runs / "apa" / "report.html")
    name = f"{other}: apa"  # there is an apa already
    assert said == (
        f"apa needs 12.5% of {name}'s compute (12.5% of its seconds, 12.5% of its joules)."
    )
    page = parse(Path(path))
    assert said in page.text and "What it cost" in page.text and "accounting" in page.ids
    with pytest.raises(ReportError, match="no accounting.json in .*nothing"):
        write_report(runs / "apa", against=[tmp_path / "nothing"])


def test_what_was_not_measured_is_not_invented(runs: Path) -> None:
    phases = {"update": cost(5.0, None, None, tokens=7)}
    make_account(runs / "sft", phases=phases, total=phases["update"], energy=None, peak_flops=None)
    text = shown(runs / "sft")
    assert "Nothing measured energy." in text and "update5.0 s100%——7——" in text
    said = comparison(costs_of(read_folder(runs)))
    assert said[-1] == "The FLOPs of sft are not known."
    assert comparison([Cost("a", 1.0, 1.0, float("nan"), 1, 1)]) == []
    assert comparison([]) == []


def test_a_damaged_account_is_left_out_aloud(runs: Path) -> None:
    for damage in ("{", "[]", '{"phases": 3}', "null"):
        (runs / "apa" / "accounting.json").write_text(damage)
        road = read_folder(runs / "apa")
        assert road.runs[0].notes == ["accounting.json is damaged; it is left out."]
        assert accounting_section(road) == ""
    assert [c.name for c in costs_of(read_folder(runs))] == ["sft", "rwr"]


def test_numbers_for_people() -> None:
    assert scaled(1.234e15, "FLOP") == "1.23 PFLOP"
    assert scaled(999.0, "J") == "999 J" and scaled(1000.0, "J") == "1.00 kJ"
    assert scaled(float("nan"), "J") == "—" and scaled(0.0, "J") == "0 J"
    assert share(0.12345) == "12.3%" and share(1.0) == "100%"


def test_what_repeats_a_run_that_has_no_evaluation(tmp_path: Path) -> None:
    make_sft(tmp_path / "run")
    make_account(
        tmp_path / "run",
        method="mle",
        command="fastalign train mle --keep 0.3",
        machine={"processor": "Z80", "cores": 1},
        versions={"torch": "9.9"},
    )
    html = write_report(tmp_path / "run").read_text()
    for words in ("fastalign train mle --keep 0.3", "Z80", "9.9", "MLE"):
        assert words in html
    assert "not recorded" not in html
