"""A plot of benchmark results: time over the ceiling's, one bar per candidate, one panel per shape.

    python -m benchmarks.plot FILE.json...        writes FILE.svg beside each

fastalign's bars are blue and labelled in bold, the line at 1 is the ceiling. Bars longer than CUT
times the ceiling end there, with their value written out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.table import by_shape, machine_line
from fastalign.report.style import BLUE, INK, MUTED, RULE

CUT = 6.0


def plot(data: dict[str, Any], path: Path) -> None:
    """Writes the figure of one result file; nothing is drawn for rows without a task.

    Args:
        data: what ``benchmarks.timing.report`` writes; ``data["ratio"]`` names the column.
        path: .svg, .png or .pdf.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ratio = data["ratio"]
    panels = [
        (f"{shape}, {direction}", [row for row in rows if row["pass"] == direction])
        for shape, rows in by_shape(data["rows"]).items()
        for direction in dict.fromkeys(row["pass"] for row in rows)
    ]
    panels = [
        (title, [row for row in rows if row["of"] != "ceiling"]) for title, rows in panels if rows
    ]
    heights = [0.9 + 0.24 * len(rows) for _, rows in panels]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastalign", "font.size": 9}):
        figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, rows) in zip(grid, panels, strict=True):
            for place, row in enumerate(rows):
                own = row["of"] == "fastalign"
                value = row[ratio]
                axes.barh(place, min(value, CUT), color=BLUE if own else MUTED, height=0.7)
                wrong = "" if row["agrees"] else "   differs from float64"
                axes.text(min(value, CUT) + 0.05, place, f"{value:.2f}{wrong}", va="center")
            axes.set_yticks(range(len(rows)), [f"{row['task']}: {row['what']}" for row in rows])
            for label, row in zip(axes.get_yticklabels(), rows, strict=True):
                label.set_fontweight("bold" if row["of"] == "fastalign" else "normal")
            axes.axvline(1.0, color=INK, linewidth=1)
            axes.set_xlim(0, 1.15 * CUT)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="x", color=RULE)
            axes.set_axisbelow(True)
            axes.set_title(title, loc="left", fontsize=10)
        grid[-1].set_xlabel(f"time, {ratio}")
        figure.suptitle(fill(machine_line(data), 120), fontsize=8, color=MUTED)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    for name in sys.argv[1:]:
        plot(json.loads(Path(name).read_text()), Path(name).with_suffix(".svg"))


if __name__ == "__main__":
    main()
