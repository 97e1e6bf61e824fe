"""Run folders as training leaves them, and what a page of theirs shows."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

EVALUATION: dict[str, Any] = {
    "before": {
        "reward/gold": 0.412,
        "reward/gold_std": 1.1,
        "reward/gold_stderr": 0.03,
        "reward/proxy": 0.05,
        "reward/proxy_std": 1.0,
        "reward/proxy_stderr": 0.03,
        "reward/disagreement": 0.21,
        "kl/k1": 0.0,
        "kl/k1_stderr": 0.0,
        "kl/k3": 0.0,
        "kl/k3_stderr": 0.0,
        "entropy": 2.31,
        "length": 41.2,
        "finished": 0.90,
        "n": 1024,
    },
    "after": {
        "reward/gold": 1.842,
        "reward/gold_std": 0.9,
        "reward/gold_stderr": 0.04,
        "reward/proxy": 2.31,
        "reward/proxy_std": 0.8,
        "reward/proxy_stderr": 0.025,
        "reward/disagreement": 0.34,
        "kl/k1": 8.41,
        "kl/k1_stderr": 0.21,
        "kl/k3": 8.27,
        "kl/k3_stderr": 0.19,
        "entropy": 1.62,
        "length": 38.4,
        "finished": 0.97,
        "n": 1024,
    },
    "proxy": "min",
    "n_prompts": 256,
    "n_samples": 1024,
    "method": "apa",
    "machine": {"cpu": "8-core CPU", "gpu": "none", "memory": "32 GiB"},
    "versions": {"fastalign": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
    "command": "fastalign quickstart --seed 0",
    "seconds": {"total": 412.0, "sft": 60.2, "reward": 31.0, "apa": 320.8},
}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_sft(path: Path, steps: int = 120) -> None:
    draw = random.Random(1)
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        loss = 2.2 + 2.4 * math.exp(-step / 25) + draw.gauss(0, 0.06)
        common = {"step": step, "time": 1.7e9 + step}
        if step % 20 == 0:
            held = 2.3 + 2.3 * math.exp(-step / 25)
            lines.append({**common, "phase": "eval", "loss": held, "perplexity": math.exp(held)})
        speed = {
            "tokens": 4096 * step,
            "tokens_per_s": 21000 + draw.gauss(0, 600),
            "memory_gib": 1.2,
        }
        line = {**common, "phase": "train", "loss": loss, "perplexity": math.exp(loss), **speed}
        if step:
            lines.append({**line, "lr": 3e-4, "grad_norm": 1.0})
    write_lines(path / "metrics.jsonl", lines)
    (path / "config.yaml").write_text("model: scratch:tiny\nsteps: 120\nlr: 0.0003\nseed: 0\n")


def make_reward(path: Path, steps: int = 80) -> None:
    draw = random.Random(2)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.38 + 0.31 * math.exp(-step / 18)
        noise = draw.gauss(0, 0.02)
        train = {"step": step, "phase": "train", "time": 1.7e9 + step, "loss": loss + noise}
        lines.append(
            {**train, "accuracy": 0.82, "lr": 1e-4, "grad_norm": 0.8, "tokens_per_s": 18000}
        )
        if step % 20 == 0:
            level = 0.5 + 0.31 * (1 - math.exp(-step / 25))
            heads = {f"accuracy/head_{k}": level + (k - 1) * 0.012 for k in range(3)}
            held = {"loss": loss + 0.03, "accuracy": level, "accuracy/ci95": 0.024, **heads}
            common = {"step": step, "phase": "eval", "time": 1.7e9 + step}
            lines.append({**common, **held, "disagreement": 0.3})
    write_lines(path / "metrics.jsonl", lines)
    (path / "config.yaml").write_text("heads: 3\nbootstrap: resample\nhead_seed: 11\n")


def make_apa(path: Path, steps: int = 200, gold: bool = True, finished: bool = True) -> None:
    draw = random.Random(3)
    lines = []
    for step in range(steps):
        x = step / max(steps, 200)
        proxy = 0.05 + 2.3 * (1 - math.exp(-3 * x)) + draw.gauss(0, 0.12)
        kl = max(0.0, 9 * x**0.8 + draw.gauss(0, 0.35))
        line = {
            "step": step,
            "phase": "train",
            "time": 1.7e9 + 1.6 * step,
            "loss": 3.1 * math.exp(-2 * x) + draw.gauss(0, 0.1),
            "loss/policy": 2.2 * math.exp(-2 * x) + draw.gauss(0, 0.08),
            "loss/value": 0.9 * math.exp(-2 * x) + draw.gauss(0, 0.03),
            "reward/proxy": proxy,
            "reward/proxy_std": 0.9,
            "reward/disagreement": 0.21 + 0.13 * x + draw.gauss(0, 0.01),
            **{f"reward/head_{k}": proxy + 0.2 * k + draw.gauss(0, 0.05) for k in range(3)},
            "kl/k1": kl,
            "kl/k3": kl * 0.97 + 0.05,
            "entropy": 2.31 - 0.7 * x + draw.gauss(0, 0.03),
            "length": 41 - 3 * x + draw.gauss(0, 0.8),
            "finished": min(1.0, 0.9 + 0.08 * x + draw.gauss(0, 0.012)),
            "value/explained_variance": 0.75 * (1 - math.exp(-6 * x)) + draw.gauss(0, 0.04),
            "advantage/std": 1.0,
            "lr": 1e-4 * (1 - x),
            "grad_norm": 0.8 + abs(draw.gauss(0, 0.15)),
            "tokens": 9000 * (step + 1),
            "tokens_per_s": 5600 + draw.gauss(0, 200),
            "time/generate": 0.85 + draw.gauss(0, 0.03),
            "time/score": 0.12,
            "time/reference": 0.11,
            "time/update": 0.52 + draw.gauss(0, 0.02),
            "memory_gib": 2.25,
        }
        if gold:
            level = 0.41 + 1.75 * (1 - math.exp(-3 * x)) - 0.3 * x**3
            line |= {"reward/gold": level + draw.gauss(0, 0.13), "reward/gold_std": 1.0}
        lines.append(line)
    write_lines(path / "metrics.jsonl", lines)
    (path / "config.yaml").write_text(
        "method: apa\nlam: 0.1\nreward_statistic: min\nsteps: 200\nseed: 0\nlr: 0.0001\n"
    )
    if finished:
        (path / "evaluation.json").write_text(json.dumps(EVALUATION if gold else without_gold()))
        write_lines(path / "samples.jsonl", SAMPLES)


def without_gold() -> dict[str, Any]:
    sides = {
        side: {key: value for key, value in EVALUATION[side].items() if "gold" not in key}
        for side in ("before", "after")
    }
    return {**EVALUATION, **sides}


def changed(**after: float) -> dict[str, Any]:
    """EVALUATION with other values after; underscores stand for slashes: reward_gold=1.0."""
    renamed = {key.replace("reward_", "reward/").replace("kl_", "kl/"): after[key] for key in after}
    return {**EVALUATION, "after": {**EVALUATION["after"], **renamed}}


SAMPLES: list[dict[str, Any]] = [
    {
        "prompt": f"Write a short note to the baker about order {index}.",
        "before": "Dear baker, the bread. The bread was the bread and it came on the day.",
        "after": f"Dear baker, thank you for order {index}: the rye was fresh.\nSee you Friday!",
        "before_reward": {"proxy": 0.1 * index - 0.4, "gold": 0.3},
        "after_reward": {"proxy": 2.0 + 0.1 * index, "gold": 1.7},
    }
    for index in range(12)
]


class Loads(HTMLParser):
    """Collects what a browser could load or run, the text people see and the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.text = ""
        self.hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.hidden = tag == "style"
        for name, value in attrs:
            if name.split(":")[-1] in ("src", "href", "srcset", "action", "data"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self.hidden else data


def parse(path: Path) -> Loads:
    page = Loads()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def plots_of(html: str) -> dict[str, bool]:
    """Plot id -> whether it was drawn."""
    drawn = re.findall(r'<figure id="plot-([\w-]+)"><svg', html)
    absent = re.findall(r'<p class="missing" id="plot-([\w-]+)">', html)
    return {**dict.fromkeys(drawn, True), **dict.fromkeys(absent, False)}


POLICY_PLOTS = ("reward-kl", "reward-vs-kl", "disagreement", "collapse", "losses", "time")
