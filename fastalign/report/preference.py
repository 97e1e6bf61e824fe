"""The part of the page about a run that learned from preferences without sampling: DPO and kin."""

from __future__ import annotations

from fastalign.report import plots
from fastalign.report.compare import number, with_error
from fastalign.report.markup import figure, last_step, safe
from fastalign.report.read import Run, setting

ACCURACY, HALF = "rewards/accuracies", "rewards/accuracies_ci95"


def learned_from_pairs(run: Run) -> bool:
    """Whether this is such a run: it logs the responses' implicit rewards."""
    return any(
        "rewards/chosen" in row or "rewards/rejected" in row
        for rows in run.lines.values()
        for row in rows.values()
    )


def opening(run: Run) -> str:
    """The headline."""
    steps, values = run.finite(ACCURACY, "eval")
    if steps.size:
        half = run.lines["eval"][int(steps[-1])].get(HALF)
        margin = "" if half is None else f" ± {number(100 * half, 100 * half)}"
        share = number(100 * values[-1], 1.0)
        return f"The policy ranks {share}{margin}% of held-out pairs correctly."
    steps, values = run.finite("loss", "eval")
    if not steps.size:
        return "The policy has not been evaluated on held-out data yet."
    return f"Held-out loss {number(values[0], 0.01)} before and {number(values[-1], 0.01)} now."


def sections(run: Run) -> list[tuple[str, str, str]]:
    """(id, title, HTML) of the result, and of health and speed."""
    loss = safe(setting(run.config, "loss") or "unknown")
    words = ""
    steps, accuracy = run.finite(ACCURACY, "eval")
    if steps.size:
        half = run.lines["eval"][int(steps[-1])].get(HALF)
        shown = with_error(100 * accuracy[-1], None if half is None else 100 * half)
        words = (
            f"<p>Held-out accuracy {shown}% (95% interval) after {last_step(run)} steps: the share "
            "of pairs whose chosen response has the larger implicit reward.</p>"
        )
    pair = figure(plots.preference_curves(run)) + figure(plots.implicit_rewards(run))
    health = figure(plots.preference_health(run)) + figure(plots.time_per_phase(run))
    return [
        ("preferences", f"Preferences, loss {loss}", f'{words}<div class="pair">{pair}</div>'),
        ("health", "Health and speed", health),
    ]
