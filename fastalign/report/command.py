"""The end of every run, and `fastalign report RUN` for one that did not finish."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastalign.report import before_after_table, headline, write_report


@dataclass
class ReportConfig:
    """Write report.html of a run folder."""

    run: str
    """Folder of one run, or of a road with the runs sft, reward and apa in it."""
    out: str | None = None
    """Where to write it; RUN/report.html by default."""


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
    path = write_report(Path(config.run), Path(config.out) if config.out else None)
    print(path)
    return path
