"""Drawing for the report: what every figure shares, from the running mean to the finished SVG.

A thin line is every logged step (long runs: means of equal bins), a thick line the centred running
mean over about a twentieth of the run, a dot an evaluation. Lines carry their names at their ends.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastalign.report.compare import comparison_rows, names_of
from fastalign.report.read import POLICY_METHODS, Run
from fastalign.report.style import AMBER, BLUE, GREEN, INK, MUTED, PURPLE, RED, RULE, SKY

WIDE, HALF = 10.0, 4.9  # inches; the page scales them to its width
MOST_POINTS = 400
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text; the page's font replaces matplotlib's
    "font.size": 9.5,
    "text.color": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.edgecolor": "#AEB6C0",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Plot:
    """One figure of the page: its SVG, or what was missing for it."""

    id: str
    caption: str
    svg: str | None
    missing: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """The same as files by their names, for figures that get some."""


@dataclass(frozen=True)
class Line:
    key: str
    label: str
    colour: str
    dash: str = "-"
    raw: bool = True
    """Draw every step as a thin line."""
    smooth: bool = True
    """Draw the running mean as the thick line, else the values themselves."""


def plot(
    id: str,
    caption: str,
    draw: Callable[[], Figure],
    data: Sequence[Any],
    needed: str,
    width: float = WIDE,
) -> Plot:
    if not data:
        return Plot(id, caption, None, f"Not plotted: the metrics hold no {needed}.")
    svg = _saved(id, draw, "svg")["svg"].decode()
    return Plot(id, caption, _inline(svg, id))


def plot_with_files(id: str, caption: str, draw: Callable[[], Figure]) -> Plot:
    """A figure that is kept as ID.svg and ID.png too."""
    found = _saved(id, draw, "svg", "png")
    files = {f"{id}.{kind}": content for kind, content in found.items()}
    return Plot(id, caption, _inline(found["svg"].decode(), id), files=files)


def _saved(id: str, draw: Callable[[], Figure], *kinds: str) -> dict[str, bytes]:
    bare = {"svg": ("Date", "Creator", "Format", "Type"), "png": ("Software",)}
    found = {}
    with matplotlib.rc_context({**LOOK, "svg.hashsalt": id}):
        figure = draw()
        for kind in kinds:
            buffer = io.BytesIO()
            metadata = dict.fromkeys(bare[kind])
            figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
            found[kind] = buffer.getvalue()
    return found


def _inline(svg: str, id: str) -> str:
    """The <svg> element alone, its ids made the figure's own, and no address of any kind in it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'\sid="([^"]+)"', rf' id="{id}-\1"', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{id}-', svg)
    return re.sub(r"url\(#", f"url(#{id}-", svg)


def grid(
    width: float, height: float, rows: int, columns: int, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex or columns == 1)
    return figure, list(axes.flat)


def recorded(run: Run, *lines: Line) -> list[Line]:
    return [line for line in lines if run.has(line.key)]


def head_lines(run: Run, prefix: str) -> list[Line]:
    colours = (BLUE, AMBER, GREEN, PURPLE, SKY, RED)
    keys = [key for key in run.head_keys(prefix) if run.has(key)]
    names = [f"head {key[len(prefix) :]}" for key in keys]
    return [
        Line(key, name, colours[at % len(colours)], raw=False)
        for at, (key, name) in enumerate(zip(keys, names, strict=True))
    ]


def draw_lines(axis: Axes, run: Run, lines: list[Line], unit: str) -> None:
    """Draws metrics over steps on one axis, named at their ends; evaluations are dots."""
    ends = []
    for line in lines:
        ends.append(draw_line(axis, line, *run.finite(line.key)))
        steps, values = run.finite(line.key, "eval")
        axis.plot(steps, values, "o", color=line.colour, ms=4, mec="white", mew=0.8)
    axis.set_ylabel(unit)
    finish(axis, ends, [line.label for line in lines], [line.colour for line in lines])


def draw_line(axis: Axes, line: Line, steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Draws one metric and returns the end of its line."""
    at, thick = thin(steps, _running_mean(values) if line.smooth else values)
    if line.raw and line.smooth:
        axis.plot(*thin(steps, values), color=line.colour, lw=0.7, alpha=0.35)
    dot = "o" if len(at) == 1 else None
    axis.plot(at, thick, color=line.colour, lw=1.9, ls=line.dash, marker=dot, ms=5)
    return float(at[-1]), float(thick[-1])


def finish(
    axis: Axes,
    ends: list[tuple[float, float]],
    labels: list[str],
    colours: list[str],
    pad: float = 4,
) -> None:
    """The step axis, and each line's name at its end, pushed apart where ends are close."""
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.margins(x=0.01)
    if np.ptp(axis.dataLim.intervalx) == 0:  # one step: no fractions of a step around it
        axis.set_xlim(axis.dataLim.x0 - 1, axis.dataLim.x0 + 1)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)
    order = sorted(range(len(ends)), key=lambda at: ends[at][1])
    height = axis.get_window_extent().height * 0.8 or 200.0  # the layout takes the rest
    gap = 15.0 / height * (high - low)
    places = [ends[at][1] for at in order]
    for at in range(1, len(places)):
        places[at] = max(places[at], places[at - 1] + gap)
    for at in reversed(range(len(places))):
        roof = high if at == len(places) - 1 else places[at + 1] - gap
        places[at] = min(places[at], roof)
    for place, at in zip(places, order, strict=True):
        if labels[at]:
            axis.annotate(
                labels[at],
                (1, place),
                (pad, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color=colours[at],
                va="center",
                fontweight="bold",
            )


def draw_stack(axis: Axes, run: Run, phases: list[Line]) -> None:
    """Stacked means of at most 60 bins of steps, one filled outline a phase."""
    steps = np.unique(np.concatenate([run.finite(line.key)[0] for line in phases]))
    cuts = np.linspace(0, len(steps), min(len(steps), 60) + 1).astype(int)
    starts, counts = cuts[:-1], np.diff(cuts)
    edges = np.append(steps[starts], steps[-1] + 1) - 0.5
    base = np.zeros(len(starts))
    ends = []
    for line in phases:
        at, seconds = run.finite(line.key)
        every = np.zeros(len(steps))
        every[np.searchsorted(steps, at)] = seconds
        top = base + np.add.reduceat(every, starts) / counts
        axis.stairs(top, edges, baseline=base, fill=True, color=line.colour, alpha=0.82, lw=0)
        ends.append((float(steps[-1]), float(base[-1] + top[-1]) / 2))
        base = top
    axis.set_ylim(bottom=0)
    axis.set_ylabel("s / step")
    finish(axis, ends, [line.label for line in phases], [line.colour for line in phases])


def as_text(name: str | None) -> str:
    """A name in a figure: no dollar sign begins a formula."""
    return (name or "").replace("$", r"\$")


def draw_evaluation(axis: Axes, evaluation: dict[str, Any] | None, key: str) -> None:
    """The evaluation before (at KL 0 unless recorded) and after, with 95% intervals on both
    axes."""
    if evaluation is None:
        return
    rows = {row.key: row for row in comparison_rows(evaluation)}
    reward, kl = rows.get(key), rows.get("kl/k1")
    if reward is None or kl is None:
        return
    method = evaluation.get("method")
    base, named = map(as_text, names_of(evaluation))
    after = named or (str(method).upper() if method in POLICY_METHODS else "after")
    sides = (
        (base, reward.before, reward.before_se, kl.before or 0.0, kl.before_se),
        (after, reward.after, reward.after_se, kl.after, kl.after_se),
    )
    for name, y, y_se, x, x_se in sides:
        if x is None or y is None:
            continue
        bars = [None if error is None else reward.reach * error for error in (x_se, y_se)]
        axis.errorbar(
            x, y, xerr=bars[0], yerr=bars[1], fmt="o", ms=9, mfc="none", mec=RED, color=RED, mew=1.6
        )
        axis.annotate(
            name,
            (x, y),
            (0, -17),
            textcoords="offset points",
            color=RED,
            fontweight="bold",
            ha="center",
            bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
        )


def _window(count: int) -> int:
    """Width of the running mean, odd."""
    return max(count // 20, 1) | 1


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over ``_window`` steps, over fewer at the ends."""
    half = _window(len(values)) // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: means of equal bins."""
    if len(steps) <= MOST_POINTS:
        return steps.astype(np.float64), values
    edges = np.linspace(0, len(steps), MOST_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(steps)))
    return np.add.reduceat(steps.astype(np.float64), edges) / counts, np.add.reduceat(
        values, edges
    ) / counts


def smoothing(run: Run) -> str:
    count = len(run.lines.get("train", {}))
    if _window(count) < 3:
        return ""
    each = "each step" if count <= MOST_POINTS else f"means of {MOST_POINTS} bins"
    return f" Thin: {each}; thick: running mean over {_window(count)} steps."
