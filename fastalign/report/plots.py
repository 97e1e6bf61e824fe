"""The figures of the report, one function each: from a run's metrics to SVG, units on every axis.

A figure whose data was not recorded has no SVG and says what is missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from fastalign.report.compare import comparison_rows, names_of, reference_of
from fastalign.report.figure import (
    HALF,
    WIDE,
    Line,
    Plot,
    draw_evaluation,
    draw_line,
    draw_lines,
    draw_stack,
    finish,
    grid,
    head_lines,
    plot,
    recorded,
    smoothing,
    thin,
)
from fastalign.report.markup import safe
from fastalign.report.read import Run
from fastalign.report.style import AMBER, BLUE, GREEN, INK, MUTED, PURPLE, RED

# Viridis without its palest tenth, which vanishes on white.
STEPS = ListedColormap(colormaps["viridis_r"](np.linspace(0.1, 1, 200)))
PERPLEXITIES = [digit * 10**power for power in range(7) for digit in (1, 2, 3, 5, 7)]


def reward_and_kl(run: Run) -> Plot:
    rewards = recorded(
        run,
        Line("reward/proxy", "proxy", BLUE),
        Line("reward/gold", "gold", AMBER),
        Line("reward/held_out", "held out", GREEN, "--"),
    )
    kls = recorded(run, Line("kl/k1", "k1", PURPLE), Line("kl/k3", "k3", MUTED, "--"))

    def draw() -> Figure:
        figure, axes = grid(WIDE, 4.9, len([group for group in (rewards, kls) if group]), 1)
        if rewards:
            draw_lines(axes[0], run, rewards, "reward, mean over samples")
        if kls:
            draw_lines(axes[-1], run, kls, f"KL to {reference_of(run.evaluation)}, nats / response")
        if len(axes) > 1:
            axes[0].set_xlabel("")
        return figure

    words = "<b>Reward and KL over training.</b> Samples of the policy at each step."
    absent = "" if run.has("reward/gold") else " No gold reward was recorded."
    return plot(
        "reward-kl", words + smoothing(run) + absent, draw, rewards + kls, "reward/proxy, kl/k1"
    )


def reward_against_kl(run: Run, evaluation: dict[str, Any] | None) -> Plot:
    both = (Line("reward/proxy", "proxy", BLUE), Line("reward/gold", "gold", AMBER))
    lines = recorded(run, *both)
    kl_steps, kl = run.finite("kl/k1")
    lines = [line for line in lines if np.intersect1d(kl_steps, run.finite(line.key)[0]).size]
    words = "<b>Reward against KL.</b>" + (" One point a step, coloured by step." if lines else "")
    if not run.lines.get("train") and evaluation is not None:  # of two models, without training
        measured = {row.key for row in comparison_rows(evaluation) if row.after is not None}
        lines = [line for line in both if {line.key, "kl/k1"} <= measured]

    def draw() -> Figure:
        figure, axes = grid(WIDE, 3.7, 1, len(lines), sharex=True)
        for axis, line in zip(axes, lines, strict=True):
            steps, values = run.finite(line.key)
            common, here, there = np.intersect1d(steps, kl_steps, return_indices=True)
            at, x = thin(common, kl[there])
            _, y = thin(common, values[here])
            points = axis.scatter(x, y, c=at, cmap=STEPS, s=15, linewidths=0, alpha=0.9)
            draw_evaluation(axis, evaluation, line.key)
            axis.set_title(f"{line.label.capitalize()} reward")
            axis.set_xlabel(f"KL to {reference_of(evaluation)} (k1), nats / response")
            axis.set_ylabel("reward, mean over samples")
            axis.margins(0.06)
        if kl_steps.size and np.ptp(kl_steps) > 0:
            bar = figure.colorbar(points, ax=axes, pad=0.015, aspect=26)
            bar.set_label("step")
            bar.outline.set_visible(False)  # type: ignore[operator]
            assert bar.solids is not None
            bar.solids.set(rasterized=False, edgecolor="face")  # a raster would need an address
            bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return figure

    if evaluation is not None:
        words += " Rings: the evaluation before and after, with 95% intervals."
    return plot("reward-vs-kl", words, draw, lines, "kl/k1 with reward/proxy or reward/gold")


def disagreement(run: Run) -> Plot:
    spread = recorded(run, Line("reward/disagreement", "", RED))
    heads = head_lines(run, "reward/head_")

    def draw() -> Figure:
        count = len([group for group in (spread, heads) if group])
        figure, axes = grid(WIDE, 3.1, 1, count)
        if spread:
            draw_lines(axes[0], run, spread, "standard deviation, reward")
            axes[0].set_title("Disagreement of the heads")
        if heads:
            draw_lines(axes[-1], run, heads, "reward, mean over samples")
            axes[-1].set_title("Reward of each head")
        return figure

    words = (
        "<b>Ensemble.</b> Heads that part while the reward rises: the policy has left the data the"
        " reward model knows." + smoothing(run)
    )
    return plot(
        "disagreement", words, draw, spread + heads, "reward/disagreement, reward/head_0, ..."
    )


def losses(run: Run, method: str) -> Plot:
    policy_unit = "nats² / token" if method == "apa" else "mean over tokens"
    panels = [
        (Line("loss/policy", "", BLUE), "Policy loss", policy_unit),
        (Line("loss/value", "", BLUE), "Value loss", "reward² / token"),
        (Line("loss", "", BLUE), "Total loss", "mean over tokens"),
        (
            Line("value/explained_variance", "", GREEN),
            "Explained variance",
            "fraction of the returns",
        ),
        (Line("grad_norm", "", MUTED), "Gradient norm", "before clipping"),
        (Line("lr", "", MUTED, smooth=False), "Learning rate", "step size"),
    ]
    words = "<b>Losses and optimiser.</b>" + smoothing(run)
    return _small_multiples("losses", run, panels, words, "loss, loss/policy, loss/value")


def collapse(run: Run, evaluation: dict[str, Any] | None) -> Plot:
    panels = [
        (Line("entropy", "", BLUE), "Entropy", "nats / token"),
        (Line("length", "", BLUE), "Response length", "tokens / response"),
        (Line("finished", "", BLUE), "Finished", "fraction of responses"),
    ]
    words = "<b>Collapse watch.</b>" + smoothing(run)
    before = None if evaluation is None else evaluation["before"]
    if before is not None:
        base, named = names_of(evaluation)
        words += f" Dashed: {safe(base) if named else 'the SFT model'}."
    return _small_multiples("collapse", run, panels, words, "entropy, length, finished", before)


def time_per_phase(run: Run) -> Plot:
    phases = recorded(
        run,
        Line("time/generate", "generate", BLUE),
        Line("time/score", "score", AMBER),
        Line("time/reference", "reference", PURPLE),
        Line("time/value", "value", RED),
        Line("time/update", "update", GREEN),
    )
    speed = recorded(run, Line("tokens_per_s", "", INK))
    share = {line.label: float(run.finite(line.key)[1].sum()) for line in phases}

    def draw() -> Figure:
        figure, axes = grid(WIDE, 3.1, 1, len([group for group in (phases, speed) if group]))
        if phases:
            draw_stack(axes[0], run, phases)
            axes[0].set_title("Time of a step")
        if speed:
            draw_lines(axes[-1], run, speed, "tokens / s, each counted once")
            axes[-1].set_ylim(bottom=0)
            axes[-1].set_title("Throughput")
        return figure

    words = "<b>Where the time goes.</b>"
    if total := sum(share.values()):
        words += " " + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in share.items())
        words += f" of {total:,.0f} s."
    return plot("time", words, draw, phases + speed, "time/generate, time/update, tokens_per_s")


def reward_accuracy(run: Run) -> Plot:
    """Accuracy of each head at the last evaluation that has it, with 95% intervals."""
    rows = [
        row
        for row in run.lines.get("eval", {}).values()
        if np.isfinite(row.get("accuracy", np.nan))
    ]
    last = rows[-1] if rows else {}
    heads = [key for key in run.head_keys("accuracy/head_", "eval") if key in last]
    mean, half = last.get("accuracy", np.nan), last.get("accuracy/ci95", np.nan)

    def draw() -> Figure:
        figure, axes = grid(HALF, max(2.7, 0.9 + 0.36 * (len(heads) + 1)), 1, 1)
        names = [f"head {key.rsplit('_', 1)[1]}" for key in heads] + ["ensemble mean"]
        values = np.array([last[key] for key in heads] + [mean])
        # Heads are judged on the same pairs: their binomial half widths follow from the ensemble's.
        ratio = np.sqrt(np.maximum(values * (1 - values), 0) / max(mean * (1 - mean), 1e-12))
        for at, (value, width) in enumerate(zip(values, half * ratio, strict=True)):
            colour = BLUE if at == len(heads) else MUTED
            bar = width if np.isfinite(width) else None
            axes[0].errorbar(value, at, xerr=bar, fmt="o", ms=5, color=colour, elinewidth=1.6)
            axes[0].annotate(
                f"{value:.1%}",
                (value, at),
                (0, 5),
                textcoords="offset points",
                color=colour,
                ha="center",
            )
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(-0.6, len(names) - 0.3)
        axes[0].axvline(0.5, color=MUTED, lw=0.8, ls=":")
        axes[0].grid(axis="y", visible=False)
        axes[0].set_xlim(
            left=min(0.48, float(np.nanmin(values - np.nan_to_num(half * ratio))) - 0.02)
        )
        axes[0].set_xlabel("accuracy on held-out pairs, fraction")
        return figure

    words = "<b>Which of two answers is better?</b> Last evaluation; dotted: a coin."
    if np.isfinite(half):
        words += " 95% intervals; a head's is the ensemble's, scaled to the head's own accuracy."
    return plot("reward-accuracy", words, draw, rows, "accuracy in a line of phase eval", HALF)


def reward_curves(run: Run) -> Plot:
    return _train_and_held_out(
        "reward-loss", run, "loss, nats / pair", "<b>Bradley-Terry loss</b> of the reward heads."
    )


def preference_curves(run: Run) -> Plot:
    return _train_and_held_out("preference-loss", run, "loss / example", "<b>Preference loss.</b>")


def implicit_rewards(run: Run) -> Plot:
    lines = recorded(
        run, Line("rewards/chosen", "chosen", GREEN), Line("rewards/rejected", "rejected", RED)
    )

    def draw() -> Figure:
        figure, axes = grid(HALF, 2.7, 1, 1)
        draw_lines(axes[0], run, lines, "implicit reward, mean")
        return figure

    words = "<b>Implicit rewards</b> of the training responses." + smoothing(run)
    return plot("rewards", words, draw, lines, "rewards/chosen, rewards/rejected", HALF)


def preference_health(run: Run) -> Plot:
    panels = [
        (Line("drift/k3", "", PURPLE), "Drift (k3)", "nats / token of the data"),
        (Line("entropy", "", BLUE), "Entropy", "nats / token"),
        (Line("grad_norm", "", MUTED), "Gradient norm", "before clipping"),
    ]
    words = "<b>Drift, entropy and gradient.</b>" + smoothing(run)
    return _small_multiples("preference-health", run, panels, words, "drift/k3, entropy")


def sft_curves(run: Run) -> Plot:
    return _train_and_held_out(
        "sft-loss",
        run,
        "loss, nats / token",
        "<b>SFT loss</b>; perplexity is its exponential.",
        exponential=True,
    )


def given_curves(run: Run) -> Plot:
    return _train_and_held_out(
        "given-loss", run, "mean over tokens", "<b>Loss on given responses.</b>"
    )


def speed(run: Run, prefix: str) -> Plot:
    """Tokens per second of a stage."""
    lines = recorded(run, Line("tokens_per_s", "", INK))

    def draw() -> Figure:
        figure, axes = grid(HALF, 2.7, 1, 1)
        draw_lines(axes[0], run, lines, "tokens / s")
        axes[0].set_ylim(bottom=0)
        return figure

    return plot(f"{prefix}-speed", "<b>Throughput.</b>", draw, lines, "tokens_per_s")


def _train_and_held_out(
    id: str, run: Run, unit: str, words: str, exponential: bool = False
) -> Plot:
    train, held = run.has("loss"), run.has("loss", "eval")

    def draw() -> Figure:
        figure, axes = grid(HALF, 2.7, 1, 1)
        axis = axes[0]
        ends = []
        if train:
            ends.append(draw_line(axis, Line("loss", "train", BLUE), *run.finite("loss")))
        if held:
            steps, values = run.finite("loss", "eval")
            axis.plot(steps, values, "o-", color=AMBER, ms=4, lw=1.4)
            ends.append((float(steps[-1]), float(values[-1])))
        names = ["train"] * train + ["held out"] * held
        perplexity = exponential and axis.get_ylim()[1] < 15
        finish(axis, ends, names, [BLUE] * train + [AMBER] * held, pad=34 if perplexity else 4)
        axis.set_ylabel(unit)
        if perplexity:
            right = axis.secondary_yaxis("right", functions=(np.exp, _log))
            right.yaxis.set_major_locator(FixedLocator(PERPLEXITIES))
            right.yaxis.set_minor_locator(NullLocator())
            right.yaxis.set_major_formatter("{x:,.0f}")
            right.spines["right"].set_visible(False)
            axis.annotate(
                "perplexity",
                (1, 1),
                (2, 6),
                xycoords="axes fraction",
                textcoords="offset points",
                color=MUTED,
                fontsize=9,
            )
        return figure

    if not held:
        words += " Nothing was evaluated on held-out data."
    return plot(id, words + smoothing(run), draw, [train, held] if train or held else [], "loss")


def _power_of_ten(value: float, _: float | None = None) -> str:
    """2.5e-05 as "2.5e−5"."""
    digits, power = f"{value:.1e}".split("e")
    return f"{float(digits):g}e{int(power)}".replace("-", "−") if value else "0"


def _log(values: Any) -> Any:
    return np.log(np.maximum(values, 1e-30))


def _small_multiples(
    id: str,
    run: Run,
    panels: list[tuple[Line, str, str]],
    words: str,
    needed: str,
    before: dict[str, Any] | None = None,
) -> Plot:
    present = [panel for panel in panels if run.has(panel[0].key)]

    def draw() -> Figure:
        rows = -(-len(present) // 3)
        figure, axes = grid(WIDE, 2.45 * rows, rows, min(len(present), 3))
        for axis, (line, title, unit) in zip(axes, present, strict=False):
            draw_lines(axis, run, [line], unit)
            axis.set_title(title)
            if line.key == "lr":
                axis.yaxis.set_major_formatter(_power_of_ten)
            level = (before or {}).get(line.key)
            if isinstance(level, int | float) and np.isfinite(level):
                axis.axhline(level, color=MUTED, lw=1, ls="--")
        for axis in axes[len(present) :]:
            axis.set_visible(False)
        return figure

    return plot(id, words, draw, present, needed)
