"""The best-of-n curve as a picture: expected reward against n, and what it costs in KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fastalign.report.figure import WIDE, Plot, grid, plot_with_files
from fastalign.report.files import write_atomically
from fastalign.report.labels import Label, write
from fastalign.report.markup import safe
from fastalign.report.read import Road
from fastalign.report.style import AMBER, BLUE
from fastalign.theory.interval import student_t

LINES = (("reward", BLUE, "the reward it is chosen by"), ("gold", AMBER, "gold reward"))


def picture(found: dict[str, Any]) -> Plot:
    """The figure of a `curve.json`: `n`, `reward`, `kl_bound`, `prompts`, and where there are any
    `gold` and the standard errors. Its files are best_of_n.svg and best_of_n.png."""
    words = (
        f"<b>Best-of-n.</b> Mean reward of the best of n answers to {safe(str(found['prompts']))} "
        "prompts. Bands: 95%, over prompts."
    )
    return plot_with_files("best_of_n", words, lambda: _draw(found))


def draw(found: dict[str, Any], folder: Path) -> None:
    """Writes best_of_n.svg and best_of_n.png."""
    for name, content in picture(found).files.items():
        write_atomically(folder / name, content)


def section(found: dict[str, Any], road: Road) -> tuple[str, list[Plot]]:
    """The section of the page."""
    return "", [picture(found)]


def _draw(found: dict[str, Any]) -> Figure:
    n = np.array(found["n"])
    figure, (axis,) = grid(WIDE, 4.2, 1, 1)
    labels, taken = [], []
    has_bands = False
    for name, colour, words in LINES:
        if name not in found:
            continue
        values = np.array(found[name])
        axis.plot(n, values, color=colour, lw=2, marker="o" if len(n) == 1 else None)
        if f"{name}_stderr" in found:
            half = student_t(found["prompts"] - 1) * np.array(found[f"{name}_stderr"])
            axis.fill_between(n, values - half, values + half, color=colour, alpha=0.15, lw=0)
            has_bands = True
        middle = int(np.searchsorted(n, len(n) ** 0.6))
        labels.append(Label(float(n[middle]), float(values[middle]), words, colour))
        taken += list(zip(n.tolist(), values.tolist(), strict=True))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator([k for k in n.tolist() if (k & (k - 1)) == 0]))
    axis.xaxis.set_minor_locator(NullLocator())
    bound = dict(zip(n.tolist(), found["kl_bound"], strict=True))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda k, _: f"{int(k)}\n{bound.get(int(k), 0.0):.1f}")
    )
    axis.set_xlabel("n, and below it the most KL that best-of-n can have, nats / response")
    bands = "; band: 95%" if has_bands else ""
    axis.set_ylabel(f"reward, mean over {found['prompts']:,} prompts{bands}")
    axis.margins(y=0.12)
    figure.draw_without_rendering()  # labels need the axis in its place
    axis.autoscale(False)
    write(axis, labels, taken)
    return figure
