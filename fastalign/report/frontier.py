"""The frontier with its band, best-of-n and the runs beside it: the content of a `frontier.json`.

A run is placed by its evaluation.json: KL (`exact` where it was measured, else k1) and mean reward,
with their standard errors; fastalign/theory/place.py has the formulas. Past the curve's end a run
misses at least what best-of-n has more within the run's KL, where that is more than the curve's end
has. A run whose own baseline has
another reward than the frontier's base is not placed: it answered other prompts, or began from
another model, or was measured by another reward.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fastalign.report.compare import Z95, Row, comparison_rows, names_of, number, with_error
from fastalign.report.figure import WIDE, Plot, as_text, grid, plot_with_files
from fastalign.report.labels import Label, write
from fastalign.report.markup import safe
from fastalign.report.read import Road
from fastalign.report.style import BLUE, GREEN, INK, RED
from fastalign.theory import Frontier, place

COLUMNS = ("alpha", "kl", "kl_se", "reward", "reward_se", "low", "high", "ess")
RUNS = ("Run", "KL, nats", "Reward", "Frontier", "Misses")
BUDGETS = ("KL, nats", "Beta or lambda", "Alpha", "Reward", "n of best-of-n", "Its reward")
MOST_ERRORS = 4.0  # by which a baseline may be off the frontier's base


def curve_of(found: dict[str, Any]) -> Frontier:
    """The frontier as it was computed."""
    held = found["curve"]
    columns = [torch.tensor(held[name], dtype=torch.float64) for name in COLUMNS]
    return Frontier(**dict(zip(COLUMNS, columns, strict=True)))


def placed(found: dict[str, Any], name: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """A run's place: `kl`, `reward`, `regret` in units of the reward and their `..._se`; past the
    end of the curve `regret` is None and `at_least` and `at_most` bound it. Where it cannot be
    placed, `note` says why.
    """
    column = found["reward"]
    key = "reward/proxy" if column == "reward" else f"reward/{column}"
    rows = {row.key: row for row in comparison_rows(evaluation)}
    reward, kl = rows.get(key), rows.get("kl/exact") or rows.get("kl/k1")
    if reward is None or reward.after is None:
        return {"name": name, "note": f"{key} was not measured"}
    if kl is None or kl.after is None:
        return {"name": name, "note": "its KL was not measured"}
    off = _off_the_base(found, reward)
    if off:
        return {"name": name, "note": off}
    errors = [math.nan if e is None else e for e in (kl.after_se, reward.after_se)]
    kl_se, reward_se = (0.0 if math.isnan(e) else e for e in errors)
    at = place(curve_of(found), kl.after, reward.after, kl_se=kl_se, reward_se=reward_se)
    least, least_se = at.at_least, at.at_least_se
    for gain, gain_se in _best_of_n_within(found, kl.after) if at.is_past_end else ():
        if gain - reward.after > least:
            least, least_se = gain - reward.after, math.hypot(gain_se, reward_se)
    # One prompt has no standard error, and neither has what follows from it.
    unknown = 0.0 * sum(errors)
    numbers = {
        "kl": kl.after,
        "kl_se": errors[0],
        "reward": reward.after,
        "reward_se": errors[1],
        "frontier_reward": at.frontier_reward,
        "regret": at.regret,
        "regret_se": at.se + unknown,
        "at_least": least,
        "at_least_se": least_se + unknown,
        "at_most": at.at_most,
        "at_most_se": at.at_most_se + unknown,
        "alpha": at.alpha,
    }
    known = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    return {"name": name, "kl_by": kl.key, "is_past_end": at.is_past_end, **known}


def _best_of_n_within(found: dict[str, Any], kl: float) -> list[tuple[float, float]]:
    """Rewards of best-of-n that is sure to keep within this KL, with their standard errors."""
    best = found["best_of_n"]
    errors = best.get("reward_se", [0.0] * len(best["n"]))
    rows = zip(best["kl_bound"], best["reward"], errors, strict=True)
    return [(reward, error) for bound, reward, error in rows if bound <= kl]


def _off_the_base(found: dict[str, Any], reward: Row) -> str | None:
    base, base_se = found["curve"]["reward"][0], found["curve"]["reward_se"][0]
    if reward.before is None:
        return None
    error = math.hypot(base_se, reward.before_se or 0.0)
    if abs(reward.before - base) <= MOST_ERRORS * error:
        return None
    return (
        f"its baseline has a reward of {with_error(reward.before, reward.before_se)}, the base "
        f"here {with_error(base, base_se)}: another model, other prompts or another reward"
    )


def missed(run: dict[str, Any]) -> str:
    """The regret in words: "0.21 ± 0.05", or its bounds past the curve's end."""
    if not run["is_past_end"]:
        return with_error(run["regret"], run["regret_se"])
    most = with_error(run["at_most"], run["at_most_se"])
    if run["at_least"] <= 0:
        return f"at most {most}"
    return f"{with_error(run['at_least'], run['at_least_se'])} to {most}"


def in_short(run: dict[str, Any]) -> str:
    """The regret for the picture; of two bounds the lower."""
    if not run["is_past_end"] or run["at_least"] <= 0:
        return missed(run)
    return f"at least {with_error(run['at_least'], run['at_least_se'])}"


def end_of(found: dict[str, Any]) -> str:
    """Why the curve ends where it ends."""
    end = found["end"]
    at = f"{number(end['kl'])} nats"
    if end["is_saturated"]:
        return f"at {at}, 99% of the KL of always having the highest reward"
    return f"at {at}: beyond, fewer than 10 answers a prompt would carry all the weight"


def picture(found: dict[str, Any]) -> Plot:
    """The figure, and its files frontier.svg and frontier.png."""
    words = (
        "<b>Frontier.</b> No policy has a higher mean reward at this KL. Band: 95%, over prompts "
        f"and answers. It ends {safe(end_of(found))}. Dots: runs with 95% intervals. Circles: "
        "best-of-n by the same reward, no training."
    )
    return plot_with_files("frontier", words, lambda: _draw(found))


def _draw(found: dict[str, Any]) -> Figure:
    figure, (axis,) = grid(WIDE, 5.2, 1, 1)
    curve, best = found["curve"], found["best_of_n"]
    kl, reward = np.array(curve["kl"]), np.array(curve["reward"])
    low, high = np.array(curve["low"]), np.array(curve["high"])
    axis.fill_between(kl, low, high, color=BLUE, alpha=0.16, lw=0)
    axis.plot(kl, reward, color=BLUE, lw=2)
    axis.plot(kl[-1], reward[-1], "|", color=BLUE, ms=13, mew=1.6)
    at = np.array(best.get("kl_estimate") or best["kl_bound"])
    axis.plot(at, best["reward"], "o-", color=GREEN, lw=0.9, ms=4.5, mfc="white", mew=1.2)
    runs = [run for run in found["runs"] if "note" not in run]
    for run in runs:
        x_bar, y_bar = (Z95 * (run[f"{key}_se"] or 0.0) for key in ("kl", "reward"))
        axis.errorbar(run["kl"], run["reward"], xerr=x_bar, yerr=y_bar, fmt="o", color=RED, ms=6)
        if not run["is_past_end"]:
            top = run["frontier_reward"]
            axis.plot([run["kl"]] * 2, [run["reward"], top], ":", color=RED, lw=1)
    axis.plot(0, reward[0], "o", color=INK, ms=6)
    axis.set_xlabel("KL to the base, nats / response")
    axis.set_ylabel(f"{_reward_name(found)}, mean over {found['prompts']:,} prompts")
    axis.margins(x=0.06, y=0.10)
    figure.draw_without_rendering()  # labels need the axis in its place
    axis.autoscale(False)
    labels = [Label(0, reward[0], "base", INK)]
    # Of many runs the names alone have room.
    regrets = [f"\nmisses {in_short(run)}" if len(runs) <= 3 else "" for run in runs]
    labels += [
        Label(run["kl"], run["reward"], as_text(run["name"]) + words, RED)
        for run, words in zip(runs, regrets, strict=True)
    ]
    shown = [i for i in range(len(at)) if at[i] > 0]
    labels += [Label(at[i], best["reward"][i], f"{best['n'][i]}", GREEN, False) for i in shown]
    labels.append(Label(at[-1], best["reward"][-1], "best of n", GREEN))
    middle = int(np.searchsorted(kl, 0.45 * kl[-1]))
    labels.insert(1, Label(kl[middle], reward[middle], "frontier, with its 95% band", BLUE))
    ends = "the samples end here"
    if found["end"]["is_saturated"]:
        ends = "nearly always the highest reward"
    labels.append(Label(kl[-1], reward[-1], ends, BLUE, False))
    between = np.linspace(at[0], at[-1], 200)
    green = zip(between, np.interp(between, at, best["reward"]), strict=True)
    taken = [*zip(kl.tolist(), reward.tolist(), strict=True), *green]
    for run in runs:
        half, tall = (Z95 * (run[f"{key}_se"] or 0.0) for key in ("kl", "reward"))
        top = run["reward"] + tall if run["is_past_end"] else run["frontier_reward"]
        taken += [(run["kl"] + part * half, run["reward"]) for part in (-1.0, 0.0, 1.0)]
        taken += [(run["kl"], y) for y in np.linspace(run["reward"] - tall, top, 12).tolist()]
    write(axis, labels, taken)
    return figure


def _reward_name(found: dict[str, Any]) -> str:
    return {"gold": "gold reward", "reward": "reward"}.get(found["reward"], found["reward"])


def section(found: dict[str, Any], road: Road) -> tuple[str, list[Plot]]:
    """The section of the page: runs and budgets as tables, and the figure."""
    own = road.policy
    if own is not None and own.evaluation is not None:
        name = names_of(own.evaluation)[1] or own.name
        others = [run for run in found["runs"] if run["name"] != name]
        found = {**found, "runs": [placed(found, name, own.evaluation), *others]}
    html = f"<p>{safe(sentence(found))}</p>"
    html += _table(RUNS, [cells(run) for run in found["runs"] if "note" not in run])
    for run in found["runs"]:
        if "note" in run:
            html += f'<p class="missing">Not placed: {safe(run["name"])}: {safe(run["note"])}.</p>'
    if found["budgets"]:
        html += "<h3>Before training: what goes with a KL budget</h3>"
        html += _table(BUDGETS, [budget_cells(one) for one in found["budgets"]])
    return html, [picture(found)]


def sentence(found: dict[str, Any]) -> str:
    """What was computed from what."""
    return (
        f"{found['samples']:,} answers of the base to each of {found['prompts']:,} prompts, each "
        "prompt's answers reweighted by themselves, with one alpha for all prompts. The frontier "
        f"ends {end_of(found)}."
    )


def cells(run: dict[str, Any]) -> tuple[str, ...]:
    """A placed run as a row: name, KL, reward, the frontier there, what it misses."""
    there = "past end" if run["is_past_end"] else number(run["frontier_reward"])
    return (
        str(run["name"]),
        with_error(run["kl"], run["kl_se"]),
        with_error(run["reward"], run["reward_se"]),
        there,
        missed(run),
    )


def budget_cells(one: dict[str, Any]) -> tuple[str, ...]:
    """A budget as a row: KL, beta, alpha, reward, n, reward of best-of-n."""
    return (
        number(one["kl"]),
        number(one["beta"]),
        number(one["alpha"]),
        with_error(one["reward"], one["reward_se"]),
        str(one["n"]),
        number(one["best_of_n_reward"], one["reward_se"]),
    )


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    first, *others = heads
    head = f"<th>{first}</th>" + "".join(f'<th class="n">{title}</th>' for title in others)
    body = "".join(
        f"<tr><td>{safe(row[0])}</td>"
        + "".join(f'<td class="n">{safe(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
