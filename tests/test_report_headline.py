"""What the report says of a run: the headline, its numbers, the checks."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from made_runs import (
    EVALUATION,
    SAMPLES,
    changed,
    without_gold,
)

from fastalign.report import before_after_table, headline
from fastalign.report.compare import checks, number
from fastalign.report.figure import as_text


def test_headline_that_rose() -> None:
    """d = 1.842 - 0.412 = 1.430; se = sqrt(.03^2 + .04^2) = .05, 1.96 se = .098; d / 1.1 = 1.30."""
    assert headline(EVALUATION) == (
        "Gold reward rose from 0.412 to 1.842 (+1.430 ± 0.098 at 95%, +1.30 SD of the SFT model's"
        " rewards) at 8.41 nats per response of KL from the SFT model."
    )


def test_headline_that_fell_names_the_proxy() -> None:
    """d = 0.082 - 0.412 = -0.330, 0.098 at 95%, -0.33 / 1.1 = -0.30 SD; the proxy rose by 2.26."""
    words = headline(changed(reward_gold=0.082))
    assert words.startswith(
        "Gold reward fell from 0.412 to 0.082 (−0.330 ± 0.098 at 95%, −0.30 SD of"
    )
    assert "The proxy reward rose from 0.050 to 2.310 (+2.260 ± 0.077 at 95%, +2.26 SD" in words
    assert words.endswith("the policy pleased the reward model at the expense of the goal.")


@pytest.mark.parametrize("gold, noise", [(0.509, True), (0.511, False), (0.315, True)])
def test_headline_within_noise(gold: float, noise: bool) -> None:
    """The edge is 1.96 x 0.05 = 0.098 on either side of 0.412."""
    words = headline(changed(reward_gold=gold))
    assert ("did not change beyond noise: it went from 0.412" in words) is noise
    assert ("the policy pleased the reward model only." in words) is noise


def test_headline_without_gold_uses_held_out_then_proxy() -> None:
    proxy_only = headline(without_gold())
    assert proxy_only.startswith("Proxy reward rose from 0.050 to 2.310 (+2.260 ± 0.077 at 95%")
    assert proxy_only.endswith("this is the reward the policy was trained on.")
    compared = {"method": "policy", "names": {"before": "a", "after": "b"}}
    assert headline(without_gold() | compared).endswith(
        "this may be the reward the policy was trained on."
    )
    held = without_gold()
    for side, value in (("before", 1.0), ("after", 1.6)):
        extra = {"reward/held_out": value, "reward/held_out_std": 2.0, "n": 400}
        held[side] = {**held[side], **extra}  # no stderr: 2 / sqrt(400) = 0.1, 1.96 x .141 = .28
    assert headline(held).startswith(
        "Held-out reward rose from 1.00 to 1.60 (+0.60 ± 0.28 at 95%, +0.30 SD of"
    )


def test_headline_without_errors_says_so() -> None:
    bare = {"before": {"reward/gold": 1.0}, "after": {"reward/gold": 3.0}}
    assert headline(bare) == (
        "Gold reward went from 1.00 to 3.00"
        " (no standard errors recorded, so noise cannot be judged)."
    )
    assert headline({"before": {}, "after": {"kl/k1": math.nan}}) == (
        "No reward was measured before and after training."
    )


@pytest.mark.parametrize(
    "value, error, shown",
    [
        (1.8734, 0.042, "1.873"),
        (-0.5, None, "−0.500"),
        (1234.5, 20.0, "1,234"),
        (-0.0001, 0.02, "0.000"),
        (0.0, None, "0"),
        (None, None, "—"),
        (math.nan, None, "—"),
        (1e-9, 1e-9, "0.0000"),
    ],
)
def test_number(value: float | None, error: float | None, shown: str) -> None:
    assert number(value, error) == shown


def test_terminal_table() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(before_after_table({**EVALUATION, "proxy": "[bold]min[/bold]"}))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines()]
    gold = next(row for row in rows if row[0] == "Gold reward")
    assert gold[1:] == ["reward", "0.412 ± 0.030", "1.842 ± 0.040", "+1.30 SD"]
    length = next(row for row in rows if row[0] == "Response length")
    assert length[1:] == ["tokens", "41.2", "38.4"]
    kl = next(row for row in rows if row[0] == "KL to SFT, k1")
    assert kl[1] == "nats/response"
    assert "Proxy reward ([bold]min[/bold])" in shown
    assert "256 prompts, 1,024 responses of each model" in shown


def test_checks() -> None:
    def suspicious(evaluation: dict[str, Any], samples: list[dict[str, Any]]) -> set[str]:
        return {check.name for check in checks(evaluation, samples) if check.suspicious}

    assert suspicious(EVALUATION, SAMPLES) == {"Heads disagree"}  # 0.21 -> 0.34 is 1.62 times
    bad = changed(reward_gold=0.4, kl_k1=-0.5, length=60.0, entropy=1.0, finished=0.79)
    assert suspicious(bad, [{"after": "same"}] * 12) == {
        "Overoptimisation",
        "Negative KL",
        "Length drift",
        "Entropy collapse",
        "Heads disagree",
        "Unfinished responses",
        "Same answer to everything",
    }


def test_models_with_names_go_by_them() -> None:
    named = {**EVALUATION, "names": {"before": "runs/a", "after": "runs/$b$"}}
    assert headline(named).startswith(
        "runs/$b$ against runs/a: gold reward rose from 0.412 to 1.842 (+1.430 ± 0.098 at 95%, "
        "+1.30 SD of runs/a's rewards) at 8.41 nats per response of KL from runs/a."
    )
    titles = [column.header for column in before_after_table(named).columns]
    assert [str(title) for title in titles[2:4]] == ["runs/a", "runs/$b$"]
    assert headline({**EVALUATION, "names": ["a", "b"]}) == headline(EVALUATION)
    assert as_text("runs/$b$") == r"runs/\$b\$"  # in a figure $b$ would be a formula
