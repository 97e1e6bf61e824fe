"""The sections of the page: the policy's result, its training, the stages before it, samples."""

from __future__ import annotations

from typing import Any

from fastalign.report import plots
from fastalign.report.compare import (
    Check,
    Row,
    caption,
    cells_of,
    checks,
    comparison_rows,
    names_of,
    number,
    with_error,
)
from fastalign.report.markup import figure, last_step, method_of, missing, safe, words_of
from fastalign.report.read import Run

MOST_SAMPLES = 8


def policy_sections(run: Run) -> list[tuple[str, str, str]]:
    """(id, title, HTML) of the result, the training curves, and health and speed; of two models
    that were compared without training, of the result and where both stand."""
    evaluation = run.evaluation
    method = method_of(run)
    if learned_from_given(run):
        curves = (plots.given_curves(run), plots.losses(run, method.lower()))
        return [
            before_after(run),
            ("training", safe(f"Training with {method}"), "".join(map(figure, curves))),
            ("health", "Health and speed", figure(plots.time_per_phase(run))),
        ]
    base, named = names_of(evaluation)
    training = f"{base} and {named}" if named else f"Training with {method}"
    if evaluation is not None and not run.lines.get("train"):
        standing = figure(plots.reward_against_kl(run, evaluation))
        return [before_after(run), ("standing", "Where both stand", standing)]
    learning = (
        plots.reward_and_kl(run),
        plots.reward_against_kl(run, evaluation),
        plots.disagreement(run),
    )
    health = (
        plots.collapse(run, evaluation),
        plots.losses(run, method.lower()),
        plots.time_per_phase(run),
    )
    return [
        before_after(run),
        ("training", safe(training), "".join(map(figure, learning))),
        ("health", "Health and speed", "".join(map(figure, health))),
    ]


def before_after(run: Run) -> tuple[str, str, str]:
    """(id, title, HTML) of the result."""
    evaluation = run.evaluation
    if evaluation is None:
        table = missing("No before/after table: evaluation.json is written when the run ends.")
    else:
        table = _table(evaluation, method_of(run)) + _checks(checks(evaluation, run.samples))
    return "before-after", "Before and after", table


def learned_from_given(run: Run) -> bool:
    """Whether the policy learned from responses that it did not sample: it was sampled from before
    and after, and in between only has losses."""
    return run.has("perplexity") and not run.has("kl/k1")


def reward_section(run: Run) -> str:
    words = ""
    steps, accuracy = run.finite("accuracy", "eval")
    if steps.size:
        last = run.lines["eval"][int(steps[-1])]
        half, spread = last.get("accuracy/ci95"), last.get("disagreement")
        heads = len(run.head_keys("accuracy/head_", "eval"))
        shown = with_error(100 * accuracy[-1], None if half is None else 100 * half)
        parts = [f"Held-out accuracy {shown}%" + ("" if half is None else " (95% interval)")]
        if heads:
            parts.append(f"{heads} head{'s' if heads > 1 else ''}")
        if spread is not None:
            parts.append(f"disagreement {number(spread)} in units of reward")
        words = f"<p>{', '.join(parts)}, after {last_step(run)} steps.</p>"
    pair = figure(plots.reward_accuracy(run)) + figure(plots.reward_curves(run))
    return f'{words}<div class="pair">{pair}</div>'


def sft_section(run: Run) -> str:
    pair = figure(plots.sft_curves(run)) + figure(plots.speed(run, "sft"))
    return f'<div class="pair">{pair}</div>'


def samples_section(run: Run) -> str:
    """The first prompts of samples.jsonl with both answers side by side: nobody chose them."""
    if not run.samples:
        return missing("No samples.jsonl in this run yet, or it holds no samples.")
    shown = run.samples[:MOST_SAMPLES]
    count = f"The first {len(shown)} of {len(run.samples)} stored prompts, not chosen."
    html = f'<p class="lede">{count}</p>'
    base, _ = names_of(run.evaluation)
    for sample in shown:
        sides = _side(sample, "before", base) + _side(sample, "after", method_of(run))
        html += f'<article class="sample"><div class="prompt">{words_of(sample["prompt"])}</div>'
        html += f'<div class="sides">{sides}</div></article>'
    return html


def _side(sample: dict[str, Any], side: str, name: str) -> str:
    rewards = sample.get(f"{side}_reward")
    scores = " · ".join(
        f"{safe(key)} {number(float(value), 0.1)}"
        for key, value in (rewards if isinstance(rewards, dict) else {}).items()
        if isinstance(value, int | float)
    )
    who = f'<div class="who"><span>{safe(name)}</span><span>{scores}</span></div>'
    return f"<div>{who}{words_of(sample.get(side))}</div>"


def _table(evaluation: dict[str, Any], method: str) -> str:
    rows = comparison_rows(evaluation)
    base = safe(names_of(evaluation)[0])
    lead = next((row.key for row in rows if row.key.startswith("reward/")), "")
    numbers = "".join(
        f'<th class="n main">{title}</th><th></th>' for title in (base, safe(method), "Change")
    )
    opened = {True: '<tr class="lead">', False: "<tr>"}
    body = "".join(f"{opened[row.key == lead]}{_cells(row)}</tr>" for row in rows)
    return (
        f'<p class="lede">{safe(caption(evaluation))}. ± is one standard error; “within noise” says'
        " that 0 is in a change’s 95% interval.</p>"
        '<div class="scroll"><table class="numbers"><thead><tr>'
        f'<th>Measure</th><th>Unit</th>{numbers}<th class="n">In SD of {base}</th><th></th>'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cells(row: Row) -> str:
    meaning = f"<small>{safe(row.meaning)}</small>" if row.meaning else ""
    html = f'<td>{safe(row.name)}{meaning}</td><td class="unit">{safe(row.unit)}</td>'
    for cell in cells_of(row)[:3]:
        value, _, error = cell.partition(" ± ")
        html += f'<td class="n main">{value}</td><td class="se">{error and "± " + error}</td>'
    effect = "" if row.effect is None else number(row.effect, 0.1, sign=True)
    return html + f'<td class="n">{effect}</td><td class="quiet">{row.verdict}</td>'


def _checks(found: list[Check]) -> str:
    rows = ""
    for check in found:
        look, words = ("look", "look here") if check.suspicious else ("quiet", "nothing unusual")
        rows += f"<tr><td>{safe(check.name)}</td><td>{safe(check.found)}</td>"
        rows += f'<td class="verdict {look}">{words}</td></tr>'
    if not rows:
        return ""
    head = "<thead><tr><th>Sign</th><th>Found</th><th></th></tr></thead>"
    table = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    return f"<h3>Signs of trouble</h3>{table}"
