"""The report of a run: one self-contained HTML page, and the same numbers for the terminal.

``write_report`` reads a run folder and writes ``report.html`` into it; ``headline`` and
``before_after_table`` say the result in one sentence and in one table at the end of a training.
Siblings: read.py (the folder), compare.py (before against after), accounting.py (costs), plots.py
(the figures), frontier.py and best_of_n.py (what these commands wrote, found by beside.py), page.py
(the HTML), style.py (its style sheet).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastalign.report.compare import before_after_table, headline
from fastalign.report.read import ReportError

__all__ = ["ReportError", "before_after_table", "headline", "write_report"]


def write_report(
    run_dir: Path | str, out: Path | str | None = None, against: Sequence[Path | str] = ()
) -> Path:
    """Writes one HTML file that tells the whole story of a run and needs nothing else: no network,
    no script. Pictures of what other commands wrote (beside.py) stand beside it as SVG and PNG.

    Args:
        run_dir: a run folder (``metrics.jsonl`` and what lies beside it), or a folder of stages
            with the subfolders ``sft/``, ``reward/`` and ``apa/`` (or another policy method's
            name). What is missing or damaged is named in the report.
        out: the file to write, or a folder for ``report.html``; default ``run_dir/report.html``.
            It is replaced whole or not at all.
        against: runs, or folders of runs, whose costs (``accounting.json``) stand beside this
            one's.

    Returns:
        The path of the file written.

    Raises:
        ReportError: the folder does not exist, or neither it nor a stage in it has a
        ``metrics.jsonl``; or one of ``against`` has no ``accounting.json``.
    """
    from fastalign.report.beside import sections  # matplotlib is paid for only here
    from fastalign.report.files import write_atomically
    from fastalign.report.page import render
    from fastalign.report.read import read_folder

    road = read_folder(Path(run_dir), [Path(other) for other in against])
    target = road.path / "report.html" if out is None else Path(out)
    if target.is_dir():
        target = target / "report.html"
    shown = sections(road)
    # A model may emit half a surrogate pair: it becomes "?", it must not cost the report.
    write_atomically(target, render(road, shown).encode("utf-8", errors="replace"))
    for one in shown:
        for name, content in one.files.items():
            write_atomically(target.with_name(name), content)
    return target
