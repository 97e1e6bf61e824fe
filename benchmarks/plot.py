"""A plot of benchmark results: one bar per candidate, one panel per shape.

    python -m benchmarks.plot FILE.json...        writes FILE.svg beside each

Of results with a ceiling in time, the bars are times over the ceiling's; those longer than CUT
times it end there, with their value written out. Of others they are times over fastalign's own, on
a logarithmic axis: right of the line at 1 is slower than fastalign. fastalign's bars are blue.
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


OURS = ("fastalign", "gae", "one head")
"""What the others are measured by."""


def over_ours(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, float]]]:
    """By panel (what stands before ``what`` in a row: shape, pass), each candidate's time over
    fastalign's; panels without fastalign, and ceilings, are left out."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        keys = list(row)[: list(row).index("what")] if "what" in row else []
        panels.setdefault(", ".join(f"{key} {row[key]}" for key in keys), []).append(row)
    found = {}
    for title, mine in panels.items():
        unit = next((u for u in ("ms", "us") if u in mine[0]), "")
        own = [row[unit] for row in mine if unit and row["what"] in OURS]
        if own:
            found[title] = [
                (row["what"], row[unit] / own[0]) for row in mine if "ceiling" not in row["what"]
            ]
    return found


def plot_over_ours(data: dict[str, Any], path: Path) -> None:
    """Writes the figure of a result file without a ceiling in time, by ``over_ours``.

    Args:
        data: what ``benchmarks.timing.report`` writes.
        path: .svg, .png or .pdf.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panels = over_ours(data["rows"])
    values = [value for bars in panels.values() for _, value in bars]
    low, high = min(0.5, 0.8 * min(values)), 2.0 * max(values)
    heights = [0.7 + 0.22 * len(bars) for bars in panels.values()]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastalign", "font.size": 9}):
        figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, bars) in zip(grid, panels.items(), strict=True):
            for place, (what, value) in enumerate(bars):
                colour = BLUE if what in OURS else MUTED
                axes.barh(place, value - low, left=low, color=colour, height=0.7)
                axes.text(1.05 * value, place, f"{value:.2f}", va="center")
            axes.set_yticks(range(len(bars)), [what for what, _ in bars])
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlim(low, high)
            axes.set_ylim(len(bars) - 0.4, -0.6)
            axes.axvline(1.0, color=INK, linewidth=1)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(title, loc="left", fontsize=10)
        grid[-1].set_xlabel("time over fastalign's")
        figure.suptitle(fill(machine_line(data), 120), fontsize=8, color=MUTED)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw(data: dict[str, Any], path: Path) -> bool:
    """The figure that suits the results; False where they have none."""
    if data["ratio"] is not None:
        plot(data, path)
    elif over_ours(data["rows"]):
        plot_over_ours(data, path)
    else:
        return False
    return True


def main() -> None:
    for name in sys.argv[1:]:
        draw(json.loads(Path(name).read_text()), Path(name).with_suffix(".svg"))


if __name__ == "__main__":
    main()
