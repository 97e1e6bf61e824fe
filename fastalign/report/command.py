"""The end of every run, and `fastalign report RUN` for one that did not finish."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastalign.report import before_after_table, headline, write_report
from fastalign.report.accounting import comparison, costs_of
from fastalign.report.read import read_folder


@dataclass
class ReportConfig:
    """Write report.html of a run folder."""

    run: str
    """Folder of one run, or of a road with the runs sft, reward and apa in it."""
    out: str | None = None
    """Where to write it; RUN/report.html by default."""
    against: str | None = None
    """Another run, or a folder of runs, whose compute is compared with this one's."""


def conclude(folder: Path) -> Path:
    """At the end of a run: its report, and on the screen the table of before and after, if any."""
    path = write_report(folder)
    measured = folder / "evaluation.json"
    if measured.exists():
        from rich.console import Console
        from rich.text import Text

        comparison = json.loads(measured.read_text())
        Console().print(before_after_table(comparison), Text(headline(comparison)))
    return path


def run(config: ReportConfig) -> Path:
    """The path of the report."""
    against = [Path(config.against)] if config.against else []
    path = write_report(Path(config.run), Path(config.out) if config.out else None, against)
    print(path)
    for sentence in comparison(costs_of(read_folder(Path(config.run), against))):
        print(sentence)
    return path
