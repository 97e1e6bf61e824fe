"""The best-of-n curve as a picture: expected reward against n, and what it costs in KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastalign.report.style import BLUE, INK, MUTED, RULE


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the figure of a `curve.json`; .svg, .png or .pdf by the name.

    Args:
        found: `n`, `reward`, `kl_bound`, and where there are any `gold` and the standard errors.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    n = np.array(found["n"])
    with rc_context({"svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained", dpi=160)
        axis = figure.subplots()
        for name, colour, words in (
            ("reward", BLUE, "the reward it is chosen by"),
            ("gold", INK, "gold reward"),
        ):
            if name not in found:
                continue
            values = np.array(found[name])
            axis.plot(n, values, color=colour, marker="o" if len(n) == 1 else None)
            axis.annotate(
                words,
                (n[-1], values[-1]),
                xytext=(-4, 6),
                textcoords="offset points",
                ha="right",
                color=colour,
            )
            if f"{name}_stderr" in found:
                half = 1.96 * np.array(found[f"{name}_stderr"])
                axis.fill_between(n, values - half, values + half, color=colour, alpha=0.15, lw=0)
        axis.set_xscale("log")
        ticks = [k for k in n.tolist() if (k & (k - 1)) == 0]
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        bound = dict(zip(n.tolist(), found["kl_bound"], strict=True))
        axis.xaxis.set_major_formatter(
            FuncFormatter(lambda k, _: f"{int(k)}\n{bound.get(int(k), 0.0):.1f}")
        )
        axis.set_xlabel("n, and the most KL that best-of-n can have, in nats", color=MUTED)
        axis.set_title(
            f"Expected reward of the best of n answers, {found['prompts']} prompts",
            loc="left",
            color=INK,
            fontsize=11,
        )
        axis.grid(axis="y", color=RULE, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
        figure.savefig(path)
