"""The picture of a laboratory: the exact frontier with the methods on it, and what each misses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from fastalign.report.figure import LOOK, WIDE, grid
from fastalign.report.style import AMBER, BLUE, GREEN, INK, MUTED, PURPLE, RED, SKY

COLOURS = (BLUE, AMBER, GREEN, PURPLE, RED, SKY, INK, "#7A6A00", "#A0447A")
GOAL = 2.0  # % of the reward's range
LEAST = 1e-3  # of the axis of regrets


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the figure of a `laboratory.json`; .svg, .png or .pdf by the name."""
    sources = found["sources"]
    with rc_context({**LOOK, "svg.hashsalt": "laboratory"}):
        figure, axes = grid(WIDE, 4.6 * len(sources), len(sources), 2)
        for i, source in enumerate(sources):
            colours = {
                m["name"]: COLOURS[k % len(COLOURS)] for k, m in enumerate(source["methods"])
            }
            draw_frontier(axes[2 * i], source, colours)
            draw_regrets(axes[2 * i + 1], source, colours)
        figure.savefig(path, dpi=160)


def draw_frontier(axis: Axes, source: dict[str, Any], colours: dict[str, str]) -> None:
    """Reward over KL: what can be had, what best-of-n has, and what each run of a method has."""
    best, n = source["frontier"], source["best_of_n"]
    ends = [run["kl"] for method in source["methods"] for run in method["runs"]]
    right = 1.15 * max([1.5, *ends])
    axis.plot(best["kl"], best["reward"], color=INK, lw=1.6)
    axis.plot(n["kl"], n["reward"], color=MUTED, lw=1.1, ls="--")
    axis.set_xlim(0, right)
    seen = np.array(best["kl"]) <= right
    low, high = best["reward"][0], max(np.array(best["reward"])[seen])
    axis.set_ylim(low - 0.05 * (high - low), high + 0.12 * (high - low))
    axis.set_title(f"{source['name']}: the frontier")
    axis.set_xlabel("KL to the base (nats)")
    axis.set_ylabel("expected reward")
    for method in source["methods"]:
        kls = [run["kl"] for run in method["runs"]]
        rewards = [run["reward"] for run in method["runs"]]
        axis.plot(kls, rewards, "o", color=colours[method["name"]], ms=5, mec="white", mew=0.6)
    height = float(np.diff(axis.get_ylim())[0])
    below, place = 0.052 * height, np.inf
    middle = {m["name"]: centre(m["runs"]) for m in source["methods"]}
    # From the top down, of equal rewards the higher KL first: so no line crosses another name.
    order = sorted(middle, key=lambda k: 0.3 * middle[k][0] / right + middle[k][1] / height)
    for name in reversed(order):
        # Names stand to the right of their runs, pushed down where others are near.
        x, y = middle[name]
        place = min(y - below, place - below)
        axis.annotate(
            name,
            (x, y),
            (x + 0.06 * right, place),
            color=colours[name],
            fontweight="bold",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colours[name],
                "lw": 0.6,
                "shrinkA": 0,
                "relpos": (0.0, 0.5),
            },
        )
    for line, share, offset, colour, words in (
        (best, 0.7, (-8, 12), INK, "the most that any policy can have"),
        (n, 0.97, (0, -26), MUTED, "best of n"),
    ):
        at = min(int(np.searchsorted(line["kl"], share * right)), len(line["kl"]) - 1)
        point = (line["kl"][at], line["reward"][at])
        axis.annotate(
            words, point, offset, textcoords="offset points", ha="right", va="center", color=colour
        )


def centre(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean KL and reward."""
    return float(np.mean([r["kl"] for r in runs])), float(np.mean([r["reward"] for r in runs]))


def draw_regrets(axis: Axes, source: dict[str, Any], colours: dict[str, str]) -> None:
    """The regret of each run, in % of the reward's range, and that of where it should end."""
    methods = source["methods"]
    axis.set_xscale("log")
    for place, method in enumerate(reversed(methods)):
        runs = method["runs"]
        aim = max(LEAST, 100 * runs[0]["target_regret_share"])
        x = [max(LEAST, 100 * run["regret_share"]) for run in runs]
        axis.plot([aim], [place], "|", color=INK, ms=15, mew=1.6)
        axis.plot(x, [place] * len(x), "o", color=colours[method["name"]], ms=6, mec="white")
    labels = [f"{method['name']}\n{method['settings']}" for method in reversed(methods)]
    axis.set_yticks(range(len(methods)), labels, fontsize=8.5)
    for label, method in zip(axis.get_yticklabels(), reversed(methods), strict=True):
        label.set_color(colours[method["name"]])
    axis.set_ylim(-0.7, len(methods) - 0.1)
    axis.set_xlim(LEAST / 1.5, 60)
    axis.axvline(GOAL, color=MUTED, lw=0.8, ls=":")
    axis.annotate(f"{GOAL:g} %", (GOAL, len(methods) - 0.45), (3, 0), textcoords="offset points")
    axis.set_title("regret: dots, runs; bars, where the method should end")
    axis.set_xlabel(f"missed reward, % of its range (at most {LEAST:g} drawn there)")
