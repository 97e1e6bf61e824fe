"""The report: what it says, what it forgives, and that the page needs nothing but itself."""

from __future__ import annotations

import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastalign.report import ReportError, before_after_table, headline, write_report
from fastalign.report.compare import checks, number
from fastalign.report.read import read_folder

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


@pytest.fixture
def road(tmp_path: Path) -> Path:
    make_sft(tmp_path / "road" / "sft")
    make_reward(tmp_path / "road" / "reward")
    make_apa(tmp_path / "road" / "apa")
    return tmp_path / "road"


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


def test_road(road: Path) -> None:
    path = write_report(road)
    html, page = path.read_text(encoding="utf-8"), parse(path)
    assert path == road / "report.html"
    assert path.stat().st_size < 3_000_000
    expected = (*POLICY_PLOTS, "reward-accuracy", "reward-loss", "sft-loss", "sft-speed")
    assert plots_of(html) == dict.fromkeys(expected, True)
    assert headline(EVALUATION) in page.text
    order = [
        "before-after",
        "training",
        "reward-model",
        "sft",
        "samples",
        "configuration",
        "repeat",
    ]
    assert sorted(order, key=page.ids.index) == order
    for words in (
        "Held-out accuracy 79.7 ± 2.4% (95% interval), 3 heads",
        "fastalign quickstart --seed 0",
        "reward_statistic: min",
        "reward, head_seed",
        "2.13.0",
        "6 min 52 s",
        "nats² / token",
        "The first 8 of 12 stored prompts",
        "generate 53%",
    ):
        assert words in page.text, words


def test_page_loads_nothing_and_runs_nothing(road: Path) -> None:
    path = write_report(road)
    html, page = path.read_text(encoding="utf-8"), parse(path)
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert not page.tags & {"script", "link", "img", "image", "iframe", "object", "embed", "base"}
    assert "http:" not in html and "https:" not in html and "data:" not in html
    assert "@import" not in html and "default-src 'none'" in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert len(page.ids) == len(set(page.ids))


def test_outside_text_is_escaped(road: Path) -> None:
    evil = "<script>alert(1)</script><img src=https://example.org/x>\"'&\x1b[31m\ud800"
    reward = {"<b>proxy": 1.0}
    sample = {"prompt": evil, "before": evil, "after": "", "after_reward": reward}
    write_lines(road / "apa" / "samples.jsonl", [sample])
    evaluation = {**EVALUATION, "command": evil, "method": evil, "machine": {evil: evil}}
    (road / "apa" / "evaluation.json").write_text(json.dumps({**evaluation, "proxy": evil}))
    (road / "apa" / "config.yaml").write_text(f"seed: {evil[:60]}\n")
    path = write_report(road)
    html, page = path.read_text(encoding="utf-8"), parse(path)
    assert not page.tags & {"script", "img", "b" if "<b>proxy" in html else ""}
    assert html.count("&lt;script&gt;alert(1)") >= 5
    assert all(address.startswith("#") for address in page.addresses)
    assert "␛[31m?" in page.text and "(empty)" in page.text


def test_long_text_is_cut(road: Path) -> None:
    write_lines(road / "apa" / "samples.jsonl", [{"prompt": "p", "before": "x" * 1501, "after": 7}])
    text = parse(write_report(road)).text
    assert "x" * 1500 + " … 1 more characters" in text


def test_single_run_unfinished_without_gold(tmp_path: Path) -> None:
    make_apa(tmp_path / "run", steps=30, gold=False, finished=False)
    path = write_report(tmp_path / "run", tmp_path / "out" / "page.html")
    html, page = path.read_text(encoding="utf-8"), parse(path)
    assert path == tmp_path / "out" / "page.html"
    assert "This run is not finished: evaluation.json is missing." in page.text
    assert "training log up to step 29" in page.text
    assert "So far, the proxy reward of the training samples went from" in page.text
    assert "No gold reward was recorded." in page.text and "Gold reward" not in page.text
    assert "reward-model" not in page.ids
    assert plots_of(html) == dict.fromkeys(POLICY_PLOTS, True)


def test_missing_stages_are_named(tmp_path: Path) -> None:
    make_sft(tmp_path / "sft", steps=20)
    page = parse(write_report(tmp_path))
    assert "No policy run yet: no apa/metrics.jsonl." in page.text
    assert "No reward model run: no reward/metrics.jsonl." in page.text
    assert "Held-out loss went from 4.600 to 3.33" in page.text


@pytest.mark.parametrize("maker, words", [(make_sft, "Held-out loss"), (make_reward, "ranks 79.7")])
def test_single_stage(tmp_path: Path, maker: Any, words: str) -> None:
    maker(tmp_path)
    page = parse(write_report(tmp_path))
    assert words in page.text and "No policy run" not in page.text


@pytest.mark.parametrize("content", ["", "\n", '{"step": 0, "pha'])
def test_empty_metrics(tmp_path: Path, content: str) -> None:
    (tmp_path / "apa").mkdir()
    (tmp_path / "apa" / "metrics.jsonl").write_text(content)
    path = write_report(tmp_path)
    assert "metrics.jsonl holds no step yet." in parse(path).text
    drawn = plots_of(path.read_text(encoding="utf-8"))
    assert drawn == dict.fromkeys(POLICY_PLOTS, False)
    assert "Not plotted: the metrics hold no entropy, length, finished." in parse(path).text


def test_one_step_and_values_that_are_not_finite(tmp_path: Path) -> None:
    metrics = '{"step": 1, "phase": "train", "reward/proxy": 0.5, "kl/k1": 0.1, "loss": NaN'
    (tmp_path / "metrics.jsonl").write_text(metrics + ', "entropy": Infinity, "length": null}\n')
    path = write_report(tmp_path)
    drawn = plots_of(path.read_text(encoding="utf-8"))
    assert drawn["reward-kl"] and drawn["reward-vs-kl"]
    assert not drawn["collapse"] and not drawn["losses"]
    text = parse(path).text
    assert "values that are not finite: entropy (1x), length (1x), loss (1x)." in text
    assert "So far, one step: the proxy reward of its samples is 0.500." in text


def test_truncated_and_broken_lines(tmp_path: Path) -> None:
    good = [json.dumps({"step": step, "phase": "train", "kl/k1": step}) for step in range(3)]
    lines = [
        good[0],
        "not json",
        good[1],
        "[1, 2]",
        '{"phase": "train"}',
        good[2],
        '{"step": 3, "k',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = read_folder(tmp_path).policy
    assert run is not None
    assert run.series("kl/k1")[1].tolist() == [0.0, 1.0, 2.0]
    assert run.notes == [
        "metrics.jsonl: the last line is cut off (stopped while writing); it is left out.",
        "metrics.jsonl: 2 unreadable line(s) left out (line 2, 4).",
        "metrics.jsonl: line 5 has no step; it is left out.",
    ]


def test_resume_later_line_wins_and_steps_are_sorted(tmp_path: Path) -> None:
    steps = [1, 2, 3, 4, 3, 4, 5, 0]
    lines = [
        {"step": step, "phase": "train", "kl/k1": 10.0 * position + step}
        for position, step in enumerate(steps)
    ]
    lines.append({"step": 4, "phase": "eval", "kl/k1": -1.0})
    write_lines(tmp_path / "metrics.jsonl", lines)
    run = read_folder(tmp_path).policy
    assert run is not None
    at, values = run.series("kl/k1")
    assert at.tolist() == [0, 1, 2, 3, 4, 5]
    assert values.tolist() == [70.0, 1.0, 12.0, 43.0, 54.0, 65.0]
    assert run.series("kl/k1", "eval")[1].tolist() == [-1.0]
    assert run.notes == [
        "metrics.jsonl: 2 step(s) logged again after a resume; the later line counts."
    ]


def test_damaged_evaluation_is_said(tmp_path: Path) -> None:
    make_apa(tmp_path, steps=5)
    (tmp_path / "evaluation.json").write_text('{"before": {"reward')
    text = parse(write_report(tmp_path)).text
    assert "evaluation.json is damaged or holds no before and after" in text
    assert "This run is not finished" in text


def test_long_run_stays_small(tmp_path: Path) -> None:
    make_apa(tmp_path, steps=5000)
    path = write_report(tmp_path)
    assert path.stat().st_size < 3_000_000
    assert "means of 400 bins; thick: running mean over 251 steps" in parse(path).text


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="expected a run folder, got '.*nowhere'"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ReportError, match=r"expected metrics.jsonl in .*, found none") as raised:
        write_report(tmp_path)
    assert "\n" not in str(raised.value) and isinstance(raised.value, ValueError)


def test_write_is_whole_or_not_at_all(road: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(road)
    before = path.read_bytes()
    assert write_report(road).read_bytes() == before  # the same run gives the same bytes

    def stop(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("fastalign.report.page.os.replace", stop)
    with (road / "apa" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "phase": "train", "kl/k1": 1.0}\n')
    with pytest.raises(OSError, match="disk full"):
        write_report(road)
    assert path.read_bytes() == before
    assert sorted(file.name for file in road.iterdir()) == ["apa", "report.html", "reward", "sft"]
