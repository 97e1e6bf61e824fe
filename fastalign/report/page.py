"""The page: its top, and its sections in the order in which a reader asks.

The file loads nothing: style and SVG are inside, there is no script, and its content security
policy forbids both.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from fastalign.report import preference
from fastalign.report.accounting import accounting_section
from fastalign.report.beside import Section
from fastalign.report.compare import comparison_rows, number, reference_of, sentences
from fastalign.report.markup import duration, last_step, method_of, missing, safe
from fastalign.report.read import Road, Run, seeds
from fastalign.report.sections import (
    before_after,
    policy_sections,
    reward_section,
    samples_section,
    sft_section,
)
from fastalign.report.style import STYLE

_NOTHING_LOADS = "default-src 'none'; style-src 'unsafe-inline'"


def render(road: Road, shown: Sequence[Section] = ()) -> str:
    """The whole HTML document.

    Args:
        shown: what other commands wrote of this run or its base; it follows the result.
    """
    policy, reward, sft = road.policy, road.reward, road.sft
    parts: list[tuple[str, str, str]] = []
    from_pairs = policy is not None and preference.learned_from_pairs(policy)
    if policy is not None and from_pairs:
        parts += [] if policy.evaluation is None else [before_after(policy)]
        parts += preference.sections(policy)
    elif policy is not None:
        parts += policy_sections(policy)
    elif road.is_road:
        parts.append(("policy", "Policy", missing("No policy run yet: no apa/metrics.jsonl.")))
    parts[1:1] = [(one.id, one.title, one.html) for one in shown]
    if reward is not None or road.is_road:
        words = missing("No reward model run: no reward/metrics.jsonl.")
        html = words if reward is None else reward_section(reward)
        parts.append(("reward-model", "Reward model", html))
    if sft is not None or road.is_road:
        words = missing("No SFT run: no sft/metrics.jsonl.")
        html = words if sft is None else sft_section(sft)
        parts.append(("sft", "Supervised fine-tuning", html))
    if costs := accounting_section(road):
        parts.append(("accounting", "What it cost", costs))
    if policy is not None and (policy.samples or not from_pairs):
        parts.append(("samples", "Samples", samples_section(policy)))
    parts.append(("configuration", "Configuration", _configuration(road)))
    parts.append(("repeat", "Machine and how to repeat", _repeat(road)))
    links = "".join(f'<a href="#{id}">{title}</a>' for id, title, _ in parts)
    body = "".join(
        f'<section id="{id}"><h2>{title}</h2>{html}</section>' for id, title, html in parts
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_LOADS}">'
        f"<title>{safe(road.name)} · fastalign report</title><style>{STYLE}</style></head>\n"
        f"<body><main>{_top(road)}<nav>{links}</nav>{body}"
        "<footer>Written by fastalign. This page loads nothing and runs no script.</footer>"
        "</main></body></html>\n"
    )


def _top(road: Road) -> str:
    policy, lead = road.policy, road.runs[0]
    times = lead.finite("time")[1]
    day = ""
    if times.size:
        day = f"{datetime.fromtimestamp(times[-1], timezone.utc):%d %B %Y, %H:%M} UTC"
    method = lead.accounting.method if lead.accounting else None
    what = method_of(lead) if lead is policy else "reward model"
    if lead is not policy and lead.kind == "sft":
        what = str(method or "sft").upper()
    html = f'<div class="kicker"><span><b>{safe(road.name)}</b> · {safe(what)}</span>'
    html += f"<span>{day}</span></div>"
    unfinished = policy is not None and policy.evaluation is None
    if policy is not None and unfinished and not preference.learned_from_pairs(policy):
        html += (
            '<p class="banner"><b>This run is not finished:</b> evaluation.json is missing. What'
            f" follows comes from the training log up to step {last_step(policy)}.</p>"
        )
    first, *others = _opening(road)
    html += f"<h1>{safe(first)}</h1>"
    html += "".join(f'<p class="second">{safe(sentence)}</p>' for sentence in others)
    html += _cards(lead)
    notes = [*road.notes, *(f"{run.name}: {note}" for run in road.runs for note in run.notes)]
    items = "".join(f"<li>{safe(note)}</li>" for note in notes)
    return html + (f'<ul class="notes">{items}</ul>' if items else "")


def _opening(road: Road) -> list[str]:
    """The headline, then what else has to be said at once."""
    if road.policy is not None:
        if road.policy.evaluation is not None:
            return sentences(road.policy.evaluation)
        if preference.learned_from_pairs(road.policy):
            return [preference.opening(road.policy)]
        return [_so_far(road.policy)]
    if road.reward is not None:
        steps, accuracy = road.reward.finite("accuracy", "eval")
        if not steps.size:
            return ["The reward model has not been evaluated on held-out pairs yet."]
        half = road.reward.lines["eval"][int(steps[-1])].get("accuracy/ci95")
        margin = "" if half is None else f" ± {number(100 * half, 100 * half)}"
        share = number(100 * accuracy[-1], 1.0)
        return [f"The reward model ranks {share}{margin}% of held-out pairs correctly."]
    assert road.sft is not None
    steps, values = road.sft.finite("loss", "eval")
    if not steps.size:
        return ["The model has not been evaluated on held-out text yet."]
    change = f"went from {number(values[0], 0.01)} to" if steps.size > 1 else "is"
    perplexity = number(float(np.exp(min(values[-1], 700.0))), 0.1)
    return [
        f"Held-out loss {change} {number(values[-1], 0.01)} nats per token"
        f" (perplexity {perplexity})."
    ]


def _so_far(run: Run) -> str:
    for key, name in (("reward/gold", "gold"), ("reward/proxy", "proxy")):
        steps, values = run.finite(key)
        if steps.size == 1:
            return f"So far, one step: the {name} reward of its samples is {number(values[0])}."
        if steps.size:
            kl = run.finite("kl/k1")[1]
            at = f", at {number(kl[-1])} nats per response of KL" if kl.size else ""
            return (
                f"So far, the {name} reward of the training samples went from {number(values[0])}"
                f" at step {steps[0]:,} to {number(values[-1])} at step {steps[-1]:,}{at}."
            )
    return "No reward has been logged yet."


def _cards(run: Run) -> str:
    """The handful of numbers that everybody asks for first."""
    rows = {row.key: row for row in comparison_rows(run.evaluation)} if run.evaluation else {}
    cards: list[tuple[str, str, str]] = []
    for key, name in (
        ("reward/gold", "Gold reward"),
        ("reward/held_out", "Held-out reward"),
        ("reward/proxy", "Proxy reward"),
    ):
        row = rows.get(key)
        if row is not None and row.change is not None:
            effect = "" if row.effect is None else f"{number(row.effect, 0.1, sign=True)} SD"
            small = ", ".join(part for part in (effect, row.verdict) if part)
            cards.append((name, f"{number(row.before, 0.1)} → {number(row.after, 0.1)}", small))
    kl = rows.get("kl/k1")
    if kl is not None and kl.after is not None:
        cards.append(
            (f"KL to {reference_of(run.evaluation)}", number(kl.after, 0.1), "nats / response")
        )
    cards.append(("Last step", last_step(run), ""))
    speed, memory = run.finite("tokens_per_s")[1], run.finite("memory_gib")[1]
    if speed.size:
        cards.append(("Throughput", f"{np.median(speed):,.0f}", "tokens / s, each once; median"))
    if memory.size:
        cards.append(("Peak memory", f"{number(float(memory.max()), 0.1)} GiB", ""))
    total = _seconds(run).get("total")
    if total is not None:
        cards.append(("Time", duration(total), "from start to end"))
    inner = ""
    for name, value, small in cards:
        rest = f"<small>{safe(small)}</small>" if small else ""
        inner += f"<div><dt>{safe(name)}</dt><dd>{safe(value)}{rest}</dd></div>"
    return f'<dl class="figures">{inner}</dl>'


def _configuration(road: Road) -> str:
    html = ""
    opened = " open" if len(road.runs) == 1 else ""
    for run in road.runs:
        name = f"{safe(run.name)}/config.yaml"
        if run.config is None:
            html += missing(f"{run.name}: no config.yaml.")
        else:
            text = f"<pre>{safe(run.config)}</pre>"
            html += f"<details{opened}><summary>{name}</summary>{text}</details>"
    return html


def _repeat(road: Road) -> str:
    """Command, machine, versions, times, seeds: what it takes to do it again."""
    facts: list[tuple[str, str]] = []
    command = None
    for run in road.runs:
        recorded = run.evaluation or (run.accounting.repeat if run.accounting else {})
        command = command or recorded.get("command")
        for title in ("machine", "versions"):
            facts += [(name, str(value)) for name, value in _table_of(recorded, title).items()]
        facts += [(f"time, {name}", duration(value)) for name, value in _seconds(run).items()]
    for run in road.runs:
        facts += [(f"{run.name}, {name}", value) for name, value in seeds(run.config)]
    html = missing("The command was not recorded.")
    if command:
        html = f"<pre>{safe(str(command))}</pre>"
    if command is None and all(run.evaluation is None for run in road.runs):
        html += missing("Machine and versions were not recorded.")
    rows = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in facts)
    return html + (f'<dl class="facts">{rows}</dl>' if rows else "")


def _seconds(run: Run) -> dict[str, float]:
    recorded = _table_of(run.evaluation or {}, "seconds")
    return {
        name: float(value)
        for name, value in recorded.items()
        if isinstance(value, int | float) and np.isfinite(value)
    }


def _table_of(evaluation: dict[str, Any], title: str) -> dict[str, Any]:
    content = evaluation.get(title)
    return (
        {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}
    )
