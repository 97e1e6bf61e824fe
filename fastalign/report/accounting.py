"""What a run cost, by phase, and what several runs cost beside each other.

A run's cost is that of its training: evaluations, checkpoints and a gold reward have lines of their
own in the table of phases and are no part of a comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastalign.report.compare import number
from fastalign.report.markup import duration, safe
from fastalign.report.read import Accounting, Road

OUTSIDE = ("evaluate", "checkpoint", "gold")
ORDER = ("generate", "score", "reference", "value", "update", "other", *OUTSIDE)
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Cost:
    """Of a training; NaN is what was not measured."""

    name: str
    seconds: float
    joules: float
    flops: float
    tokens: float
    trained: float

    @classmethod
    def of(cls, name: str, accounting: Accounting) -> Cost:
        spent = [c for phase, c in accounting.phases.items() if phase not in OUTSIDE]
        keys = ("seconds", "joules", "flops", "tokens", "trained")
        return cls(name, *(math.fsum(cost.get(key, math.nan) for cost in spent) for key in keys))


def costs_of(road: Road) -> list[Cost]:
    """Of every run that has an account, the dearest first."""
    found = [Cost.of(name, accounting) for name, accounting in road.accounts.items()]
    return sorted(found, key=lambda cost: (-_size(cost), cost.name))


def _size(cost: Cost) -> float:
    """FLOPs say how big a training is; where some are not known, that is not."""
    return cost.flops if math.isfinite(cost.flops) else 0.0


def comparison(costs: list[Cost]) -> list[str]:
    """ "rwr needs 12.3% of ppo's compute (10.1% of its seconds, 9.8% of its joules)." for every run
    but the dearest."""
    if not costs or not _size(costs[0]):
        return []
    dearest, *others = costs
    said = []
    for cost in others:
        if not _size(cost):
            said.append(f"The FLOPs of {cost.name} are not known.")
            continue
        rest = [
            f"{share(getattr(cost, key) / whole)} of its {key}"
            for key in ("seconds", "joules")
            if math.isfinite(whole := getattr(dearest, key)) and whole > 0
            if math.isfinite(getattr(cost, key))
        ]
        beside = f" ({', '.join(rest)})" if rest else ""
        needs = share(cost.flops / dearest.flops)
        said.append(f"{cost.name} needs {needs} of {dearest.name}'s compute{beside}.")
    return said


def accounting_section(road: Road) -> str:
    """HTML: the phases of the run the page is about, then all runs beside each other."""
    html = ""
    lead = next((run.accounting for run in road.runs if run.accounting is not None), None)
    if lead is not None:
        html += _phases(lead)
    costs = costs_of(road)
    if len(costs) > 1:
        html += "".join(f"<p>{safe(sentence)}</p>" for sentence in comparison(costs))
        html += _runs(costs)
    return html


def _phases(account: Accounting) -> str:
    known = [name for name in ORDER if name in account.phases]
    known += [name for name in account.phases if name not in ORDER]
    whole = sum(cost.get("seconds", 0.0) for cost in account.phases.values())
    rows = []
    for name in known:
        cost = account.phases[name]
        seconds = cost.get("seconds", math.nan)
        rows.append(
            [
                safe(name),
                duration(seconds),
                share(seconds / whole) if whole else "—",
                *(_quantity(cost, "joules", "J"), _quantity(cost, "flops", "FLOP")),
                *(_count(cost, "tokens"), _count(cost, "trained"), _memory(cost)),
            ]
        )
    total = account.total
    rows.append(
        [
            "all",
            duration(total.get("seconds", math.nan)),
            "",
            *(_quantity(total, "joules", "J"), _quantity(total, "flops", "FLOP")),
            *(_count(total, "tokens"), _count(total, "trained"), _memory(total)),
        ]
    )
    heads = ["Phase", "Time", "", "Energy", "Model FLOPs", "Tokens", "Trained", "Peak memory"]
    return f'<p class="lede">{safe(_caption(account))}</p>{_table(heads, rows)}'


def _caption(account: Accounting) -> str:
    said = [f"Energy: {account.energy}." if account.energy else "Nothing measured energy."]
    spent, peak = Cost.of("", account), account.peak_flops
    if peak and spent.seconds and math.isfinite(spent.flops):
        rate = spent.flops / spent.seconds
        said.append(
            f"{scaled(rate, 'FLOP/s')} while training, {share(rate / peak)} of "
            f"{scaled(peak, 'FLOP/s')} ({account.peak_source})."
        )
    if account.resumes:
        said.append(f"Resumed {account.resumes}×; steps done twice count once.")
    return " ".join(said)


def _runs(costs: list[Cost]) -> str:
    heads = ["Run", "Model FLOPs", "", "Time", "Energy", "Tokens", "Trained"]
    rows = [
        [
            safe(cost.name),
            scaled(cost.flops, "FLOP"),
            share(cost.flops / costs[0].flops) if _size(cost) else "—",
            duration(cost.seconds),
            scaled(cost.joules, "J"),
            f"{cost.tokens:,.0f}",
            f"{cost.trained:,.0f}",
        ]
        for cost in costs
    ]
    words = "Training alone: without evaluations, checkpoints and a gold reward."
    return f'<p class="lede">{words}</p>{_table(heads, rows)}'


def _table(heads: list[str], rows: list[list[str]]) -> str:
    first, *others = heads
    head = f"<th>{first}</th>" + "".join(f'<th class="n">{title}</th>' for title in others)
    body = ""
    for name, *cells in rows:
        body += f"<tr><td>{name}</td>" + "".join(f'<td class="n">{c}</td>' for c in cells) + "</tr>"
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def scaled(value: float, unit: str) -> str:
    """Three digits and a prefix: "1.23 PFLOP"."""
    if not math.isfinite(value):
        return "—"
    for size, prefix in PREFIXES:
        if value >= size:
            return f"{number(value / size)} {prefix}{unit}"
    return f"{number(value)} {unit}"


def share(part: float) -> str:
    """A percentage with three digits: "12.3%"."""
    return f"{number(100 * part)}%"


def _quantity(cost: dict[str, float], key: str, unit: str) -> str:
    value = cost.get(key, math.nan)
    return "—" if value == 0 and key == "flops" else scaled(value, unit)


def _count(cost: dict[str, float], key: str) -> str:
    value = cost.get(key, 0.0)
    return f"{value:,.0f}" if value else "—"


def _memory(cost: dict[str, float]) -> str:
    value = cost.get("memory_gib", 0.0)
    return f"{number(value)} GiB" if value else "—"
