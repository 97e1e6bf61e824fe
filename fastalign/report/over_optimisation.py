"""Where gold and proxy reward part: the content of an `over_optimisation.json` (commands/courses).

A panel for every source of rewards and statistic over its heads, runs and best-of-n apart: rise of
the proxy and of gold over the policy that training began from, in standard deviations of that
policy's responses, against KL. The square-root axis makes a line of a reward that rises as in
best-of-n of a normal one. A thin line is every round, a thick one the means of `window` rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fastalign.commands.courses import SINGLE, gold_at, reached, running_mean
from fastalign.ops.reduce_scores import STATISTICS
from fastalign.report.compare import number, with_error
from fastalign.report.figure import WIDE, Plot, as_text, plot_with_files
from fastalign.report.markup import safe
from fastalign.report.read import Road
from fastalign.report.style import AMBER, BLUE, INK, MUTED, RED, RULE

CLEAR = 3.0
"""Standard errors that a drop must have to be told from the luck of the best window."""
ORDER = (SINGLE, *STATISTICS)
NAMES = {"lcb": "LCB", "uwo": "UWO"}
TICKS = (0, 0.25, 1, 2, 4, 8, 16, 32, 64, 128, 256)

Course = dict[str, Any]


def section(found: dict[str, Any], _: Road) -> tuple[str, list[Plot]]:
    """The tables of a study, and its plots."""
    return tables(found), plots(found)


def plots(found: dict[str, Any]) -> list[Plot]:
    """The figures of what there is: along runs, along best-of-n."""
    gold = (
        "<b>Over-optimisation.</b> Rise over the policy that training began from, in standard "
        "deviations of its responses; blue is the proxy, amber gold, the ring gold's maximum."
    )
    made = []
    if found["runs"]:
        words = f"{gold} Thin: every round; thick: running means; a line for each run."
        made.append(
            plot_with_files("over-optimisation", words, lambda: draw(found["runs"], "training"))
        )
    if found["best_of_n"]:
        words = f"{gold} KL of best-of-n is at most log n - (n - 1) / n."
        made.append(
            plot_with_files(
                "over-optimisation-best-of-n",
                words,
                lambda: draw(found["best_of_n"], "best-of-n"),
            )
        )
    return made


def groups(courses: list[Course]) -> dict[tuple[str, str], list[Course]]:
    """Courses of one source and statistic (seeds) together, sources in order of appearance, single
    heads first."""
    sources = list(dict.fromkeys(c["source"] for c in sorted(courses, key=_rank)))
    found: dict[tuple[str, str], list[Course]] = {}
    for course in sorted(courses, key=lambda c: (sources.index(c["source"]), _rank(c))):
        found.setdefault((course["source"], course["statistic"]), []).append(course)
    return found


def _rank(course: Course) -> tuple[int, int]:
    statistic = course["statistic"]
    at = ORDER.index(statistic) if statistic in ORDER else len(ORDER)
    return course.get("n_models", 1), at


def clear(course: Course) -> bool:
    """Whether its drop is more than luck."""
    error = course["drop_stderr"]
    return error is not None and bool(course["drop"] > CLEAR * error)


# --- figures --------------------------------------------------------------------------------------


def draw(courses: list[Course], along: str) -> Figure:
    """Small panels, a row for every source and a column for every statistic; a model of one head
    stands in the row below its name."""
    grouped = groups(courses)
    statistics = sorted({s for _, s in grouped}, key=lambda s: _rank({"statistic": s}))
    rows = _rows(grouped)
    figure = Figure(figsize=(WIDE, 0.75 + 2.05 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(statistics), squeeze=False, sharex=True, sharey=True)
    most = max(max(c["kl"]) for c in courses)
    for at, row in enumerate(rows):
        for column, statistic in enumerate(statistics):
            axis = panels[at][column]
            one = next((grouped[k] for k in row if k[1] == statistic), None)
            if one is None:
                axis.set_axis_off()
                continue
            axis.set_title(as_text(NAMES.get(statistic, statistic)), loc="left", pad=15)
            axis.annotate(
                as_text(one[0]["source"]),
                (0, 1),
                (0, 4),
                xycoords="axes fraction",
                textcoords="offset points",
                color=MUTED,
                fontsize=8,
            )
            for course in one:
                _draw(axis, course)
            _say(axis, one)
    low, high = panels.flat[0].get_ylim()
    panels.flat[0].set_ylim(low, high + 0.3 * (high - low))  # room for the words
    for axis in panels.flat:
        axis.set_xscale("function", functions=(_root, np.square))
        axis.set_xlim(0, most * 1.02)
        axis.xaxis.set_major_locator(FixedLocator(ticks(most * 1.02)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda kl, _: f"{kl:g}"))
        axis.tick_params(labelbottom=True, labelleft=True)
    figure.supxlabel("KL to the policy that training began from, nats", color=MUTED, fontsize=9)
    figure.supylabel("rise of reward, standard deviations", color=MUTED, fontsize=9)
    figure.suptitle(
        f"Gold and proxy reward along {along}", x=0.01, ha="left", color=INK, fontsize=11
    )
    return figure


def _rows(grouped: dict[tuple[str, str], list[Course]]) -> list[list[tuple[str, str]]]:
    """Keys of each row of panels. One source is a row; a model of one head, which has one panel,
    shares that of the first other source."""
    sources = list(dict.fromkeys(source for source, _ in grouped))
    rows = [[key for key in grouped if key[0] == source] for source in sources]
    if (
        len(rows) > 1
        and [s for _, s in rows[0]] == [SINGLE]
        and SINGLE not in dict((s, None) for _, s in rows[1])
    ):
        rows[:2] = [rows[0] + rows[1]]
    return rows


def ticks(most: float) -> list[float]:
    """Those that have room on a square-root axis up to `most`, 0 and the largest ones first."""
    kept = [0.0]
    for tick in sorted((t for t in TICKS if 0 < t <= most), reverse=True):
        others = [math.sqrt(k) for k in kept]
        if all(abs(math.sqrt(tick) - k) > 0.13 * math.sqrt(most) for k in others):
            kept.append(float(tick))
    return sorted(kept)


def _root(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(x, 0.0))


def _draw(axis: Axes, course: Course) -> None:
    """One course: proxy, gold, and where gold was highest."""
    window = course.get("window", 1)
    at = _smooth(course, "kl")
    for name, colour in (("proxy", BLUE), ("gold", AMBER)):
        rise = risen(course, name)
        if window > 1:
            axis.plot(course["kl"], rise, color=colour, lw=0.6, alpha=0.3)
        axis.plot(at, running_mean(rise, window).numpy(), color=colour, lw=1.7)
    best = _best(course)
    top = running_mean(risen(course, "gold"), window).numpy()[best]
    axis.plot(at[best], top, "o", ms=6, mfc="white", mec=AMBER, mew=1.4, clip_on=False, zorder=3)
    axis.axhline(0, color=RULE, lw=0.8, zorder=0)


def risen(course: Course, name: str) -> list[float]:
    """A reward's rise over where it began, in its standard deviations there."""
    unit = course[f"{name}_std"] or 1.0
    return [(value - course[f"{name}_start"]) / unit for value in course[name]]


def _smooth(course: Course, name: str) -> np.ndarray:
    """Means of `window` rounds, as gold's maximum and end are."""
    return running_mean(course[name], course.get("window", 1)).numpy()


def _best(course: Course) -> int:
    """Which of these means has gold's maximum."""
    return int(course["peak_at"]) - course.get("window", 1) // 2


def _say(axis: Axes, courses: list[Course]) -> None:
    """The lines' names at the panel's upper left, and gold's drop."""
    drops = [c["drop"] / (c["gold_std"] or 1.0) for c in courses]
    told = f"gold, drop {number(float(np.mean(drops)), 0.1)} SD"
    colour = RED if any(map(clear, courses)) else AMBER
    for at, (words, hue) in enumerate((("proxy", BLUE), (told, colour))):
        axis.text(
            *(0.04, 0.97 - 0.1 * at, words),
            transform=axis.transAxes,
            color=hue,
            fontsize=8.5,
            fontweight="bold",
            va="top",
        )


# --- tables ---------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> str:
    """HTML: what gold lost, along runs and along best-of-n; how the heads differ; costs."""
    html = ""
    for title, courses in (("Along training", found["runs"]), ("Best-of-n", found["best_of_n"])):
        if courses:
            html += _table(title, *table_of_drops(courses))
    spread = [item for item in groups(found["runs"]).items() if "disagreement_first" in item[1][0]]
    if spread:
        html += _table("Disagreement of the heads", SPREAD, [_spread(*item) for item in spread])
    if found["reward_models"]:
        rows = [_head_row(one) for one in found["reward_models"]]
        html += _table("Reward models, on held-out pairs", HEADS, rows)
    costs = [row for item in groups(found["runs"]).items() if (row := _costs(*item))]
    if costs:
        html += _table("What the reward costs", COSTS, costs)
    return html


SPREAD = ("reward", "runs", "first rounds", "last rounds")
HEADS = ("reward model", "heads", "accuracy", "correlation", "disagreement", "shuffled: both")
COSTS = ("reward", "parameters", "its training, s", "its training, FLOP", "scoring, s")


def table_of_drops(courses: list[Course]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, as text. Runs go as far as they go: what compares them is gold at a KL that
    all of them came to. Best-of-n ends at the same KL for all."""
    head = ["reward", "runs", "max gold", "at KL", "final gold", "at KL", "drop"]
    at = None if "n" in courses[0] else reached(courses)
    more = [] if at is None else [f"gold at KL {number(at, 1.0)}"]
    rows = [_drops(*item, at) for item in groups(courses).items()]
    return [*head, *more, "verdict"], rows


def _named(key: tuple[str, str]) -> str:
    source, statistic = key
    return f"{NAMES.get(statistic, statistic)}, {source}"


def _mean(courses: list[Course], name: str) -> float:
    return float(np.mean([course[name] for course in courses]))


def over_seeds(values: list[float], errors: list[float | None]) -> str:
    """The mean and its standard error: of several seeds that between them, of one its own."""
    several = len(values) > 1
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if several else errors[0]
    return with_error(float(np.mean(values)), error)


def _drops(key: tuple[str, str], courses: list[Course], at: float | None) -> list[str]:
    kls = [_smooth(c, "kl") for c in courses]
    peak_kl = float(np.mean([kl[_best(c)] for kl, c in zip(kls, courses, strict=True)]))
    last_kl = float(np.mean([kl[-1] for kl in kls]))
    over = sum(map(clear, courses))
    verdict = "falls" if over == len(courses) else f"falls in {over}" if over else "no clear fall"
    drops, errors = ([c[name] for c in courses] for name in ("drop", "drop_stderr"))
    one = None if errors[0] is None else errors[0] / math.sqrt(2)  # a drop is a difference of two
    return [
        *(_named(key), str(len(courses))),
        *(number(_mean(courses, "peak"), 0.1), number(peak_kl, 1.0)),
        *(number(_mean(courses, "final"), 0.1), number(last_kl, 1.0)),
        over_seeds(drops, errors),
        *([] if at is None else [over_seeds([gold_at(c, at) for c in courses], [one])]),
        verdict,
    ]


def _spread(key: tuple[str, str], courses: list[Course]) -> list[str]:
    return [
        *(_named(key), str(len(courses))),
        *(number(_mean(courses, f"disagreement_{at}"), 0.01) for at in ("first", "last")),
    ]


def _head_row(one: dict[str, Any]) -> list[str]:
    def of(name: str) -> str:
        return number(one[name], 0.01) if name in one else ""

    both = ", ".join(filter(None, (of("correlation_shuffled"), of("disagreement_shuffled"))))
    accuracy = f"{100 * one['accuracy']:.1f}%" if "accuracy" in one else ""
    return [
        *(one["name"], str(one["heads"]), accuracy),
        *(of("correlation"), of("disagreement"), both),
    ]


def _costs(key: tuple[str, str], courses: list[Course]) -> list[str] | None:
    if not courses[0].get("n_parameters"):
        return None

    def of(name: str, unit: str = "{:,.0f}") -> str:
        values = [c["cost"][name] for c in courses if name in c["cost"]]
        return unit.format(np.mean(values)) if values else ""

    return [
        *(_named(key), f"{courses[0]['n_parameters']:,}"),
        *(of("training_seconds"), of("training_flops", "{:.2g}"), of("score_seconds")),
    ]


def _table(title: str, head: Sequence[str], rows: list[list[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        first, *rest = cells
        numbers = "".join(f'<{tag} class="n">{safe(cell)}</{tag}>' for cell in rest)
        return f"<tr><{tag}>{safe(first)}</{tag}>{numbers}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f'<h3>{title}</h3><div class="scroll"><table><thead>{line(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
