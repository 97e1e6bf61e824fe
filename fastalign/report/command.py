"""`fastalign report RUN`: write the report of a run again, or of one that did not finish."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastalign.report import write_report


@dataclass
class ReportConfig:
    """Write report.html of a run folder."""

    run: str
    """Folder of one run, or of a road with the runs sft, reward and apa in it."""
    out: str | None = None
    """Where to write it; RUN/report.html by default."""


def run(config: ReportConfig) -> Path:
    """The path of the report."""
    path = write_report(Path(config.run), Path(config.out) if config.out else None)
    print(path)
    return path
