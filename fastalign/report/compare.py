"""Before against after: the sentence, the table and the checks, computed once for both outputs.

A change d = after - before has the standard error of the differences prompt by prompt, recorded as
``change_stderr``: both sides answer the same prompts. Where it was not recorded it is
sqrt(se_before^2 + se_after^2), as if they were different ones, which errs on the careful side. A
change counts as real when 0 lies outside its 95 % interval (Student's t for the number of prompts:
1.98 standard errors of 128, 2.26 of 10). The effect size is d over the standard deviation of the
SFT model's rewards, which does not depend on the reward's unit. Where ``names`` were recorded,
{"before": .., "after": ..}, the models go by these and not by SFT and the method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastalign.theory.interval import student_t

if TYPE_CHECKING:
    from rich.table import Table

Z95 = 1.959963984540054  # two-sided 95% point of the normal distribution

# The order in which a reward is trusted: the true one, one never trained on, the one trained on.
REWARDS = (
    ("reward/gold", "Gold reward"),
    ("reward/held_out", "Held-out reward"),
    ("reward/proxy", "Proxy reward"),
)


@dataclass(frozen=True)
class Row:
    """One measure before and after; what was not recorded is None."""

    key: str
    name: str
    unit: str
    meaning: str
    before: float | None
    after: float | None
    before_se: float | None
    after_se: float | None
    before_std: float | None
    paired_se: float | None
    """Of the change, from the differences prompt by prompt."""
    reach: float
    """Standard errors to either end of a 95 % interval: Student's t for the number of prompts."""

    @property
    def change(self) -> float | None:
        if self.before is None or self.after is None:
            return None
        return self.after - self.before

    @property
    def change_se(self) -> float | None:
        if self.paired_se is not None:
            return self.paired_se
        if self.before_se is None or self.after_se is None:
            return None
        return math.hypot(self.before_se, self.after_se)

    @property
    def effect(self) -> float | None:
        """The change in standard deviations of the SFT model's rewards."""
        if self.change is None or not self.before_std or not self.key.startswith("reward/"):
            return None
        return self.change / self.before_std

    @property
    def verdict(self) -> str:
        """ "rose", "fell", "within noise", or "" where that cannot be said."""
        if self.change is None or self.change_se is None:
            return ""
        if abs(self.change) <= self.reach * self.change_se:
            return "within noise"
        return "rose" if self.change > 0 else "fell"


def number(value: float | None, error: float | None = None, sign: bool = False) -> str:
    """A number for people: two digits of its error, or three of its own, and a true minus sign."""
    if value is None or math.isnan(value):
        return "—"
    if value == 0 and not error:
        return "0"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    scale = error if error is not None and 0 < error < math.inf else value / 10
    decimals = 2 if scale == 0 else min(max(1 - math.floor(math.log10(abs(scale))), 0), 4)
    text = f"{value:+,.{decimals}f}" if sign else f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def with_error(value: float | None, error: float | None, sign: bool = False) -> str:
    """``number`` with its standard error: "1.873 ± 0.042"."""
    text = number(value, error, sign)
    return text if not error or text == "—" else f"{text} ± {number(error, error)}"


def names_of(evaluation: dict[str, Any] | None) -> tuple[str, str | None]:
    """Of the models before and after, as recorded; else SFT, and nothing."""
    recorded = (evaluation or {}).get("names")
    if not isinstance(recorded, dict) or not {"before", "after"} <= recorded.keys():
        return "SFT", None
    return str(recorded["before"]), str(recorded["after"])


def reference_of(evaluation: dict[str, Any] | None) -> str:
    """What KL is measured to, in a word that fits a table: SFT, or baseline for one with a name."""
    return "SFT" if names_of(evaluation)[1] is None else "baseline"


def is_comparison(evaluation: dict[str, Any]) -> bool:
    """Whether two models were compared without training: nobody said what they were trained on."""
    return evaluation.get("method") == "policy"


def comparison_rows(evaluation: dict[str, Any]) -> list[Row]:
    """The rows of the before/after table, for what was recorded on either side."""
    statistic = str(evaluation.get("proxy", "ensemble"))
    base = reference_of(evaluation)
    wanted = (
        ("reward/gold", "Gold reward", "reward", "the true reward, never seen in training"),
        ("reward/held_out", "Held-out reward model", "reward", "a reward model not trained on"),
        (
            "reward/proxy",
            f"Proxy reward ({statistic})",
            "reward",
            "the reward that was asked for"
            if is_comparison(evaluation)
            else "the ensemble statistic that was maximised",
        ),
        ("kl/k1", f"KL to {base}, k1", "nats / response", f"mean of log π/π_{base}; unbiased"),
        (
            "kl/k3",
            f"KL to {base}, k3",
            "nats / response",
            f"mean of r − 1 − log r, r = π_{base}/π; never negative",
        ),
        (
            "kl/exact",
            f"KL to {base}, exact per token",
            "nats / response",
            "summed over the vocabulary at every state visited; least variance",
        ),
        ("entropy", "Entropy", "nats / token", "of the next-token distribution"),
        ("length", "Response length", "tokens", ""),
        ("finished", "Finished", "fraction", "responses that end with the end token"),
        ("distinct/1", "Distinct tokens", "fraction", "different tokens over all tokens"),
        ("distinct/2", "Distinct pairs", "fraction", "different pairs of tokens over all pairs"),
        ("distinct/answers", "Distinct answers", "fraction", "different answers to a prompt"),
        (
            "reward/disagreement",
            "Head disagreement",
            "reward",
            "standard deviation over the reward heads",
        ),
    )
    prompts = _number(evaluation.get("n_prompts"))
    reach = Z95 if prompts is None or prompts < 2 else student_t(int(prompts) - 1)
    rows = []
    for key, name, unit, meaning in wanted:
        before, after = _value(evaluation, "before", key), _value(evaluation, "after", key)
        if before is None and after is None:
            continue
        rows.append(
            Row(
                key=key,
                name=name,
                unit=unit,
                meaning=meaning,
                before=before,
                after=after,
                before_se=_stderr(evaluation, "before", key),
                after_se=_stderr(evaluation, "after", key),
                before_std=_value(evaluation, "before", f"{key}_std"),
                paired_se=_paired(evaluation, key),
                reach=reach,
            )
        )
    return rows


def headline(evaluation: dict[str, Any]) -> str:
    """The result in words, from ``evaluation.json``: how the most trusted reward moved, at what KL.

    The gold reward speaks when it was measured, else the held-out reward model, else the proxy. A
    fall and a change within noise are said as plainly as a rise, and so is a proxy that rose alone.
    """
    return " ".join(sentences(evaluation))


def sentences(evaluation: dict[str, Any]) -> list[str]:
    """The sentences of ``headline``: the result, and what has to be said with it at once."""
    rows = {row.key: row for row in comparison_rows(evaluation)}
    measured = [key for key, _ in REWARDS if key in rows and rows[key].change is not None]
    if not measured:
        return ["No reward was measured before and after training."]
    row, name = rows[measured[0]], dict(REWARDS)[measured[0]]
    base, named = names_of(evaluation)
    if named is None:
        base = "the SFT model"
    else:
        name = f"{named} against {base}: {name.lower()}"
    kl = rows.get("kl/k1")
    at = ""
    if kl is not None and kl.after is not None:
        at = f" at {number(kl.after, kl.after_se)} nats per response of KL from {base}"
    said = [f"{name} {_moved(row, base)}{at}."]
    won = (evaluation.get("win_rate") or {}).get(row.key)
    if won is not None:
        margin = ""
        if won.get("low") is not None:
            margin = f" ({100 * won['low']:.0f} to {100 * won['high']:.0f}% at 95%)"
        said.append(f"By that reward it wins {100 * won['rate']:.0f}% of the pairs{margin}.")
    proxy = rows.get("reward/proxy")
    if row.key == "reward/proxy":
        known = "may be" if is_comparison(evaluation) else "is"
        said.append(
            f"No gold or held-out reward was measured: this {known} the reward the policy was "
            "trained on."
        )
    elif proxy is not None and proxy.verdict == "rose" and row.verdict in ("fell", "within noise"):
        price = "at the expense of the goal" if row.verdict == "fell" else "only"
        said.append(
            f"The proxy reward {_moved(proxy, base)}: the policy pleased the reward model {price}."
        )
    return said


def before_after_table(evaluation: dict[str, Any]) -> Table:
    """The before/after table for the terminal (rich), with standard errors."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # Narrow enough for 80 columns: the change itself is in the page and in the headline.
    table = Table(
        title=Text(caption(evaluation)),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("Measure", no_wrap=True)
    table.add_column("Unit", style="dim", no_wrap=True)
    base, named = names_of(evaluation)
    after = named or str(evaluation.get("method", "after")).upper()
    for column in (Text(base), Text(after), "Change"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in comparison_rows(evaluation):
        before, became, _, effect, _ = cells_of(row)
        cells = (row.name, row.unit.replace(" / ", "/"), before, became, effect)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def cells_of(row: Row) -> tuple[str, str, str, str, str]:
    """Before, after, change, effect and verdict of one row, as text."""
    return (
        with_error(row.before, row.before_se),
        with_error(row.after, row.after_se),
        change_of(row),
        "" if row.effect is None else f"{number(row.effect, 0.1, sign=True)} SD",
        row.verdict,
    )


def change_of(row: Row) -> str:
    """The change with its standard error; without one it has the decimals of what it came from."""
    if row.change is None or row.change_se is not None:
        return with_error(row.change, row.change_se, sign=True)
    return number(row.change, max(abs(row.before or 0), abs(row.after or 0)) / 10, sign=True)


def caption(evaluation: dict[str, Any]) -> str:
    """What the numbers were measured on: "256 prompts, 1,024 responses of each model"."""
    prompts = _number(evaluation.get("n_prompts"))
    counts = [_value(evaluation, side, "n") for side in ("before", "after")]
    parts = [] if prompts is None else [f"{prompts:,.0f} prompts"]
    if counts[0] is not None and counts[0] == counts[1]:
        parts.append(f"{counts[0]:,.0f} responses of each model")
    elif counts[0] is not None and counts[1] is not None:
        parts.append(f"{counts[0]:,.0f} responses before, {counts[1]:,.0f} after")
    return ", ".join(parts) or "Before and after"


@dataclass(frozen=True)
class Check:
    """One sign of a policy gone wrong: what was found, and whether it deserves a look."""

    name: str
    found: str
    suspicious: bool


def checks(evaluation: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[Check]:
    """The usual ways in which alignment goes wrong, each with the number that shows it.

    Thresholds: proxy up while the trusted reward is not; k1 below zero by its 95 % interval
    (sampler and scorer disagree); length changed by more than a third; finished down by more
    than 0.1; entropy below half; disagreement up by more than a half; fewer than half of the
    responses distinct.
    """
    rows = {row.key: row for row in comparison_rows(evaluation)}
    found = []
    trusted = rows.get("reward/gold") or rows.get("reward/held_out")
    proxy = rows.get("reward/proxy")
    if trusted is not None and proxy is not None and trusted.verdict and proxy.verdict:
        over = proxy.verdict == "rose" and trusted.verdict != "rose"
        words = f"proxy {proxy.verdict}, {trusted.name.lower()} {trusted.verdict}"
        found.append(Check("Overoptimisation", words, over))
    kl = rows.get("kl/k1")
    if kl is not None and kl.after is not None:
        negative = kl.after < -kl.reach * (kl.after_se or 0.0)
        found.append(
            Check("Negative KL", f"k1 = {with_error(kl.after, kl.after_se)} nats", negative)
        )
    for key, name, low, high in (
        ("length", "Length drift", 2 / 3, 4 / 3),
        ("entropy", "Entropy collapse", 1 / 2, math.inf),
        ("reward/disagreement", "Heads disagree", 0.0, 3 / 2),
    ):
        row = rows.get(key)
        if row is not None and row.before and row.after is not None:
            ratio = row.after / row.before
            words = f"{number(row.before)} → {number(row.after)} {row.unit} (×{ratio:.2f})"
            found.append(Check(name, words, not low <= ratio <= high))
    row = rows.get("finished")
    if row is not None and row.change is not None:
        words = f"{number(row.before, 0.01)} → {number(row.after, 0.01)}"
        found.append(Check("Unfinished responses", words, row.change < -0.1))
    answers = [str(sample.get("after", "")) for sample in samples]
    if len(answers) > 1:
        distinct = len(set(answers))
        words = f"{distinct} of {len(answers)} stored responses are distinct"
        found.append(Check("Same answer to everything", words, distinct < len(answers) / 2))
    return found


def _moved(row: Row, base: str) -> str:
    effect = (
        "" if row.effect is None else f"{number(row.effect, 0.1, sign=True)} SD of {base}'s rewards"
    )
    error = row.change_se
    before, after = number(row.before, row.before_se), number(row.after, row.after_se)
    if error is None:
        verb = "went"
        inside = [effect, "no standard errors recorded, so noise cannot be judged"]
    else:
        verb = (
            row.verdict if row.verdict != "within noise" else "did not change beyond noise: it went"
        )
        width = number(row.reach * error, error)
        margin = f"{number(row.change, error, sign=True)} ± {width} at 95%"
        inside = [margin, effect]
    return f"{verb} from {before} to {after} ({', '.join(part for part in inside if part)})"


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _value(evaluation: dict[str, Any], side: str, key: str) -> float | None:
    return _number(evaluation[side].get(key))


def _paired(evaluation: dict[str, Any], key: str) -> float | None:
    recorded = evaluation.get("change_stderr")
    return _number(recorded.get(key)) if isinstance(recorded, dict) else None


def _stderr(evaluation: dict[str, Any], side: str, key: str) -> float | None:
    """The recorded standard error, else std / sqrt(n), else for a fraction sqrt(p (1 - p) / n).

    None for a single prompt: its responses say nothing of other prompts.
    """
    recorded = _value(evaluation, side, f"{key}_stderr")
    if recorded is not None:
        return recorded
    if _number(evaluation.get("n_prompts")) == 1:
        return None
    n, std = _value(evaluation, side, "n"), _value(evaluation, side, f"{key}_std")
    if not n:
        return None
    if std is not None:
        return std / math.sqrt(n)
    fraction = _value(evaluation, side, key)
    if key == "finished" and fraction is not None and 0 <= fraction <= 1:
        return math.sqrt(fraction * (1 - fraction) / n)
    return None
